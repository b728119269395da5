"""MTPO: a preference game between whole conversations, credited turn by turn.

Two conversations of one context are compared when they are over. What a turn deserves is the whole
conversation's P(win), minus the KL from there on, minus what does not depend on the turn:

    Aₕ = P(y ≻ b) − 1/2 − α (log π/μ(yₕ|xₕ) + Σ_{h'>h} log b/μ(y_h'|x_h') − baseline)

b is the policy that sampled, and the opponent: π itself, an older π in a later pass over a round,
or in MTPO-τ the mixture π^{1−τ} μ^τ. P and the KL to come are b's, as in the paper's Q^{b,b}; only
the turn in question is π's. The win rates of a group of conversations average to exactly 1/2, so
that this baseline costs no sample. The opponent is held fixed: P(π ≻ π) is 1/2 whatever π, and has
no gradient. It plays from the first turn on, never from the turn in question. Dropped: the critic,
for whose values the constant 1/2 and the group's KL stand in, and the proximity to the last policy,
as in the paper's own deep variant.

Source: arXiv:2405.14655.
"""

import torch
from torch import Tensor

from trl_ext.objectives.kl import kl_to_go
from trl_ext.objectives.segments import on_tokens, segment_sums
from trl_ext.objectives.sequence_policy import proximal_loss


def turn_advantages(
    credit_PG: Tensor,
    log_ratio_PGH: Tensor,
    alpha: float,
    *,
    sampled_log_ratio_PGH: Tensor | None = None,
    include_own: bool = True,
    baseline: bool = True,
) -> Tensor:
    """Advantage of each turn, from the credit of its conversation and the KL from there on.

    A_ih = credit_i − α (κ_ih − 1/(m−1) Σ_{j≠i} κ_jh)
    κ_h = log π/μ(y_h|x_h) + Σ_{h'>h} log b/μ(y_h'|x_h')

    Args:
        credit_PG: `(P, G)`, with its baseline subtracted: `win_credit`, or RLOO's for a reward.
            NaN where a conversation could not be judged: the m others of its group behave as if it
            had never been drawn. With a baseline m is 0 or at least 2.
        log_ratio_PGH: `(P, G, H)`, log π/μ, nats, summed over the tokens of the policy's own turn;
            0 behind the last turn.
        alpha: weight of the KL to the reference μ, ≥ 0.
        sampled_log_ratio_PGH: log b/μ of the policy b that sampled; None: π itself.
        include_own: False leaves out the turn's own log-ratio, for a loss that differentiates
            KL(π‖μ) at the turn itself.
        baseline: False leaves out the mean of the others' κ. With m₁ and v mean and variance of κ,
            it lowers the variance where m₁² > v/(m−1), and adds noise near the reference.

    Returns:
        `(P, G, H)`, without gradient; 0 where not judged. A ∇log π(y_h|x_h), summed over turns and
        averaged over rows, estimates the gradient of E[credit] − α E Σ_h KL(π‖μ)[x_h] exactly.

    Source: arXiv:2405.14655, Lemma 3.1.
    """
    assert log_ratio_PGH.dim() == 3 and alpha >= 0, (log_ratio_PGH.shape, alpha)
    assert credit_PG.shape == log_ratio_PGH.shape[:2], credit_PG.shape
    sampled = log_ratio_PGH if sampled_log_ratio_PGH is None else sampled_log_ratio_PGH
    assert sampled.shape == log_ratio_PGH.shape, sampled.shape
    judged_PG = ~credit_PG.isnan()
    to_go_PGH = kl_to_go(sampled.detach(), include_own=False)
    if include_own:
        to_go_PGH = to_go_PGH + log_ratio_PGH.detach()
    if baseline:
        to_go_PGH = to_go_PGH - _mean_of_judged_others(to_go_PGH, judged_PG)
    advantage_PGH = credit_PG.detach()[..., None] - alpha * to_go_PGH
    return advantage_PGH.masked_fill(~judged_PG[..., None], 0.0)


def turn_policy_loss(
    logp_PGH: Tensor,
    old_logp_PGH: Tensor,
    sampled_logp_PGH: Tensor,
    advantage_PGH: Tensor,
    epsilon: float,
) -> Tensor:
    """PPO's surrogate with a turn for an action, also on conversations that a mixture led.

    loss_h = −π_old/b(y_h) · min(w A_h, clip(w, 1−ε, 1+ε) A_h),   w = π/π_old(y_h)

    Args:
        logp_PGH, old_logp_PGH: `(P, G, H)`, nats, summed over the tokens of a turn: of π, and of
            the policy at which the round began.
        sampled_logp_PGH: of b that sampled: that policy itself, or its mixture with the reference.
        advantage_PGH: `(P, G, H)`, held fixed.
        epsilon: in (0, 1).

    Returns:
        `(P, G, H)`. Inside the clip the gradient is −π/b A ∇log π. With `turn_advantages`, summed
        over turns and averaged over samples of b, it is that of what a mirror step climbs:
        E_{x~b} Σ_h [Q^{b,b}(x_h, π) − α KL(π‖μ)[x_h]], in the states that b visits. At π = b it
        is the gradient of the regularised game.

    Source: arXiv:2405.14655; a weight outside the clip: arXiv:2110.00641.
    """
    loss_PN = proximal_loss(
        logp_PGH.flatten(1), old_logp_PGH.flatten(1), advantage_PGH.flatten(1), epsilon
    )
    loss_PGH = loss_PN.view_as(logp_PGH)
    return loss_PGH * torch.exp(old_logp_PGH - sampled_logp_PGH).detach()


def turn_kl_loss(
    vocab_kl_BT: Tensor, logp_BT: Tensor, sampled_logp_BT: Tensor, turn_BT: Tensor
) -> Tensor:
    """KL(π‖μ)[x_h] of each turn from full next-token laws: the least variance.

    lossₜ = KLₜ · Πₛ π/b(yₛ) over the tokens s < t of the same turn

    Args:
        vocab_kl_BT: `(B, T)`, KL of the next-token laws, differentiable, nats.
        logp_BT, sampled_logp_BT: `(B, T)`, nats: of π, and of b that sampled.
        turn_BT: `(B, T)`, from `runs`.

    Returns:
        `(B, T)`, 0 on others' tokens. Its sum estimates Σ_h KL(π‖μ)[x_h] in the states that b
        visits, in value and gradient; for a loss with `include_own=False`.
    """
    own_BT = turn_BT >= 0
    log_ratio_BT = (logp_BT - sampled_logp_BT.detach()).masked_fill(~own_BT, 0.0)
    by_turn_BH = segment_sums(log_ratio_BT, turn_BT, max(int(turn_BT.max()) + 1, 1))
    earlier_turns_BT = on_tokens(by_turn_BH.cumsum(1) - by_turn_BH, turn_BT)
    before_BT = log_ratio_BT.cumsum(1) - log_ratio_BT - earlier_turns_BT
    return (before_BT.exp() * vocab_kl_BT).masked_fill(~own_BT, 0.0)


def win_credit(win_PG: Tensor) -> Tensor:
    """rᵢ − 1/2: what a conversation wins above a draw, which is what the policy wins on average.

    Args:
        win_PG: `(P, G)`, win rate against the other conversations of the context, in [0, 1]; NaN
            where not judged. For two conversations P(1 ≻ 2) and 1 − P(1 ≻ 2).

    Returns:
        `(P, G)`, without gradient. A group judged in full has mean exactly 0; the group mean of
        (rᵢ − 1/2) ∇log π(yᵢ) estimates ∇P(π ≻ sg π) without bias, where RLOO's baseline would
        multiply it by G/(G−1).
    """
    assert win_PG.dim() == 2, win_PG.shape
    return win_PG.detach() - 0.5


def mirror_step(
    logp_A: Tensor, ref_logp_A: Tensor, q_A: Tensor | float, alpha: float, eta: float
) -> Tensor:
    """One step of tabular MTPO in one state, and with q = 0 the opponent of MTPO-τ.

    π′(y) ∝ μ(y)^{αη} π(y)^{1−αη} exp(η Q(y))

    Args:
        logp_A, ref_logp_A: `(..., A)`, log π and log μ over actions, nats.
        q_A: `(..., A)`, Q of π against itself for MTPO; of the geometric mixture of π and μ, which
            this function gives at q = 0, against itself for MTPO-τ; of a reward for multi-turn
            RLHF. A constant changes nothing.
        alpha: weight of the KL, > 0.
        eta: step size, > 0, αη ≤ 1; 2/(α(t+2)) at step t = 0, 1, … has the paper's rate.

    Returns:
        `(..., A)`, nats, normalised. At αη = 1 it is the best answer μ · exp(Q/α), and equals π
        exactly where π is the Nash equilibrium.

    Source: arXiv:2405.14655.
    """
    assert logp_A.shape == ref_logp_A.shape, (logp_A.shape, ref_logp_A.shape)
    assert alpha > 0 and 0 < eta * alpha <= 1, (alpha, eta)
    share = alpha * eta
    return ((1 - share) * logp_A + share * ref_logp_A + eta * q_A).log_softmax(-1)


def _mean_of_judged_others(values_PGH: Tensor, judged_PG: Tensor) -> Tensor:
    judged_PG1 = judged_PG[..., None].to(values_PGH.dtype)
    # Equal values must leave exactly 0: a sum of zeros is exact.
    floor_P1H = values_PGH.amin(1, keepdim=True)
    above_PGH = (values_PGH - floor_P1H) * judged_PG1
    others_PG1 = (judged_PG1.sum(1, keepdim=True) - judged_PG1).clamp(min=1)
    return floor_P1H + (above_PGH.sum(1, keepdim=True) - above_PGH) / others_PG1
