"""Token-aware phase attention (arXiv:2509.12635): a softmax whose scores turn with the distance.

Dropped from the paper: its general form with learned M and N, of which it trains the identity, and
bidirectional attention, which it does not try.
"""

import math

import torch
from torch import Tensor

from trl_ext.ops._choice import choose
from trl_ext.ops._shapes import make_layout, score_dtype
from trl_ext.ops.tapa import chunked, naive


def tapa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    amplitude_fraction: float,
    phase_alpha: float,
    phase: str = "quadratic",
    attention_mask: Tensor | None = None,
    document_ids: Tensor | None = None,
    query_offset: int | None = None,
    implementation: str | None = None,
) -> Tensor:
    """Causal attention with a phase in place of position embeddings.

    sᵢⱼ = (qᴬᵢ·kᴬⱼ)/√(θD) · cos(2π |i−j|ᵅ φᵢⱼ),   oᵢ = Σⱼ softmaxⱼ(sᵢⱼ) vⱼ   over visible j ≤ i
    φᵢⱼ = (qᴾᵢ·kᴾⱼ)/√((1−θ)D)   quadratic,   φᵢⱼ = Σ(qᴾᵢ + kᴾⱼ)/√((1−θ)D)   linear
    qᴬ: the first θD coordinates, qᴾ: the other (1−θ)D. No further scale and no rotation of q and k.

    Scores are computed in float32 at least, under autocast too: φ counts turns, and bf16 would
    misplace it by a good part of one. q and k should come in the best dtype at hand.

    Args:
        q: `(B, H, Tq, D)`.
        k, v: `(B, Hkv, Tk, D)` and `(B, Hkv, Tk, Dv)`; query head h uses key head h // (H / Hkv).
        amplitude_fraction: θ in (0, 1), with θD a whole number; 0.5 in the paper.
        phase_alpha: α > 0, the exponent of the distance; 0.1 in the paper.
        phase: `"quadratic"`, or `"linear"`, the paper's ablation (eq. 16).
        attention_mask: `(B, Tk)`, 1 on real keys, 0 on padding, on any side or between. Distances
            count real tokens, so padding changes nothing for them; None: no padding.
        document_ids: `(B, Tk)`, for packed rows: a run of equal numbers is one document, and sees
            only itself; from cumulated lengths (`cu_seqlens`) by
            `torch.bucketize(slots, cu_seqlens[1:], right=True)`. None: one document per row.
        query_offset: slot of the first query among the keys: how many were cached before. None: the
            queries are the last Tq of the Tk keys. Later keys, as of a static cache, are not seen.
            A single query may leave that to `attention_mask`: 0 on slots that are still empty.
        implementation: `"naive"`, dense, the reference; `"chunked"`, linear memory, any device;
            `"triton"`, fused, CUDA; None: `"triton"` on CUDA where it is installed, else
            `"chunked"`.

    Returns:
        `(B, H, Tq, Dv)` in the dtype of `v`. A query that sees no key gives exactly 0. A single
        visible key gives its value; qᴾ = 0 gives softmax attention without positions.

    Raises:
        ValueError: an argument does not fit, or the implementation cannot run here.

    Source: arXiv:2509.12635, eq. 11-13.
    """
    layout = make_layout(
        q,
        k,
        v,
        attention_mask=attention_mask,
        document_ids=document_ids,
        query_offset=query_offset,
    )
    amplitude_dim = _amplitude_dim(amplitude_fraction, q.size(3))
    _check_phase(phase, phase_alpha)
    scale = 1 / math.sqrt(q.size(3) - amplitude_dim)
    form = {"amplitude_dim": amplitude_dim, "phase_alpha": phase_alpha}
    chosen = choose(implementation, q, k, v)
    if chosen == "naive":
        return naive.tapa(q, k, v, layout, phase=phase, **form)
    if phase == "linear":
        q, k = _as_quadratic(q, k, amplitude_dim)
    if chosen == "chunked":
        return chunked.tapa(q, k, v, layout, phase_scale=scale, **form)
    from trl_ext.ops.tapa import triton

    return triton.tapa(q, k, v, layout, phase_scale=scale, **form)


def _amplitude_dim(fraction: float, width: int) -> int:
    # Not by `math.isfinite`, which no compiler takes of a fraction that is symbolic.
    amplitude_dim = round(fraction * width) if 0 < fraction < 1 else 0
    whole = abs(fraction * width - amplitude_dim) < 1e-6 * width
    if not (whole and 0 < amplitude_dim < width):
        raise ValueError(
            f"amplitude_fraction={fraction} of head width {width} does not split it into two parts:"
            " choose it so that amplitude_fraction times the width is a whole number from 1 to "
            f"{width - 1}, as 0.5 does for an even width."
        )
    return amplitude_dim


def _check_phase(phase: str, alpha: float) -> None:
    if phase not in ("quadratic", "linear"):
        raise ValueError(
            f"phase={phase!r} is not a phase of the paper: use 'quadratic', or 'linear' for its "
            "ablation."
        )
    if not 0 < alpha < math.inf:
        raise ValueError(
            f"phase_alpha={alpha} is no exponent of a distance that grows: use a positive number, "
            "0.1 as in the paper."
        )


def _as_quadratic(q: Tensor, k: Tensor, amplitude_dim: int) -> tuple[Tensor, Tensor]:
    """Writes the linear phase as an inner product: Σqᴾ + Σkᴾ = (Σqᴾ, 1)·(1, Σkᴾ)."""

    def widened(x: Tensor, sum_first: bool) -> Tensor:
        x = x.to(score_dtype(x))  # a sum of bf16 numbers is none
        total = x[..., amplitude_dim:].sum(-1, keepdim=True)
        pair = [total, torch.ones_like(total)]
        return torch.cat([x[..., :amplitude_dim], *(pair if sum_first else pair[::-1])], -1)

    return widened(q, True), widened(k, False)
