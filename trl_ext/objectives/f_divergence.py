"""f-DPO: DPO against a reference from which another divergence keeps the policy.

The margin β(f′(u_w) − f′(u_l)), u = π/ref, takes the place of βΔ; reverse KL gives βΔ itself. Each
f′ is shifted by a constant, which cancels in the margin, so that f′(1) = 0: then reverse KL is the
limit α → 0 of the α-divergence, and forward KL that of α → 1.

Source: arXiv:2309.16240.
"""

import math
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

Divergence = Literal["reverse_kl", "forward_kl", "js", "alpha"]

# Largest size of a score, e⁸⁰, is finite in float32 and bfloat16, and e¹¹ in float16.
LARGEST_EXPONENT = 80.0
LARGEST_EXPONENT_HALF = 11.0


def divergence_score(log_ratio: Tensor, divergence: Divergence, alpha: float = 0.5) -> Tensor:
    """Score of a completion under a divergence, f′(u) at u = π(y)/ref(y), with f′(1) = 0.

    reverse KL: log u      forward KL: 1 − 1/u
    JS: log(2u/(1+u))      α: (1 − u^−α)/α

    Args:
        log_ratio: any shape, log u in nats, summed over tokens.
        divergence: names f.
        alpha: the *paper's* α, in (0, 1), for "alpha" only. TRL's `f_alpha_divergence_coef` is
            1 − α; at 1/2 the two coincide.

    Returns:
        The shape of `log_ratio`, increasing in it. Forward KL and α fall exponentially as u → 0;
        at −e⁸⁰ (−e¹¹ in float16) they are cut off, value and gradient staying finite (the latter
        0): an overflow would turn the margin of two such completions into NaN.

    Source: arXiv:2309.16240, table 1.
    """
    assert divergence in get_args(Divergence), divergence
    if divergence == "reverse_kl":
        return log_ratio
    if divergence == "js":
        return math.log(2) + logsigmoid(log_ratio)
    if divergence == "forward_kl":
        alpha = 1.0
    else:
        assert 0 < alpha < 1, f"alpha={alpha} is outside (0, 1)"
    half = log_ratio.dtype == torch.float16
    limit = (LARGEST_EXPONENT_HALF if half else LARGEST_EXPONENT) + math.log(alpha)
    return -torch.expm1((-alpha * log_ratio).clamp(max=limit)) / alpha
