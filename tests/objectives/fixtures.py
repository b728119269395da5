"""Policies small enough that every expectation is a sum: the fixtures of the golden values.

A is one categorical policy over five responses, B one pair of completions token by token, C a
policy over the nine sequences of two symbols out of three. Float64 throughout.
"""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor


def f64(*values) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def assert_golden(actual: Tensor, expected: Tensor | float) -> None:
    """Equal to a stored value, which was printed with eight decimals."""
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-7)


A_REWARDS = f64(1.0, -0.5, 0.7, 0.2, -1.2)
A_LOGITS = f64(0.3, 0.9, -0.6, -0.4, 0.2)
A_REF_LOGITS = f64(0.5, -0.3, 0.8, -1.0, 0.1)
A_OLD_LOGITS = f64(-0.2, 0.6, 0.1, 0.4, -0.9)
A_POLICY, A_REF, A_OLD = (x.log_softmax(0) for x in (A_LOGITS, A_REF_LOGITS, A_OLD_LOGITS))
A_RHO = A_POLICY - A_REF
A_PREFERENCES = f64(
    [0.50, 0.70, 0.40, 0.60, 0.20],
    [0.30, 0.50, 0.80, 0.30, 0.55],
    [0.60, 0.20, 0.50, 0.65, 0.35],
    [0.40, 0.70, 0.35, 0.50, 0.90],
    [0.80, 0.45, 0.65, 0.10, 0.50],
)
A_NASH = {  # β: argmax of the game regularised towards the reference
    0.3: f64(0.22087071, 0.14608841, 0.31936084, 0.07407721, 0.23960284),
    0.4: f64(0.23196142, 0.13984361, 0.33249770, 0.06853947, 0.22715780),
}


def a_gradient(loss: Callable[[Tensor], Tensor], logits: Tensor = A_LOGITS) -> Tensor:
    """Gradient in the five logits of a loss of log π, `(5,)`."""
    logits = logits.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(logits.log_softmax(0)), logits)
    return gradient


def kl(logp: Tensor, other_logp: Tensor) -> Tensor:
    return (logp.exp() * (logp - other_logp)).sum()


B_TOKENS = torch.tensor([[0, 2, 1], [3, 1, 1]])  # chosen, rejected
B_LOGITS = f64(
    [[0.2, -0.4, 0.7, 0.0], [0.5, 0.1, -0.6, 0.3], [-0.2, 0.9, 0.4, -0.5]],
    [[0.3, 0.6, -0.1, -0.7], [-0.4, 0.2, 0.8, 0.1], [0.0, -0.3, 0.5, 0.6]],
)
B_REF_LOGITS = f64(
    [[0.0, 0.3, -0.2, 0.4], [-0.1, 0.6, 0.2, -0.5], [0.7, -0.4, 0.1, 0.0]],
    [[-0.5, 0.4, 0.2, 0.1], [0.3, 0.3, -0.9, 0.6], [0.1, 0.8, -0.2, -0.3]],
)


def b_token_logps(logits: Tensor) -> Tensor:
    """`(2, 3)`, log-probabilities of the chosen and of the rejected completion's tokens."""
    return logits.log_softmax(-1).gather(-1, B_TOKENS[..., None]).squeeze(-1)


C_SEQUENCES = torch.tensor(list(itertools.product(range(3), repeat=2)))
_PREFIX, _SYMBOL = torch.arange(4.0, dtype=torch.float64)[:, None], torch.arange(3.0)
# Row 0: the first symbol's logits; row 1 + s: the second symbol's after s.
C_LOGITS = 2 * torch.sin(1 + _PREFIX**2 + 2 * _SYMBOL)
C_REF_LOGITS = 2 * torch.cos(3 * _PREFIX + _SYMBOL**2)
C_KL = 2.51418555
C_KL_GRADIENT = f64(
    [0.35313402, -0.29570000, -0.05743403],
    [0.42368173, -0.08437608, -0.33930565],
    [-0.02106993, -0.10688890, 0.12795883],
    [0.00047790, 0.00036565, -0.00084355],
)


def c_laws(logits: Tensor) -> Tensor:
    """`(9, 2, 3)`, logits of both steps of each sequence."""
    return torch.stack([logits[0].expand(9, 3), logits[1 + C_SEQUENCES[:, 0]]], dim=1)


def c_token_logps(logits: Tensor) -> Tensor:
    """`(9, 2)`, log-probabilities of both tokens of each sequence."""
    return c_laws(logits).log_softmax(-1).gather(-1, C_SEQUENCES[..., None]).squeeze(-1)


def c_logps(logits: Tensor) -> Tensor:
    """`(9,)`, log-probability of each sequence."""
    return c_token_logps(logits).sum(1)


def c_gradient(loss: Callable[[Tensor], Tensor]) -> Tensor:
    """Gradient of a loss of the policy's logits, `(4, 3)`."""
    logits = C_LOGITS.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(logits), logits)
    return gradient


def geometric_mixture(logp_V: Tensor, ref_logp_V: Tensor, coefficient: float | Tensor) -> Tensor:
    """Nash-MD's opponent, token by token: the normalised geometric mean of policy and reference.

    log π_mix = (1 − c) log π + c log ref − log Z

    Args:
        logp_V, ref_logp_V: `(..., V)`, log-probabilities of the next token, nats; −∞ is allowed.
        coefficient: c in [0, 1], a number or a tensor that broadcasts against `(..., V)`.

    Returns:
        `(..., V)`, normalised. c = 0 is the policy and c = 1 the reference, whatever the other one
        excludes; in between, a token that either excludes is excluded.

    Source: arXiv:2312.00886, section 7.
    """
    assert logp_V.shape == ref_logp_V.shape, (logp_V.shape, ref_logp_V.shape)
    c = torch.as_tensor(coefficient, dtype=logp_V.dtype, device=logp_V.device)
    assert ((c >= 0) & (c <= 1)).all(), coefficient
    return (_scaled(logp_V, 1 - c) + _scaled(ref_logp_V, c)).log_softmax(-1)


def _scaled(logp_V: Tensor, weight: Tensor) -> Tensor:
    """weight · logp with 0 · −∞ = 0."""
    return torch.where(weight == 0, 0.0, weight * logp_V)
