"""Which completions of a group form a pair, and who of the two won.

Scores order the completions of a group; NaN marks one that could not be scored. A judge's
preferences, where there are any, decide each pair by themselves, and the scores (their win rates)
only select it. A pair without a winner keeps its place with weight 0: the number of pairs, and with
it the normaliser of the loss, never depends on the scores.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

EosRule = Literal["none", "subtract", "replace"]


@dataclass(frozen=True)
class Pairs:
    """Pairs of completions of each group.

    Attributes:
        chosen_PN, rejected_PN: `(P, N)`, integers, two *different* positions in the group.
        weight_PN: `(P, N)`, ≥ 0; exactly 0 for a tie and where a side could not be scored. The
            weights of a prompt sum to 1, or to 0.
        label_PN: `(P, N)`, P(chosen ≻ rejected): 1 for pairs decided by scores, 1/2 at weight 0.
    """

    chosen_PN: Tensor
    rejected_PN: Tensor
    weight_PN: Tensor
    label_PN: Tensor


def best_worst(scores_PG: Tensor, *, preferences_PGG: Tensor | None = None) -> Pairs:
    """Pairs the best with the worst completion of each group, N = 1.

    Args:
        scores_PG: `(P, G)`, finite or NaN; G ≥ 2. With preferences: the win rates.
        preferences_PGG: `(P, G, G)`, P(i ≻ j), complementary (Pᵢⱼ + Pⱼᵢ = 1), NaN where not judged.

    Returns:
        One pair per prompt; of several best or worst completions the first. Equal scores, or fewer
        than two that are not NaN, give weight 0 and the pair (0, 1).
    """
    _assert_group(scores_PG, preferences_PGG)
    unscorable_PG = scores_PG.isnan()
    best_P1 = scores_PG.masked_fill(unscorable_PG, -torch.inf).argmax(1, keepdim=True)
    worst_P1 = scores_PG.masked_fill(unscorable_PG, torch.inf).argmin(1, keepdim=True)
    # With one scorable completion, or equal scores, both searches stop at the same one.
    silent_P1 = best_P1 == worst_P1
    best_P1 = best_P1.masked_fill(silent_P1, 0)
    worst_P1 = worst_P1.masked_fill(silent_P1, 1)
    lead_P1 = _lead(best_P1, worst_P1, scores_PG, preferences_PGG).masked_fill(silent_P1, 0.0)
    return _decide(best_P1, worst_P1, lead_P1, preferences_PGG)


def first_two(scores_PG: Tensor, *, preferences_PGG: Tensor | None = None) -> Pairs:
    """Pairs the first two completions of each group, N = 1: samples of the policy as they come.

    Args:
        scores_PG, preferences_PGG: as in `best_worst`.

    Returns:
        One pair per prompt. A tie has weight 0.
    """
    _assert_group(scores_PG, preferences_PGG)
    first_P1 = torch.zeros_like(scores_PG[:, :1], dtype=torch.long)
    second_P1 = first_P1 + 1
    lead_P1 = _lead(first_P1, second_P1, scores_PG, preferences_PGG)
    return _decide(first_P1, second_P1, lead_P1, preferences_PGG)


def all_pairs(scores_PG: Tensor, *, preferences_PGG: Tensor | None = None) -> Pairs:
    """Pairs every two completions of each group, N = G(G−1)/2.

    Args:
        scores_PG, preferences_PGG: as in `best_worst`; with preferences the scores are not used.

    Returns:
        Pairs in the order (0,1), (0,2), …, each with the weight 1/(pairs of that prompt that have a
        winner), or 0.
    """
    _assert_group(scores_PG, preferences_PGG)
    P, G = scores_PG.shape
    two_2N = torch.triu_indices(G, G, 1, device=scores_PG.device)
    first_PN, second_PN = (index_N.expand(P, -1) for index_N in two_2N)
    lead_PN = _lead(first_PN, second_PN, scores_PG, preferences_PGG)
    return _decide(first_PN, second_PN, lead_PN, preferences_PGG)


def soft(pairs: Pairs, preferences_PGG: Tensor) -> Pairs:
    """The same pairs, of which every judged one counts, ties too, with its probability as label.

    A tie is no silence to a loss that has soft labels: half of it says each way, and for IPO's
    square this pulls the two log-ratios together. Without it the identity with self-play breaks.

    Args:
        pairs: from a rule above; their weights are shared out anew, equally.
        preferences_PGG: `(P, G, G)`, P(i ≻ j), NaN where not judged.

    Source: arXiv:2407.00617, equation 8.
    """
    label_PN = _entries(preferences_PGG, pairs.chosen_PN, pairs.rejected_PN)
    judged_PN = (~label_PN.isnan()).to(pairs.weight_PN.dtype)
    weight_PN = judged_PN / judged_PN.sum(1, keepdim=True).clamp(min=1)
    return Pairs(pairs.chosen_PN, pairs.rejected_PN, weight_PN, label_PN.nan_to_num(0.5))


def win_rates(preferences_PGG: Tensor) -> Tensor:
    """Win rate of each completion against the rest of its group.

    rᵢ = 1/(G−1) Σ_{j≠i} P(yᵢ ≻ yⱼ)

    Args:
        preferences_PGG: `(P, G, G)`, in [0, 1], NaN where not judged; the diagonal is not read.

    Returns:
        `(P, G)`, in [0, 1]: the mean over the opponents that were judged, NaN without any. In a
        group judged in full they sum to G/2, and E[rᵢ | yᵢ = y] = P(y ≻ π).

    Source: arXiv:2401.04056 (SPO).
    """
    assert preferences_PGG.dim() == 3, preferences_PGG.shape
    assert preferences_PGG.size(1) == preferences_PGG.size(2) > 1, preferences_PGG.shape
    G = preferences_PGG.size(1)
    itself_GG = torch.eye(G, dtype=torch.bool, device=preferences_PGG.device)
    return preferences_PGG.masked_fill(itself_GG, torch.nan).nanmean(2)


def debiased(first_PN: Tensor, second_PN: Tensor) -> Tensor:
    """Preference free of the judge's taste for a position, from both orders.

    P(a ≻ b) = (p₁ + 1 − p₂)/2

    Args:
        first_PN: p₁ = P(a beats b) with a shown first, in [0, 1].
        second_PN: p₂ = P(b beats a) with b shown first; same shape.

    Returns:
        Same shape. A judge that looks at the position only, p₁ = p₂, gives exactly 1/2, a tie. NaN
        in either order stays NaN.

    Source: arXiv:2405.08448, where the sign of p₁ − p₂ decides.
    """
    assert first_PN.shape == second_PN.shape, (first_PN.shape, second_PN.shape)
    return 0.5 + (first_PN - second_PN) / 2


def consistent(first_PN: Tensor, second_PN: Tensor) -> Tensor:
    """Whether both orders name the same winner, or both none.

    Args:
        first_PN, second_PN: as in `debiased`.

    Returns:
        Booleans of the same shape; False where either is NaN.
    """
    assert first_PN.shape == second_PN.shape, (first_PN.shape, second_PN.shape)
    missing_PN = first_PN.isnan() | second_PN.isnan()
    return ((first_PN - 0.5).sign() == (0.5 - second_PN).sign()) & ~missing_PN


def missing_eos(rewards_PG: Tensor, truncated_PG: Tensor, rule: EosRule, value: float) -> Tensor:
    """Scores completions that did not end by themselves.

    Args:
        rewards_PG: `(P, G)`, NaN where unscorable.
        truncated_PG: `(P, G)`, booleans, True without end-of-sequence token.
        rule: "none" leaves the reward, "subtract" lowers it by the value (as TRL does), "replace"
            puts the value in its place (as arXiv:2410.18252 does, with −1 or −10).
        value: in the rewards' unit.

    Returns:
        `(P, G)`; NaN stays NaN under every rule.
    """
    assert rewards_PG.shape == truncated_PG.shape, (rewards_PG.shape, truncated_PG.shape)
    assert truncated_PG.dtype == torch.bool and rule in get_args(EosRule), (truncated_PG, rule)
    if rule == "none":
        return rewards_PG
    if rule == "subtract":
        return torch.where(truncated_PG, rewards_PG - value, rewards_PG)
    return rewards_PG.masked_fill(truncated_PG & ~rewards_PG.isnan(), value)


def _assert_group(scores_PG: Tensor, preferences_PGG: Tensor | None) -> None:
    assert scores_PG.dim() == 2 and scores_PG.size(1) > 1, scores_PG.shape
    assert scores_PG.is_floating_point(), scores_PG.dtype
    if preferences_PGG is not None:
        assert preferences_PGG.shape == (*scores_PG.shape, scores_PG.size(1)), preferences_PGG.shape


def _lead(
    first_PN: Tensor, second_PN: Tensor, scores_PG: Tensor, preferences_PGG: Tensor | None
) -> Tensor:
    """Positive where the first of a pair won, 0 in a tie, NaN without a verdict."""
    if preferences_PGG is None:
        return scores_PG.gather(1, first_PN) - scores_PG.gather(1, second_PN)
    return _entries(preferences_PGG, first_PN, second_PN) - 0.5


def _decide(
    first_PN: Tensor, second_PN: Tensor, lead_PN: Tensor, preferences_PGG: Tensor | None
) -> Pairs:
    """Puts the winner first, and shares a prompt's weight among the pairs that have one."""
    swapped_PN = lead_PN < 0
    decided_PN = (lead_PN > 0) | swapped_PN
    chosen_PN = torch.where(swapped_PN, second_PN, first_PN)
    rejected_PN = torch.where(swapped_PN, first_PN, second_PN)
    label_PN = torch.ones_like(lead_PN)
    if preferences_PGG is not None:
        label_PN = _entries(preferences_PGG, chosen_PN, rejected_PN)
    return Pairs(
        chosen_PN=chosen_PN,
        rejected_PN=rejected_PN,
        weight_PN=decided_PN.to(lead_PN) / decided_PN.sum(1, keepdim=True).clamp(min=1),
        label_PN=label_PN.masked_fill(~decided_PN, 0.5),
    )


def _entries(preferences_PGG: Tensor, row_PN: Tensor, column_PN: Tensor) -> Tensor:
    """P(row ≻ column) of each pair, `(P, N)`."""
    G = preferences_PGG.size(1)
    return preferences_PGG.flatten(1).gather(1, row_PN * G + column_PN)
