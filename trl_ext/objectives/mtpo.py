"""MTPO: a preference game between whole conversations, credited turn by turn.

Two conversations of one context are compared when they are over. What a turn deserves is the whole
conversation's P(win), minus the KL that is still to come, minus what does not depend on the turn:

    Aₕ = P(y ≻ π) − 1/2 − α (Σ_{h'≥h} log π/μ(y_h'|x_h') − baseline)

The win rates of a group of conversations average to exactly 1/2, so that this baseline costs no
sample. The opponent is held fixed: P(π ≻ π) is 1/2 whatever π, and has no gradient. It plays from
the first turn on, never from the turn in question. Dropped: the critic, for whose values the
constant 1/2 and the group's KL stand in, and the proximity to the last policy, as in the paper's
own deep variant.

Source: arXiv:2405.14655.
"""

from torch import Tensor

from trl_ext.objectives.baselines import leave_one_out
from trl_ext.objectives.kl import kl_to_go


def turn_advantages(
    credit_PG: Tensor,
    log_ratio_PGH: Tensor,
    alpha: float,
    *,
    include_own: bool = True,
    baseline: bool = True,
) -> Tensor:
    """Advantage of each turn, from the credit of its conversation and the KL from there on.

    A_ih = credit_i − α (κ_ih − 1/(G−1) Σ_{j≠i} κ_jh),   κ_h = Σ_{h'≥h} (log π − log μ)(y_h'|x_h')

    Args:
        credit_PG: `(P, G)`, with its baseline subtracted: `win_credit`, or RLOO's for a reward.
            NaN where a conversation could not be judged; G ≥ 2 with a baseline.
        log_ratio_PGH: `(P, G, H)`, nats, summed over the tokens of the policy's own turn; 0 behind
            the last turn.
        alpha: weight of the KL to the reference μ, ≥ 0.
        include_own: False leaves out the turn's own log-ratio, for a loss that differentiates
            KL(π‖μ) at the turn itself.
        baseline: False leaves out the mean of the others' κ. With m and v mean and variance of κ,
            it lowers the variance where m² > v/(G−1), and adds noise near the reference.

    Returns:
        `(P, G, H)`, without gradient; 0 where not judged. A ∇log π(y_h|x_h), summed over turns and
        averaged over rows, estimates the gradient of E[credit] − α E Σ_h KL(π‖μ)[x_h] exactly.

    Source: arXiv:2405.14655, Lemma 3.1.
    """
    assert log_ratio_PGH.dim() == 3 and alpha >= 0, (log_ratio_PGH.shape, alpha)
    assert credit_PG.shape == log_ratio_PGH.shape[:2], credit_PG.shape
    to_go_PGH = kl_to_go(log_ratio_PGH.detach(), include_own=include_own)
    if baseline:
        to_go_PGH = to_go_PGH - _mean_of_others(to_go_PGH)
    advantage_PGH = credit_PG.detach()[..., None] - alpha * to_go_PGH
    return advantage_PGH.masked_fill(credit_PG.isnan()[..., None], 0.0)


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


def _mean_of_others(values_PGH: Tensor) -> Tensor:
    P, G, H = values_PGH.shape
    values_NG = values_PGH.transpose(1, 2).reshape(P * H, G)
    return leave_one_out(values_NG).view(P, H, G).transpose(1, 2)
