"""The reverse sequence KL and the gradients that carry its name.

Every loss here but the last is per token, `(B, T)`; summed over a completion and averaged over
rows it has the gradient that its docstring states. Values are those of the current policy,
detached, and enter through an importance ratio that is differentiated: a row sampled from an older
policy is therefore reweighted exactly, and a fresh one gets ratio 1. Dropped from the papers: k1 as
a loss (its gradient is 0) and k3 as a reward (the two directions cancel to first order).

Sources: arXiv:2506.09477 (the pitfalls), arXiv:2512.21852 (an independent check).
"""

import torch
from torch import Tensor

from trl_ext.objectives.baselines import leave_one_out


def k3(logp_BT: Tensor, ref_logp_BT: Tensor) -> Tensor:
    """Schulman's non-negative estimate of the KL from one sample, per token.

    k3 = ref/π − 1 − log ref/π,   E_π[k3] = KL(π‖ref)

    Args:
        logp_BT, ref_logp_BT: `(B, T)`, log-probabilities of the sampled tokens, in nats.

    Returns:
        `(B, T)`, nats, ≥ 0; 0 where both agree. Its *gradient* is that of KL(ref‖π).
    """
    log_u = ref_logp_BT - logp_BT
    return torch.exp(log_u) - log_u - 1


def prefix_ratio(logp_BT: Tensor, old_logp_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Importance ratio of each prefix, differentiable: w₁:ₜ = Πₛ≤ₜ π(yₛ)/π_old(yₛ).

    Args:
        logp_BT, old_logp_BT: `(B, T)`, nats.
        mask_BT: `(B, T)`, 1 on tokens that the policy sampled.

    Returns:
        `(B, T)`, positive; exactly 1 on policy. Tokens outside the mask leave it unchanged.
    """
    return torch.exp(((logp_BT - old_logp_BT.detach()) * mask_BT).cumsum(-1))


def sequence_kl_loss(
    logp_BT: Tensor, old_logp_BT: Tensor, ref_logp_BT: Tensor, mask_BT: Tensor
) -> Tensor:
    """Reverse sequence KL by reward-to-go: exact, and the cheapest exact form.

    lossₜ = w₁:ₜ · sg(lₜ),   lₜ = log π(yₜ) − log ref(yₜ)
    ∇ Σₜ lossₜ = Σₜ (Σₛ≥ₜ lₛ) ∇log π(yₜ)   on policy

    Args:
        logp_BT, old_logp_BT, ref_logp_BT: `(B, T)`, nats: current, sampling and reference policy.
        mask_BT: `(B, T)`, 1 on tokens that the policy sampled.

    Returns:
        `(B, T)`. Equal policy and reference give loss and gradient 0.

    Source: arXiv:2506.09477, sequence form.
    """
    log_ratio_BT = (logp_BT - ref_logp_BT).detach() * mask_BT
    return prefix_ratio(logp_BT, old_logp_BT, mask_BT) * log_ratio_BT


def sequence_total_kl_loss(
    logp_BT: Tensor, old_logp_BT: Tensor, ref_logp_BT: Tensor, mask_BT: Tensor
) -> Tensor:
    """Reverse sequence KL with the whole sequence's log-ratio on every token: exact, noisier.

    lossₜ = w₁:T · sg(lₜ),   ∇ Σₜ lossₜ = (Σₛ lₛ) Σₜ ∇log π(yₜ)   on policy

    This is a KL subtracted from the reward, sample by sample, and the gradient of ½(Σₜ lₜ)².
    Arguments and result as in `sequence_kl_loss`.
    """
    log_ratio_BT = (logp_BT - ref_logp_BT).detach() * mask_BT
    return prefix_ratio(logp_BT, old_logp_BT, mask_BT)[:, -1:] * log_ratio_BT


def vocab_kl(logits_BTV: Tensor, ref_logits_BTV: Tensor) -> Tensor:
    """Exact KL(π(·|prefix)‖ref(·|prefix)) of the next-token laws, differentiable.

    Args:
        logits_BTV, ref_logits_BTV: `(B, T, V)`, already divided by the temperature.

    Returns:
        `(B, T)`, nats, ≥ 0 up to rounding.
    """
    logp_BTV = logits_BTV.log_softmax(-1)
    log_ratio_BTV = logp_BTV - ref_logits_BTV.log_softmax(-1).detach()
    return (logp_BTV.exp() * log_ratio_BTV).sum(-1)


def sequence_vocab_kl_loss(
    vocab_kl_BT: Tensor, logp_BT: Tensor, old_logp_BT: Tensor, mask_BT: Tensor
) -> Tensor:
    """Reverse sequence KL from full next-token laws: exact, with the least variance.

    lossₜ = w₁:ₜ₋₁ · KLₜ,   ∇ Σₜ lossₜ = Σₜ [∇KLₜ + (Σₛ>ₜ sg(KLₛ)) ∇log π(yₜ)]   on policy

    Args:
        vocab_kl_BT: `(B, T)` from `vocab_kl`, differentiable, nats.
        logp_BT, old_logp_BT, mask_BT: as in `sequence_kl_loss`.

    Returns:
        `(B, T)`; its expected *value* is the KL itself.
    """
    ratio_BT = prefix_ratio(logp_BT, old_logp_BT, mask_BT)
    before_BT = torch.cat([torch.ones_like(ratio_BT[:, :1]), ratio_BT[:, :-1]], dim=1)
    return before_BT * vocab_kl_BT * mask_BT


def kl_to_go(log_ratio_BT: Tensor, *, include_own: bool = True) -> Tensor:
    """KL still to come at each token: Σₛ≥ₜ lₛ, or Σₛ>ₜ lₛ without the token's own term.

    Args:
        log_ratio_BT: `(B, T)`, masked log-ratios, nats.

    Returns:
        `(B, T)`, nats.
    """
    to_go_BT = log_ratio_BT.flip(-1).cumsum(-1).flip(-1)
    return to_go_BT if include_own else to_go_BT - log_ratio_BT


def kl_baseline_loss(
    baseline_BT: Tensor, logp_BT: Tensor, old_logp_BT: Tensor, mask_BT: Tensor
) -> Tensor:
    """What a baseline b on the KL-to-go subtracts: gradient −w₁:ₜ bₜ ∇log π(yₜ), expectation 0.

    Exact as long as bₜ depends on no token of its own completion; the other completions of the
    group qualify. It lowers the variance only where the KL is large: with m and v the mean and
    variance of the sequence log-ratio, where m² > v/(G−1); near the reference it *adds* noise.

    Args:
        baseline_BT: `(B, T)`, nats, without gradient.
        logp_BT, old_logp_BT, mask_BT: as in `sequence_kl_loss`.

    Returns:
        `(B, T)`, to be added to the loss.
    """
    ratio_BT = prefix_ratio(logp_BT.detach(), old_logp_BT, mask_BT)
    return -ratio_BT * baseline_BT.detach() * (logp_BT - logp_BT.detach()) * mask_BT


def leave_one_out_kl_loss(logp_PM: Tensor, ref_logp_PM: Tensor) -> Tensor:
    """Reverse sequence KL of unlabelled samples, each against the others of its prompt (HyPO).

    loss = 1/M Σᵢ (κᵢ − 1/(M−1) Σ_{j≠i} κⱼ) log π(yᵢ),   κ = sg(log π(y) − log ref(y))
    ∇ loss estimates ∇KL(π‖ref) without bias, for samples of π

    Args:
        logp_PM, ref_logp_PM: `(P, M)`, nats, summed over the *whole* completion; M ≥ 2.

    Returns:
        `(P,)`. Only the gradient means anything: the value is not the KL. Equal log-ratios, such as
        at π = ref, give gradient exactly 0.

    Source: arXiv:2406.01462, whose form it is; the estimator is RLOO's.
    """
    assert logp_PM.dim() == 2 and logp_PM.shape == ref_logp_PM.shape, ref_logp_PM.shape
    log_ratio_PM = (logp_PM - ref_logp_PM).detach()
    return ((log_ratio_PM - leave_one_out(log_ratio_PM)) * logp_PM).mean(1)
