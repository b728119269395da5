"""Pass@k Training: pass@k of one group as reward and scale, for rewards of 0 and 1.

The closed form of the authors' released code. Dropped: drawing the subsets (their full and
bootstrap sampling), and k = G, for which every credit is 0.

Source: arXiv:2508.10751.
"""

import math

import torch
from torch import Tensor


def analytic_credit(rewards_PG: Tensor, k: int, normalise: bool = True) -> Tensor:
    """Group-relative credit of pass@k, from the number c of correct samples alone.

    ρ = 1 − C(n−c,k)/C(n,k),   σ = √(ρ(1−ρ))
    A₊ = (1 − ρ)/(σ + 10⁻⁶)
    A₋ = (1 − ρ − C(n−c−1,k−1)/C(n−1,k−1))/(σ + 10⁻⁶)

    Without the division by σ, the group mean of Aᵢ ∇log π(yᵢ) has the expectation
    (1/k − 1/n) ∇pass@k. With it, prompts are reweighted and no k-sample objective is ascended.

    Args:
        rewards_PG: `(P, G)`, each exactly 0 or 1; n = G.
        k: in [1, G − 1]; k = G would make every credit 0.
        normalise: divide by σ + 10⁻⁶, as the paper does.

    Returns:
        `(P, G)`, without gradient; it sums to 0. As in the paper there is no factor G.

    Raises:
        ValueError: a reward is neither 0 nor 1.

    Groups with no correct sample, or with fewer than k wrong ones, get exactly 0.
    Source: arXiv:2508.10751, analytical derivation.
    """
    assert rewards_PG.dim() == 2 and rewards_PG.is_floating_point(), rewards_PG
    n = rewards_PG.size(1)
    assert 1 <= k < n, f"k={k} is outside [1, {n - 1}]"
    correct_PG = _correct(rewards_PG.detach())
    table = [_advantages(c, n, k, normalise) for c in range(n + 1)]
    table_c2 = torch.tensor(table, dtype=rewards_PG.dtype, device=rewards_PG.device)
    return table_c2[correct_PG.sum(1)].gather(1, correct_PG.long())


def _advantages(c: int, n: int, k: int, normalise: bool) -> tuple[float, float]:
    """(A₋, A₊) of a group of n with c correct samples."""
    all_wrong = math.comb(n - c, k) / math.comb(n, k)
    # A group without a wrong sample has no A₋.
    others_wrong = math.comb(n - c - 1, k - 1) / math.comb(n - 1, k - 1) if c < n else 0.0
    scale = math.sqrt((1 - all_wrong) * all_wrong) + 1e-6 if normalise else 1.0
    return (all_wrong - others_wrong) / scale, all_wrong / scale


def _correct(rewards_PG: Tensor) -> Tensor:
    correct_PG = rewards_PG == 1
    other_PG = ~(correct_PG | (rewards_PG == 0))
    if other_PG.any():
        raise ValueError(
            f"rewards_PG holds {rewards_PG[other_PG][0].item()!r}: the analytic credit counts "
            "correct samples and takes rewards of exactly 0 or 1. Threshold the rewards, or use "
            "an estimator for continuous ones, `pass_at_k_credit` or `pkpo_credit`."
        )
    return correct_PG
