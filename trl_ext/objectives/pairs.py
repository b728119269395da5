"""Losses of a pair of completions: the DPO family, pair by pair and not reduced.

With ρ(y) = log π(y) − log ref(y), summed over the completion's tokens, a pair of a chosen y_w and a
rejected y_l has Δ = ρ(y_w) − ρ(y_l) and the margin m = βΔ. f-DPO has another margin
(`f_divergence`), INPO another reference (`nash.mixed_reference`), and both keep these losses.
Dropped: averages over tokens, which turn Δ into another quantity.

Sources: arXiv:2305.18290 (DPO), arXiv:2402.04792 (its online form), and those named below.
"""

from collections.abc import Callable

from torch import Tensor
from torch.nn.functional import logsigmoid


def sigmoid_loss(margin_PN: Tensor) -> Tensor:
    """DPO's negative log-likelihood of the label under Bradley–Terry.

    loss = −log σ(m)

    Args:
        margin_PN: `(P, N)`, m = βΔ.

    Returns:
        `(P, N)`, > 0; log 2 at m = 0. Its slope in m is −σ(−m).

    Source: arXiv:2305.18290, equation 7.
    """
    assert margin_PN.dim() == 2, margin_PN.shape
    return -logsigmoid(margin_PN)


def hinge_loss(margin_PN: Tensor) -> Tensor:
    """SLiC's hinge: pairs with a margin of 1 or more are left alone.

    loss = max(0, 1 − m)

    Args:
        margin_PN: `(P, N)`, m = βΔ.

    Returns:
        `(P, N)`, ≥ 0; exactly 0, with gradient 0, from m = 1 on.

    Source: arXiv:2305.10425, with the log-ratio of arXiv:2309.06657.
    """
    assert margin_PN.dim() == 2, margin_PN.shape
    return (1 - margin_PN).relu()


def ipo_loss(delta_PN: Tensor, beta: float, normalised: bool = False) -> Tensor:
    """IPO's regression of Δ onto the constant 1/(2β).

    loss = (Δ − 1/(2β))²,   normalised: (βΔ − 1/2)² = β² (Δ − 1/(2β))²

    Args:
        delta_PN: `(P, N)`, Δ, *not* multiplied by β; log-probabilities summed over tokens.
        beta: > 0.
        normalised: take the form of arXiv:2405.08448, smaller by β² in value and gradient.

    Returns:
        `(P, N)`, ≥ 0. Unlike the sigmoid it pulls back margins that are too large.

    Source: arXiv:2310.12036, equation 17.
    """
    assert delta_PN.dim() == 2 and beta > 0, (delta_PN.shape, beta)
    if normalised:
        return (beta * delta_PN - 0.5).square()
    return (delta_PN - 1 / (2 * beta)).square()


def robust_loss(margin_PN: Tensor, label_smoothing: float) -> Tensor:
    """Robust DPO: unbiased for the loss of the clean labels if a share ε of them is flipped.

    loss = [(1−ε) f(m) − ε f(−m)] / (1−2ε),   f(m) = −log σ(m)

    Args:
        margin_PN: `(P, N)`, m = βΔ.
        label_smoothing: ε, chance that a label was flipped, in [0, 1/2).

    Returns:
        `(P, N)`, unbounded below; ε = 0 is `sigmoid_loss`.

    Source: arXiv:2403.00409. The conservative form, which adds ε f(−m), is
    `labelled(sigmoid_loss, margin_PN, label_PN)` with labels 1 − ε.
    """
    assert 0 <= label_smoothing < 0.5, f"label_smoothing={label_smoothing} is outside [0, 1/2)"
    kept_PN = (1 - label_smoothing) * sigmoid_loss(margin_PN)
    flipped_PN = label_smoothing * sigmoid_loss(-margin_PN)
    return (kept_PN - flipped_PN) / (1 - 2 * label_smoothing)


def labelled(loss: Callable[[Tensor], Tensor], argument_PN: Tensor, label_PN: Tensor) -> Tensor:
    """Expectation of a pair loss over a label that is only a probability.

    loss = p f(x) + (1 − p) f(−x),   p = P(chosen ≻ rejected)

    Args:
        loss: f, elementwise, of an x that changes sign when the pair is swapped.
        argument_PN: `(P, N)`, x: a margin, or Δ.
        label_PN: `(P, N)`, p in [0, 1]; held fixed.

    Returns:
        `(P, N)`; p = 1 is f(x). With p = 1/2 and IPO it is Δ² up to a constant: an undecided pair
        still pulls the policy towards the reference.
    """
    assert argument_PN.shape == label_PN.shape, (argument_PN.shape, label_PN.shape)
    label_PN = label_PN.detach()
    return label_PN * loss(argument_PN) + (1 - label_PN) * loss(-argument_PN)


def rpo_loss(margin_PN: Tensor, chosen_logp_PN: Tensor, beta: float, eta: float) -> Tensor:
    """RPO: DPO with the chosen completion's likelihood as a guard against over-optimisation.

    loss = −log σ(m) − ηβ log π(y_w)

    Args:
        margin_PN: `(P, N)`, m = βΔ.
        chosen_logp_PN: `(P, N)`, log π(y_w) in nats, *summed* over tokens.
        beta: > 0.
        eta: weight of the likelihood relative to β, ≥ 0.

    Returns:
        `(P, N)`; η = 0 is `sigmoid_loss`.

    Source: arXiv:2405.16436, the main form; its variant averages over tokens.
    """
    assert margin_PN.shape == chosen_logp_PN.shape, (margin_PN.shape, chosen_logp_PN.shape)
    assert beta > 0 and eta >= 0, (beta, eta)
    return sigmoid_loss(margin_PN) - eta * beta * chosen_logp_PN


def exploration_bonus(reference_sample_logp: Tensor, alpha: float) -> Tensor:
    """XPO's addition to DPO: moves probability away from what the reference would have said.

    loss = −log σ(m) + α log π(ỹ),   y ~ π,  ỹ ~ ref

    Args:
        reference_sample_logp: log π(ỹ) in nats, summed over tokens: the policy's log-probability
            of the *reference's* sample, whichever side won, and also where none did.
        alpha: strength of the bonus, ≥ 0.

    Returns:
        α log π(ỹ), same shape. Its expected gradient is −α ∇KL(ref‖π): it raises that KL.

    Source: arXiv:2405.21046, algorithm 1.
    """
    assert alpha >= 0, alpha
    return alpha * reference_sample_logp


def best_of_k_sft_loss(chosen_logp_PN: Tensor) -> Tensor:
    """Likelihood of the best of the K samples: the control without contrast and reference.

    loss = −log π(y_w)

    Args:
        chosen_logp_PN: `(P, N)`, nats, summed over tokens.

    Returns:
        `(P, N)`, ≥ 0.

    Source: arXiv:2410.18252, best-of-2 fine-tuning.
    """
    assert chosen_logp_PN.dim() == 2, chosen_logp_PN.shape
    return -chosen_logp_PN
