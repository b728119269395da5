"""Learning in a preference game: no reward, only P(y ≻ y′), which need not be transitive.

What a completion is worth depends on its opponent: a sample of the policy itself (SPO), of a
mixture with the reference (Nash-MD), of a half-step policy (Nash-MP), or of the last iterate (INPO,
DNO). Every advantage is per *sequence*, and so is the log-ratio ρ in it: multiplying each token's
log-probability by that token's log-ratio only, as TRL once did for Nash-MD, is not the gradient of
the KL. Dropped: the tabular mirror steps, which need the whole policy in a table.
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def nash_md_advantage(win_PM: Tensor, log_ratio_PM: Tensor, tau: float) -> Tensor:
    """Nash-MD: what a completion wins against the mixture, minus its log-ratio.

    A = P(y ≻ y′) − 1/2 − τρ(y),   y ~ π,  y′ ~ π^(1−c) ref^c, normalised token by token

    Args:
        win_PM: `(P, M)`, P(y ≻ y′) in [0, 1], NaN where not judged.
        log_ratio_PM: `(P, M)`, ρ = log π(y) − log ref(y), nats, summed over the sequence.
        tau: weight of the KL, ≥ 0.

    Returns:
        `(P, M)`, without gradient; 0 where not judged. A ∇log π(y) estimates the gradient exactly,
        regulariser included. With the win rates of a group of samples in place of P it is SPO's.

    Source: arXiv:2312.00886, section 7.
    """
    assert tau >= 0, tau
    _assert_alike(win_PM, log_ratio_PM)
    return _win_above(win_PM, tau * log_ratio_PM)


def nash_mp_advantage(
    win_PM: Tensor, log_ratio_PM: Tensor, target_log_ratio_PM: Tensor, beta: float, eta: float
) -> Tensor:
    """Nash Mirror Prox: Nash-MD's advantage with a second pull, to where the step started.

    A = P(y ≻ y′) − 1/2 − βρ(y) − (β/η) (log π(y) − log π_target(y)),   y′ ~ the half-step policy

    Args:
        win_PM, log_ratio_PM: as in `nash_md_advantage`.
        target_log_ratio_PM: `(P, M)`, log π(y) − log π_target(y), nats, summed over the sequence.
        beta: weight of the KL to the reference, ≥ 0.
        eta: step size, > 0; 2β has the paper's rate, ∞ gives `nash_md_advantage`.

    Returns:
        `(P, M)`, without gradient; 0 where not judged.

    Source: arXiv:2505.19731; the form for language models is derived from its two steps.
    """
    assert beta >= 0 and eta > 0, (beta, eta)
    _assert_alike(win_PM, log_ratio_PM)
    _assert_alike(win_PM, target_log_ratio_PM)
    return _win_above(win_PM, beta * log_ratio_PM + (beta / eta) * target_log_ratio_PM)


def mixed_reference(ref_logp: Tensor, old_logp: Tensor, tau: float, eta: float) -> Tensor:
    """INPO's reference: with it in place of log ref, IPO at β = η is INPO's loss.

    (τ/η) log ref(y) + (1 − τ/η) log π_old(y)

    Args:
        ref_logp, old_logp: same shape, nats, summed over tokens; reference and last iterate.
        tau: weight of the KL to the reference, in [0, η].
        eta: weight of both KL terms together, > 0.

    Returns:
        The same shape, not normalised over responses (the constant cancels in Δ). τ = η is the
        reference, τ = 0 the last iterate.

    Source: arXiv:2407.00617, h_t of equation 7.
    """
    assert ref_logp.shape == old_logp.shape, (ref_logp.shape, old_logp.shape)
    assert eta > 0 and 0 <= tau <= eta, f"tau={tau} is outside [0, eta={eta}]"
    return (tau / eta) * ref_logp + (1 - tau / eta) * old_logp


def dno_loss(win_PM: Tensor, log_ratio_PM: Tensor, eta: float) -> Tensor:
    """DNO: regression of log-ratio differences onto win-rate differences, by cross-entropy.

    loss = −mean over i ≠ j of [σ(rᵢ − rⱼ) log σ(Dᵢⱼ) + σ(rⱼ − rᵢ) log σ(−Dᵢⱼ)]
    Dᵢⱼ = η (log π/π_old(yᵢ) − log π/π_old(yⱼ))

    Args:
        win_PM: `(P, M)`, rᵢ = P(yᵢ ≻ π_old) or its estimate, held fixed; NaN where not judged.
        log_ratio_PM: `(P, M)`, log π(y) − log π_old(y), nats, summed over tokens.
        eta: > 0.

    Returns:
        `(P,)`, the mean over pairs of judged completions; 0 with fewer than two of them. With
        samples of π_old it is least at π ∝ π_old exp(r/η).

    Source: arXiv:2404.03715, algorithm 1.
    """
    assert eta > 0, eta
    _assert_alike(win_PM, log_ratio_PM)
    judged_PM = ~win_PM.isnan()
    # Not left to the mask below: through it, a NaN would still reach the gradient.
    win_PM = win_PM.detach().masked_fill(~judged_PM, 0.0)
    label_PMM = torch.sigmoid(_differences(win_PM))
    margin_PMM = eta * _differences(log_ratio_PM)
    loss_PMM = -label_PMM * logsigmoid(margin_PMM) - (1 - label_PMM) * logsigmoid(-margin_PMM)
    itself_MM = torch.eye(win_PM.size(1), dtype=torch.bool, device=win_PM.device)
    counted_PMM = judged_PM[:, :, None] & judged_PM[:, None, :] & ~itself_MM
    return (loss_PMM * counted_PMM).sum((1, 2)) / counted_PMM.sum((1, 2)).clamp(min=1)


def _win_above(win_PM: Tensor, penalty_PM: Tensor) -> Tensor:
    """P(y ≻ y′) − 1/2 − penalty, without gradient, and 0 where not judged."""
    return (win_PM - 0.5 - penalty_PM).detach().masked_fill(win_PM.isnan(), 0.0)


def _assert_alike(win_PM: Tensor, values_PM: Tensor) -> None:
    assert win_PM.dim() == 2 and win_PM.shape == values_PM.shape, (win_PM.shape, values_PM.shape)


def _differences(values_PM: Tensor) -> Tensor:
    """xᵢ − xⱼ, `(P, M, M)`."""
    return values_PM[:, :, None] - values_PM[:, None, :]
