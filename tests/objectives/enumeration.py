"""A policy over four actions, small enough to visit every group that it can sample."""

import itertools
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

LOGITS = torch.tensor([0.2, -0.3, 0.1, -0.5], dtype=torch.float64)
REWARDS = torch.tensor([0.0, 1.0, 0.3, 1.0], dtype=torch.float64)


def all_groups(n: int) -> Tensor:
    """`(4ⁿ, n)`, every ordered outcome of n samples."""
    return torch.tensor(list(itertools.product(range(4), repeat=n)))


def expected_gradient(credit: Callable[[Tensor], Tensor], n: int) -> Tensor:
    """Σ over groups of P(group) · mean over the n samples of creditᵢ ∇log π(yᵢ), `(4,)`.

    Args:
        credit: `(P, n)` actions to `(P, n)` credit.
    """
    groups, logp = all_groups(n), LOGITS.log_softmax(0)
    score = torch.eye(4, dtype=torch.float64)[groups] - logp.exp()
    probability = logp[groups].sum(1).exp()
    return (probability[:, None, None] * credit(groups)[:, :, None] * score).mean(1).sum(0)


def objective_gradient(value: Callable[[Tensor], Tensor], k: int) -> Tensor:
    """∇ E[value(y₁ … y_k)] by autograd, `(4,)`.

    Args:
        value: `(P, k)` actions to `(P,)`.
    """
    logits, groups = LOGITS.clone().requires_grad_(), all_groups(k)
    probability = logits.log_softmax(0)[groups].sum(1).exp()
    (gradient,) = torch.autograd.grad(probability @ value(groups), logits)
    return gradient


def best(actions: Tensor) -> Tensor:
    """Reward of the best sample, `(P,)`."""
    return REWARDS[actions].amax(1)


def subsets(n: int, k: int, containing: int | None = None) -> Iterator[list[int]]:
    """Subsets of size k of range(n), optionally only those with one given member."""
    for subset in itertools.combinations(range(n), k):
        if containing is None or containing in subset:
            yield list(subset)


def brute_force_credit(
    subset_credit: Callable[[list[int], int], float], n: int, k: int
) -> list[float]:
    """n/C(n,k) Σ_{I∋i} subset_credit(I, i), term by term."""
    return [
        n / math.comb(n, k) * sum(subset_credit(subset, i) for subset in subsets(n, k, i))
        for i in range(n)
    ]


def table(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)
