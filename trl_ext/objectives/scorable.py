"""Groups in which some completions could not be scored."""

from collections.abc import Callable

import torch
from torch import Tensor

Credit = Callable[..., Tensor]


def credit_of_scorable(
    credit: Credit, rewards_PG: Tensor, *labels_PG: Tensor, min_samples: int
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
    assert rewards_PG.dim() == 2, rewards_PG.shape
    scorable_PG = ~rewards_PG.isnan()
    if scorable_PG.all():
        return credit(rewards_PG, *labels_PG)
    credit_PG, G = torch.zeros_like(rewards_PG), rewards_PG.size(1)
    count_P = scorable_PG.sum(1)
    for m in count_P.unique().tolist():
        if m < min_samples:
            continue
        kept_PG = scorable_PG & (count_P == m).unsqueeze(1)
        groups = [x[kept_PG].view(-1, m) for x in (rewards_PG, *labels_PG)]
        credit_PG[kept_PG] = credit(*groups).reshape(-1) * (G / m)
    return credit_PG
