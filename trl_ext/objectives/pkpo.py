"""PKPO: the expected best of k samples and its gradient, from any n ≥ k samples (n is G here).

The paper sums sorted rewards against binomials. Here the same sums run over the *gaps* between
neighbouring rewards: the best of a subset is the best of the group, minus the gaps above it. The
coefficients are then probabilities, no large number is ever subtracted from another, and a group
of equal rewards, whose gaps are 0, gets an exact 0 from what is zero in theory. Dropped: the loop
over telescoped products (`math.comb` is exact), and k = 1 with the baseline "loo_minus_one", which
the paper leaves without a baseline (`pass_at_k_credit` takes leave-one-out there).

Source: arXiv:2505.15201.
"""

import math
from typing import Literal

import torch
from torch import Tensor

Baseline = Literal["none", "loo", "loo_minus_one"]


def max_at_k(rewards_PG: Tensor, k: int) -> Tensor:
    """Unbiased estimate of the expected best reward of k samples; of pass@k if rewards are 0 or 1.

    ρ(n,k) = 1/C(n,k) Σ_I max_{i∈I} rᵢ                       I: the subsets of size k
           = rₙ − Σ_{m≥2} (rₘ − rₘ₋₁) C(m−1,k)/C(n,k),         r₁ ≤ … ≤ rₙ

    Args:
        rewards_PG: `(P, G)`, finite; n = G.
        k: samples of which the best counts, in [1, G].

    Returns:
        `(P,)`, in the rewards' unit, without gradient. Equal rewards give exactly that reward.

    Source: arXiv:2505.15201, the value estimator ρ; for 0/1 rewards arXiv:2107.03374, equation 1.
    """
    assert rewards_PG.dim() == 2 and rewards_PG.is_floating_point(), rewards_PG
    n = rewards_PG.size(1)
    assert 1 <= k <= n, f"k={k} is outside [1, {n}]"
    sorted_PG, _ = _sort(rewards_PG)
    below = [chance_within(m - 1, n, k) for m in range(2, n + 1)]
    return (sorted_PG[:, -1] - sorted_PG.diff(dim=1) @ _double(below)).to(rewards_PG)


def pkpo_credit(rewards_PG: Tensor, k: int, baseline: Baseline = "none") -> Tensor:
    """Credit whose group mean of Aᵢ ∇log π(yᵢ) estimates ∇E[max of k rewards] without bias.

    "none":           Aᵢ = G · sᵢ,   sᵢ = 1/C(n,k) Σ_{I∋i} max_{j∈I} rⱼ
    "loo":            Aᵢ = G · (sᵢ − k/(n−1) · ρ(others of i, k))
    "loo_minus_one":  Aᵢ = G · (sᵢ − k/n · ρ(others of i, k−1))
                         = G/C(n,k) Σ_{I∋i} [max_I − max_{I∖i}]

    Args:
        rewards_PG: `(P, G)`, finite; n = G.
        k: in [1, G] for "none", [1, G − 1] for "loo", [2, G] for "loo_minus_one".
        baseline: what is subtracted; all three estimate the same gradient.

    Returns:
        `(P, G)`, in the rewards' unit, without gradient; the factor G is included.

    Equal rewards c give k·c, −k·c/(n−1) and exactly 0: the paper's "loo" vanishes only if all
    rewards are 0. Source: arXiv:2505.15201, s, s^(loo) and s^(loo-1).
    """
    assert rewards_PG.dim() == 2 and rewards_PG.is_floating_point(), rewards_PG
    n = rewards_PG.size(1)
    least, most = {"none": (1, n), "loo": (1, n - 1), "loo_minus_one": (2, n)}[baseline]
    assert least <= k <= most, f"k={k} is outside [{least}, {most}] for baseline={baseline!r}"
    if baseline == "loo_minus_one":
        share = [k * chance_within(m - 1, n - 1, k - 1) for m in range(2, n + 1)]
        return weigh_gaps(rewards_PG, reached=share, missed=[0.0] * (n - 1)).to(rewards_PG)
    best_P1 = _sort(rewards_PG)[0][:, -1:]
    below = [chance_within(m - 2, n - 1, k - 1) for m in range(2, n + 1)]
    s_PG = k * (best_P1 - weigh_gaps(rewards_PG, reached=[0.0] * (n - 1), missed=below))
    if baseline == "loo":
        s_PG = s_PG - k * n / (n - 1) * (best_P1 - _gaps_above_others(rewards_PG, k))
    return s_PG.to(rewards_PG)


def weigh_gaps(rewards_PG: Tensor, reached: list[float], missed: list[float]) -> Tensor:
    """Sums the gaps between sorted rewards, each weighted by the side on which a sample stands.

    cᵢ = Σ_{2≤m≤i} (rₘ − rₘ₋₁) uₘ + Σ_{m>i} (rₘ − rₘ₋₁) wₘ,   r₁ ≤ … ≤ rₙ

    Every average over subsets of a difference of maxima has this form.

    Args:
        rewards_PG: `(P, G)`, finite; n = G.
        reached: u₂ … uₙ, for gaps that end at or below the sample.
        missed: w₂ … wₙ, for gaps above it.

    Returns:
        `(P, G)` in the samples' own order, float64 on the CPU, without gradient. Equal rewards give
        exactly 0, and tied samples the same value.
    """
    assert rewards_PG.dim() == 2 and rewards_PG.is_floating_point(), rewards_PG
    G = rewards_PG.size(1)
    sorted_PG, order_PG = _sort(rewards_PG)
    gap, sample = torch.arange(1, G).unsqueeze(1), torch.arange(G)
    weight_gG = torch.where(gap <= sample, _double(reached)[:, None], _double(missed)[:, None])
    credit_PG = sorted_PG.diff(dim=1) @ weight_gG
    return torch.empty_like(credit_PG).scatter_(1, order_PG, credit_PG)


def chance_within(part: int, whole: int, k: int) -> float:
    """Chance that k of `whole` samples, drawn without replacement, all fall in a given `part`.

    C(part,k)/C(whole,k): a ratio of exact integers, rounded once, however large they are.
    """
    return math.comb(part, k) / math.comb(whole, k)


def _gaps_above_others(rewards_PG: Tensor, k: int) -> Tensor:
    """Best reward of the group minus ρ(others of i, k), `(P, G)`."""
    n = rewards_PG.size(1)
    ranks = range(2, n + 1)
    reached = [chance_within(m - 1, n - 1, k) for m in ranks]
    missed = [chance_within(m - 2, n - 1, k) for m in ranks]
    return weigh_gaps(rewards_PG, reached, missed)


def _sort(rewards_PG: Tensor) -> tuple[Tensor, Tensor]:
    # On the CPU, since Apple's GPUs have no float64 and the table is small for any device.
    return rewards_PG.detach().to("cpu", torch.float64).sort(dim=1)


def _double(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)
