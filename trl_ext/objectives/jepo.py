"""JEPO and relatives: a reference answer instead of a verifier.

A completion is a thought c; the reference answer a* is scored behind it, never sampled. With
pⱼ = π(a*|x, cⱼ), Jensen's inequality bounds what nobody can compute from below:

    log π(a*|x) = log E[p] ≥ Lₙ = E log (1/n) Σⱼ pⱼ,   rising in n

Each bound splits into an advantage for the thought and a weight for the answer: the mean over rows
of Aᵢ ∇log π(cᵢ|x) + wᵢ ∇log pᵢ estimates its gradient, advantage and weight held fixed. The weights
order the family: 1 (single, LaTRO), G · softmax log p (multi), p (VeriFree).

A thought that never came to the answer's marker has NaN for log p. It takes no part in the bound,
as if it had not been drawn, and is left to `format_advantage`. Dropped: TRICE's memory of
rationales.

Source: arXiv:2503.19618, whose printed formulas omit a logarithm and print aᵢ for the thought.
"""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from trl_ext.objectives.baselines import leave_one_out
from trl_ext.objectives.scorable import credit_of_scorable
from trl_ext.objectives.sequence_policy import leave_one_out_advantage

Scale = Literal["group", "batch", "none"]

# As TRL's: answers that differ by rounding only must not be told apart.
MIN_DEVIATION = 1e-4

# Subsets of the samples that `bound_estimate` averages over: all of 16 by 8 fit.
MOST_SUBSETS = 2**14


def answer_logp(token_logp_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """log π(a*|x, c) = Σₜ log π(a*ₜ|x, c, a*₍<t₎), of the whole answer and never per token.

    Args:
        token_logp_BT: `(B, T)`, nats, of the answer's tokens; anything in the padding.
        mask_BT: `(B, T)`, nonzero on the answer's tokens.

    Returns:
        `(B,)`, nats, in float32 at least; 0 for an empty answer.
    """
    assert token_logp_BT.dim() == 2 and token_logp_BT.shape == mask_BT.shape, mask_BT.shape
    dtype = torch.promote_types(token_logp_BT.dtype, torch.float32)
    return token_logp_BT.to(dtype).masked_fill(mask_BT == 0, 0.0).sum(1)


def single_bound(answer_logp_PG: Tensor) -> tuple[Tensor, Tensor]:
    """L₁, each thought against the mean of the others.

    Aᵢ = log pᵢ − 1/(G−1) Σ_{j≠i} log pⱼ,   wᵢ = 1

    Args:
        answer_logp_PG: `(P, G)`, log pⱼ in nats, summed over the answer's tokens; NaN where there
            is no answer to score.

    Returns:
        Advantage of the thoughts and weight of the answers, `(P, G)` each, without gradient. Equal
        log pⱼ give advantage exactly 0. With m < G scored answers both are those among these, times
        G/m; a lone one has advantage 0 and weight G, which is the gradient of SFT.

    Source: arXiv:2503.19618.
    """
    return (
        _of_scored(lambda logp: logp - leave_one_out(logp), answer_logp_PG, min_samples=2),
        _of_scored(torch.ones_like, answer_logp_PG),
    )


def multi_bound(answer_logp_PG: Tensor) -> tuple[Tensor, Tensor]:
    """L_G, each thought credited with what it adds to the bound of the others.

    Aᵢ = G (log (1/G) Σⱼ pⱼ − log (1/(G−1)) Σ_{j≠i} pⱼ),   wᵢ = G pᵢ / Σⱼ pⱼ

    Args:
        answer_logp_PG: as in `single_bound`; G ≥ 2, since one thought has no others.

    Returns:
        Advantage and weight, `(P, G)` each, without gradient; the factor G undoes the mean over
        rows, for the gradient of log (1/G) Σ p is a sum. Equal log pⱼ give advantage exactly 0 and
        weight 1. With m < G scored answers both are those of Lₘ; a lone one is as in
        `single_bound`.

    Source: arXiv:2503.19618; the leave-one-out is VIMCO's, arXiv:1602.06725.
    """
    _assert_group(answer_logp_PG)

    def advantage(logp: Tensor) -> Tensor:
        above = logp - logp.amax(1, keepdim=True)  # digits for the differences, not for the sum
        return logp.size(1) * (_log_mean_exp(above)[:, None] - _log_mean_exp(_others(above)))

    return (
        _of_scored(advantage, answer_logp_PG, min_samples=2),
        _of_scored(lambda logp: logp.size(1) * logp.softmax(1), answer_logp_PG),
    )


def verifree(answer_logp_PG: Tensor) -> tuple[Tensor, Tensor]:
    """VeriFree: E[p] itself, which is RLOO with an exact match, its answer summed out.

    Aᵢ = pᵢ − 1/(G−1) Σ_{j≠i} pⱼ,   wᵢ = pᵢ

    Args:
        answer_logp_PG: as in `single_bound`; G ≥ 2.

    Returns:
        Advantage and weight, `(P, G)` each, without gradient; both vanish with p, which is why
        long answers need a bound. Scored answers only, as in `single_bound`.

    Source: arXiv:2505.21493; arXiv:2503.19618, equation 10 and Lemma D.4.
    """
    _assert_group(answer_logp_PG)
    return leave_one_out_advantage(answer_logp_PG.exp()), _of_scored(torch.exp, answer_logp_PG)


def latro(
    answer_logp_PG: Tensor, thought_log_ratio_PG: Tensor, beta: float
) -> tuple[Tensor, Tensor]:
    """LaTRO: L₁ − β KL(π(c|x)‖ref(c|x)), the KL inside the reward of the thought.

    Aᵢ = Rᵢ − 1/(G−1) Σ_{j≠i} Rⱼ,   Rᵢ = log pᵢ − β (log π(cᵢ) − log ref(cᵢ)),   wᵢ = 1

    Args:
        answer_logp_PG: as in `single_bound`; G ≥ 2.
        thought_log_ratio_PG: `(P, G)`, log π(c) − log ref(c), nats, summed over the thought.
        beta: weight of the KL, ≥ 0; 0 is `single_bound`, and 1 makes it a bound on the answer's
            likelihood under thoughts of the reference.

    Returns:
        Advantage and weight, as in `single_bound`.

    Source: arXiv:2411.04282; arXiv:2503.19618, Lemma D.6.
    """
    _assert_group(answer_logp_PG)
    assert answer_logp_PG.shape == thought_log_ratio_PG.shape, thought_log_ratio_PG.shape
    assert beta >= 0, beta
    return single_bound(answer_logp_PG - beta * thought_log_ratio_PG)


def format_advantage(scored_PG: Tensor, penalty: float) -> Tensor:
    """RLOO's advantage of the format reward: −penalty without the marker, 0 with it.

    Args:
        scored_PG: `(P, G)`, bool, whether the thought came to the marker; G ≥ 2.
        penalty: p ≥ 0; 10 in the paper. Dividing by a deviation leaves little of its size.

    Returns:
        `(P, G)` in float32; exactly 0 in a group of one kind.

    Source: arXiv:2503.19618, appendix B.2.
    """
    assert scored_PG.dtype == torch.bool and penalty >= 0, (scored_PG.dtype, penalty)
    return leave_one_out_advantage(-penalty * (~scored_PG).float())


def normalised(
    advantage_PG: Tensor, scored_PG: Tensor, clip: float = 1.0, scale: Scale = "group"
) -> Tensor:
    """Ã = clip(A / σ, −clip, clip): log-probabilities have a wider range than rewards.

    Args:
        advantage_PG: `(P, G)`, finite.
        scored_PG: `(P, G)`, bool, the samples whose advantages σ is taken over.
        clip: > 0; ∞ for none.
        scale: σ is the deviation in the group, in the batch, or 1. The paper does not say which.

    Returns:
        `(P, G)`, without a unit, without gradient; exactly 0 where not scored. Neither the size nor
        the direction of the estimate survives in general: it is no longer unbiased.

    Source: arXiv:2503.19618, appendix B.2.
    """
    assert advantage_PG.dim() == 2 and advantage_PG.shape == scored_PG.shape, scored_PG.shape
    assert scored_PG.dtype == torch.bool and clip > 0, (scored_PG.dtype, clip)
    kept_PG = advantage_PG.detach().masked_fill(~scored_PG, 0.0)
    if scale != "none":
        rows = (1, -1) if scale == "batch" else kept_PG.shape
        deviation_P1 = _deviation(kept_PG.reshape(rows), scored_PG.reshape(rows))
        kept_PG = kept_PG / (deviation_P1 + MIN_DEVIATION)
    return kept_PG.clamp(-clip, clip)


def unsolved(rewards_PG: Tensor) -> Tensor:
    """Prompts of which no sample earned a reward: they learn from the bound, the others from RL.

    Args:
        rewards_PG: `(P, G)`, NaN where unscorable, which solves nothing.

    Returns:
        `(P,)`, bool.

    Source: arXiv:2503.19618, on data of which part can be verified.
    """
    assert rewards_PG.dim() == 2, rewards_PG.shape
    return ~(rewards_PG > 0).any(1)


def mean_probability_reward(
    token_logp_BT: Tensor, mask_BT: Tensor, baseline_B: Tensor | float = 0.0
) -> Tensor:
    """RLPR's reward: the mean probability of the answer's tokens, above what it is untold.

    r = clip(1/|a*| Σₜ π(a*ₜ|x, c, a*₍<t₎) − b, 0, 1)

    Args:
        token_logp_BT, mask_BT: as in `answer_logp`.
        baseline_B: b, the same mean without a thought, `(B,)`; 0 does not debias.

    Returns:
        `(B,)`, in [0, 1], in float32 at least; NaN for an empty answer. It is the probability of no
        event, and unlike `answer_logp` does not fall with the length of the answer.

    Source: arXiv:2506.18254.
    """
    assert token_logp_BT.dim() == 2 and token_logp_BT.shape == mask_BT.shape, mask_BT.shape
    dtype = torch.promote_types(token_logp_BT.dtype, torch.float32)
    in_answer_BT = mask_BT != 0
    p_BT = token_logp_BT.to(dtype).exp().masked_fill(~in_answer_BT, 0.0)
    return (p_BT.sum(1) / in_answer_BT.sum(1) - baseline_B).clamp(0.0, 1.0)


def bound_estimate(answer_logp_PM: Tensor, n: int, most_subsets: int = MOST_SUBSETS) -> Tensor:
    """Unbiased estimate of Lₙ from M ≥ n thoughts: log (1/n) Σ p, averaged over subsets of n.

    All C(M, n) subsets are visited where that many are allowed; then no other unbiased estimate of
    these samples varies less, and the estimate never falls in n. Of more, a fixed choice is
    visited that uses all samples alike. The log-mean-exp of all M estimates L_M, which is higher:
    bounds of different n are compared only through this.

    Args:
        answer_logp_PM: `(P, M)`, nats, finite.
        n: size of the subsets, in [1, M].
        most_subsets: number of subsets to visit, ≥ 1.

    Returns:
        `(P,)`, nats, ≤ log π(a*|x) in expectation; equal log p give exactly log p.
    """
    assert answer_logp_PM.dim() == 2, answer_logp_PM.shape
    M = answer_logp_PM.size(1)
    assert 1 <= n <= M, f"n={n} is outside [1, {M}]"
    subsets_Sn = _subsets(M, n, most_subsets).to(answer_logp_PM.device)
    least_P = answer_logp_PM.amin(1)
    above = [_log_mean_exp(row[subsets_Sn]).mean() for row in answer_logp_PM - least_P[:, None]]
    return least_P + torch.stack(above)


@functools.lru_cache(maxsize=32)
def _subsets(M: int, n: int, most: int) -> Tensor:
    """`(S, n)`, all subsets of n among M; of more than `most` those that permutations cut out."""
    if math.comb(M, n) <= most:
        return torch.tensor([*itertools.combinations(range(M), n)])
    disjoint = M // n
    generator = torch.Generator().manual_seed(0)
    permuted = torch.rand(-(-most // disjoint), M, generator=generator).argsort(1)
    return permuted[:, : disjoint * n].reshape(-1, n)


def _of_scored(
    rule: Callable[[Tensor], Tensor], answer_logp_PG: Tensor, min_samples: int = 1
) -> Tensor:
    assert answer_logp_PG.dim() == 2, answer_logp_PG.shape
    return credit_of_scorable(rule, answer_logp_PG.detach(), min_samples=min_samples)


def _assert_group(answer_logp_PG: Tensor) -> None:
    assert answer_logp_PG.dim() == 2 and answer_logp_PG.size(1) > 1, answer_logp_PG.shape


def _log_mean_exp(logp: Tensor) -> Tensor:
    """Over the last dimension; equal values give exactly that value, unlike logsumexp − log n."""
    most = logp.amax(-1, keepdim=True)
    return most.squeeze(-1) + (logp - most).exp().mean(-1).log()


def _others(logp: Tensor) -> Tensor:
    """`(P, m)` to `(P, m, m−1)`: for each sample the others."""
    m = logp.size(1)
    elsewhere_mm = ~torch.eye(m, dtype=torch.bool, device=logp.device)
    return logp[:, None].expand(-1, m, -1)[:, elsewhere_mm].view(-1, m, m - 1)


def _deviation(values: Tensor, counted: Tensor) -> Tensor:
    """Standard deviation of the counted values of each row, `(rows, 1)`; 0 with fewer than two."""
    n = counted.sum(1, keepdim=True)
    mean = (values * counted).sum(1, keepdim=True) / n.clamp(min=1)
    square = ((values - mean) * counted).square().sum(1, keepdim=True)
    return (square / (n - 1).clamp(min=1)).sqrt()
