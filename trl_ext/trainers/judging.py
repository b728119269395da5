"""Asking a pairwise judge about the completions of each group."""

from collections.abc import Sequence

import torch
from torch import Tensor

from trl_ext.judges import Judge, ask
from trl_ext.objectives.pair_rules import consistent, debiased

Indices = Sequence[tuple[int, int]]


def judged(
    judge: Judge, prompts: list, completions: list, G: int, pairs: Indices, both_orders: bool
) -> tuple[Tensor, float]:
    """Preferences inside each group, by one call of the judge for all pairs.

    Args:
        judge: called with equally long lists.
        prompts: B, one per completion.
        completions: B, groups of `G` in a row.
        G: completions per group.
        pairs: places (i, j) within a group that are compared.
        both_orders: ask twice, each completion first once, and average: what the judge owes to the
            order cancels.

    Returns:
        `(P, G, G)`: P(i beats j), P(j beats i) = 1 − P(i beats j), 1/2 on the diagonal, NaN where
        not judged; and the fraction of pairs whose two orders name different winners.
    """
    P = len(completions) // G
    rows = [(p * G + i, p * G + j) for p in range(P) for i, j in pairs]
    asked = rows + [(j, i) for i, j in rows] if both_orders else rows
    answers = ask(
        judge,
        [prompts[i] for i, _ in asked],
        [completions[i] for i, _ in asked],
        [completions[j] for _, j in asked],
    ).float()
    preferred, inconsistent = answers[: len(rows)], 0.0
    if both_orders:
        swapped = answers[len(rows) :]
        told_twice = ~(preferred + swapped).isnan()
        differ = ~consistent(preferred, swapped)[told_twice]
        inconsistent = differ.sum().item() / max(len(differ), 1)
        preferred = debiased(preferred, swapped)
    preferences_PGG = torch.full((P, G, G), torch.nan, dtype=preferred.dtype)
    places = torch.arange(G)
    preferences_PGG[:, places, places] = 0.5
    i, j = torch.tensor(pairs).T
    preferences_PGG[:, i, j] = preferred.view(P, -1)
    preferences_PGG[:, j, i] = 1 - preferred.view(P, -1)
    return preferences_PGG, inconsistent


def bradley_terry(rewards_PG: Tensor) -> Tensor:
    """`(P, G, G)`: σ(rᵢ − rⱼ), what a reward model says of a pair; NaN where either is unscorable.

    Source: Bradley and Terry 1952.
    """
    return torch.sigmoid(rewards_PG.unsqueeze(2) - rewards_PG.unsqueeze(1))
