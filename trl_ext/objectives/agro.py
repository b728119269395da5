"""AGRO: one loss for completions from anywhere, which is 0 in gradient at the optimum of the KL.

With the regularised reward R(y) = r(y) − β log π(y)/ref(y) of the policy of *now*, the optimum
π* ∝ ref · exp(r/β) is the only policy under which R does not depend on y. So AGRO minimises the
variance of R over the completions of a prompt, whoever wrote them:

    L = ½ Var_{y~μ} R(y),   ∇L = −β Cov_μ(R, ∇log π)

In the policy's logits that is a convex quadratic. At π* each group of samples has gradient 0, not
only the mean over groups. The baseline is part of the gradient here, not a way to less variance:
off policy E_μ ∇log π is not 0. Losses below have the gradient of L/β, so that a step has the size
of one of RLOO, which is what AGRO is on fresh samples.

Source: arXiv:2503.19612. Its formulas for groups are derived here and proved by enumeration.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from trl_ext.objectives.baselines import leave_one_out
from trl_ext.objectives.scorable import credit_of_scorable


def regularised_reward(
    rewards_PM: Tensor, logp_PM: Tensor, ref_logp_PM: Tensor, beta: float
) -> Tensor:
    """R = r − β (log π(y) − log ref(y)), the policy's share held fixed.

    Args:
        rewards_PM: `(P, M)`, NaN where unscorable.
        logp_PM, ref_logp_PM: `(P, M)`, nats, summed over tokens.
        beta: > 0.

    Returns:
        `(P, M)`, in the rewards' unit, without gradient.
    """
    assert rewards_PM.shape == logp_PM.shape == ref_logp_PM.shape, rewards_PM.shape
    assert beta > 0, beta
    return rewards_PM - beta * (logp_PM - ref_logp_PM).detach()


def agro_loss(returns_PM: Tensor, logp_PM: Tensor) -> Tensor:
    """AGRO with the law of the samples held fixed, which covers samples of any origin.

    loss = −(Rᵢ − 1/(M−1) Σ_{j≠i} Rⱼ) log π(yᵢ)

    Args:
        returns_PM: `(P, M)`, `regularised_reward`; M ≥ 2.
        logp_PM: `(P, M)`, nats, summed over tokens.

    Returns:
        `(P, M)`; the mean over M has −Cov_μ(R, ∇log π) as its expected gradient, exactly. Equal
        returns give exactly 0. With m < M scorable completions the loss is that among these, times
        M/m, and the others get 0.
    """
    return -_weight(_against_others, returns_PM, logp_PM) * logp_PM


def agro_full_loss(returns_PM: Tensor, logp_PM: Tensor, beta: float) -> Tensor:
    """AGRO on fresh samples, the law of the samples differentiated as well.

    loss = (M (U − U₋ᵢ)/β − (Rᵢ − 1/(M−1) Σ_{j≠i} Rⱼ)) log π(yᵢ)
    U = 1/(4n(n−1)) Σ_{i≠j} (Rᵢ − Rⱼ)² over n completions, half their unbiased variance

    Args:
        returns_PM, logp_PM: as in `agro_loss`, of samples of the policy itself.
        beta: > 0.

    Returns:
        `(P, M)`; the mean over M has 1/β · ∇ ½ Var_π(R) as its expected gradient, exactly. The term
        in U makes any completion less likely whose R is far from the mean, good ones included: it
        is a pull to the mean and no direction of improvement, and vanishes at π* as well.
    """
    assert beta > 0, beta

    def weight(returns: Tensor) -> Tensor:
        return _against_others(returns) - returns.size(1) * _spread_without(returns) / beta

    return -_weight(weight, returns_PM, logp_PM) * logp_PM


def copg_loss(rewards_PM: Tensor, logp_PM: Tensor, ref_logp_PM: Tensor, beta: float) -> Tensor:
    """Contrastive policy gradient: pairs of completions should differ in R by nothing.

    Σ over i of loss = 1/(4β (M−1)) Σ_{i≠j} (Rᵢ − Rⱼ)²,   R differentiated

    Args:
        rewards_PM, logp_PM, ref_logp_PM, beta: as in `regularised_reward`; M ≥ 2.

    Returns:
        `(P, M)`; the mean over M is Var(R) / 2β, unbiased, and its gradient that of the mean of
        `agro_loss`: the two papers agree, and this value tells how far π* is. Unscorable
        completions and equal returns as in `agro_loss`.

    Source: arXiv:2406.19185.
    """
    assert rewards_PM.shape == logp_PM.shape == ref_logp_PM.shape, rewards_PM.shape
    assert beta > 0, beta
    returns_PM = rewards_PM - beta * (logp_PM - ref_logp_PM)
    variance_PM = credit_of_scorable(_variance, returns_PM, min_samples=2)
    return variance_PM / (2 * beta) + 0 * logp_PM  # differentiable where there is no pair at all


def topr_loss(rewards_PM: Tensor, logp_PM: Tensor, old_logp_PM: Tensor) -> Tensor:
    """Tapered off-policy REINFORCE: negatives fade as the policy leaves them, positives do not.

    loss = −w r log π(y),   w = 1 for r ≥ 0,   w = min(π(y)/μ(y), 1) for r < 0, held fixed

    Args:
        rewards_PM: `(P, M)`, ±1 in the paper, NaN where unscorable; no baseline, and no KL.
        logp_PM: `(P, M)`, nats, summed over tokens.
        old_logp_PM: `(P, M)`, of μ, the policy that wrote the completion.

    Returns:
        `(P, M)`; 0 where unscorable. A reward of 0 teaches nothing. For π = μ it is REINFORCE.

    Source: arXiv:2503.14286.
    """
    assert rewards_PM.shape == logp_PM.shape == old_logp_PM.shape, rewards_PM.shape
    weight_PM = taper(rewards_PM, logp_PM, old_logp_PM) * rewards_PM
    return -weight_PM.nan_to_num() * logp_PM


def taper(rewards_PM: Tensor, logp_PM: Tensor, old_logp_PM: Tensor) -> Tensor:
    """w of `topr_loss`, of the same arguments: `(P, M)` in [0, 1], without gradient."""
    ratio_PM = (logp_PM - old_logp_PM).detach().clamp(max=0).exp()
    return torch.where(rewards_PM < 0, ratio_PM, 1.0)


def _weight(rule: Callable[[Tensor], Tensor], returns_PM: Tensor, logp_PM: Tensor) -> Tensor:
    assert returns_PM.dim() == 2 and returns_PM.size(1) > 1, returns_PM.shape
    assert returns_PM.shape == logp_PM.shape, logp_PM.shape
    return credit_of_scorable(rule, returns_PM.detach(), min_samples=2)


def _against_others(returns: Tensor) -> Tensor:
    return returns - leave_one_out(returns)


def _variance(returns: Tensor) -> Tensor:
    """`(P, n)`: the mean over n is the unbiased variance, exactly 0 for equal returns."""
    n = returns.size(1)
    return _against_others(returns).square() * (n - 1) / n


def _spread_without(returns: Tensor) -> Tensor:
    """U − U₋ᵢ, `(P, n)`; of a single sample U is 0."""
    n = returns.size(1)
    square = (returns.unsqueeze(2) - returns.unsqueeze(1)).square()
    total, own = square.sum((1, 2)).unsqueeze(1), square.sum(2)
    spread = total / (4 * n * (n - 1))
    return spread - (total - 2 * own) / (4 * (n - 1) * max(n - 2, 1))
