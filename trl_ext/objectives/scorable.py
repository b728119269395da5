"""Groups in which some completions could not be scored: as if these had never been drawn."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor


def scorable_groups(
    rewards_PG: Tensor, *labels_PG: Tensor, min_samples: int
) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """Sorts prompts by their number of scorable completions and leaves the others out.

    Args:
        rewards_PG: `(P, G)`, NaN where unscorable.
        labels_PG: further `(P, G)` tensors.
        min_samples: prompts with fewer scorable completions are passed over.

    Yields:
        For each number m that occurs, the mask `(P, G)` of the completions concerned, and rewards
        and labels of these, `(P', m)` each.
    """
    assert rewards_PG.dim() == 2, rewards_PG.shape
    scorable_PG = ~rewards_PG.isnan()
    count_P = scorable_PG.sum(1)
    for m in count_P.unique().tolist():
        if m >= min_samples:
            kept_PG = scorable_PG & (count_P == m).unsqueeze(1)
            yield kept_PG, [x[kept_PG].view(-1, m) for x in (rewards_PG, *labels_PG)]


def credit_of_scorable(
    credit: Callable[..., Tensor], rewards_PG: Tensor, *labels_PG: Tensor, min_samples: int
) -> Tensor:
    """Credit of each group as if its unscorable completions had never been drawn.

    A group with m < G scorable completions gets `credit` of those m, times G/m: the mean over all
    rows then still estimates the same gradient. A group with fewer than `min_samples` gets 0.

    Args:
        credit: `(P', m)` rewards and labels to `(P', m)` credit.
        rewards_PG: `(P, G)`, NaN where unscorable.
        labels_PG: further `(P, G)` tensors that `credit` compares inside a group.
        min_samples: smallest group for which `credit` is defined.

    Returns:
        `(P, G)`, finite; exactly 0 on unscorable completions.
    """
    credit_PG, G = torch.zeros_like(rewards_PG), rewards_PG.size(1)
    for kept_PG, groups in scorable_groups(rewards_PG, *labels_PG, min_samples=min_samples):
        credit_PG[kept_PG] = credit(*groups).reshape(-1) * (G / groups[0].size(1))
    return credit_PG
