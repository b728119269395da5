"""Policy gradients on whole completions: the losses that pair losses are compared with.

One log-probability and one advantage per completion, `(P, M)`, nothing reduced. Advantages, and the
policy that sampled, are held fixed.

Source: arXiv:2410.18252 (RLOO and proximal RLOO on stale samples).
"""

import torch
from torch import Tensor

from trl_ext.objectives.baselines import leave_one_out
from trl_ext.objectives.scorable import credit_of_scorable


def leave_one_out_advantage(rewards_PM: Tensor) -> Tensor:
    """RLOO's advantage: a reward against the mean of the others.

    Aᵢ = rᵢ − 1/(M−1) Σ_{j≠i} rⱼ

    Args:
        rewards_PM: `(P, M)`, NaN where unscorable; M ≥ 2.

    Returns:
        `(P, M)`, in the rewards' unit, without gradient. Equal rewards give exactly 0. With m < M
        scorable completions it is the advantage among these, times M/m; the others get 0.

    Source: arXiv:2402.14740.
    """
    assert rewards_PM.dim() == 2 and rewards_PM.size(1) > 1, rewards_PM.shape
    return credit_of_scorable(lambda r: r - leave_one_out(r), rewards_PM.detach(), min_samples=2)


def reinforce_loss(logp_PM: Tensor, advantage_PM: Tensor) -> Tensor:
    """REINFORCE: loss = −A log π(y).

    Args:
        logp_PM: `(P, M)`, nats, summed over tokens.
        advantage_PM: `(P, M)`.

    Returns:
        `(P, M)`; gradient −A ∇log π(y), exact only for samples of the current policy.
    """
    assert logp_PM.dim() == 2 and logp_PM.shape == advantage_PM.shape, advantage_PM.shape
    return -advantage_PM.detach() * logp_PM


def importance_weighted_loss(logp_PM: Tensor, old_logp_PM: Tensor, advantage_PM: Tensor) -> Tensor:
    """REINFORCE on an older policy's samples, reweighted exactly.

    loss = −w A,   w = π(y)/π_old(y),   ∇ loss = −w A ∇log π(y)

    Args:
        logp_PM, old_logp_PM: `(P, M)`, nats, summed over tokens.
        advantage_PM: `(P, M)`.

    Returns:
        `(P, M)`; at w = 1 it has the gradient of `reinforce_loss`.
    """
    return -_ratio(logp_PM, old_logp_PM, advantage_PM) * advantage_PM.detach()


def proximal_loss(
    logp_PM: Tensor, old_logp_PM: Tensor, advantage_PM: Tensor, epsilon: float
) -> Tensor:
    """Proximal RLOO: PPO's clip with one ratio per completion.

    loss = −min(w A, clip(w, 1−ε, 1+ε) A),   w = π(y)/π_old(y)

    Args:
        logp_PM, old_logp_PM, advantage_PM: as in `importance_weighted_loss`.
        epsilon: in (0, 1).

    Returns:
        `(P, M)`; at w = 1 it has the gradient of `reinforce_loss`. Where the ratio has left the
        range in the direction of the advantage, the gradient is exactly 0.

    Source: arXiv:2410.18252, proximal RLOO.
    """
    assert 0 < epsilon < 1, f"epsilon={epsilon} is outside (0, 1)"
    ratio_PM, advantage_PM = _ratio(logp_PM, old_logp_PM, advantage_PM), advantage_PM.detach()
    clipped_PM = ratio_PM.clamp(1 - epsilon, 1 + epsilon)
    return -torch.minimum(ratio_PM * advantage_PM, clipped_PM * advantage_PM)


def effective_sample_size(log_ratio: Tensor) -> Tensor:
    """Number of fresh samples that the weighted ones are worth.

    n_eff = (Σ w)² / Σ w²,   w = exp(log_ratio)

    Args:
        log_ratio: any shape with n ≥ 1 entries, log π(y) − log π_old(y), nats.

    Returns:
        Scalar in [1, n], without gradient; n for equal weights. No ratio overflows.
    """
    assert log_ratio.numel() > 0, log_ratio.shape
    log_w = log_ratio.detach().flatten()
    return torch.exp(2 * log_w.logsumexp(0) - (2 * log_w).logsumexp(0))


def _ratio(logp_PM: Tensor, old_logp_PM: Tensor, advantage_PM: Tensor) -> Tensor:
    assert logp_PM.dim() == 2, logp_PM.shape
    assert logp_PM.shape == old_logp_PM.shape == advantage_PM.shape, advantage_PM.shape
    return torch.exp(logp_PM - old_logp_PM.detach())
