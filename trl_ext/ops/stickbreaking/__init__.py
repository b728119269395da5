"""Stick-breaking attention: a sigmoid share of what is left, from the nearest key backwards."""

import math

from torch import Tensor

from trl_ext.ops._choice import choose
from trl_ext.ops._shapes import make_layout
from trl_ext.ops.stickbreaking import chunked, naive


def stickbreaking_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    attend_current: bool = False,
    attention_mask: Tensor | None = None,
    document_ids: Tensor | None = None,
    query_offset: int | None = None,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Each key, from the nearest backwards, takes a sigmoid share of what is left of a stick.

    zᵢⱼ = scale · qᵢ·kⱼ,   βᵢⱼ = σ(zᵢⱼ)
    Aᵢⱼ = βᵢⱼ Π_{j<l<i} (1 − βᵢₗ),   oᵢ = Σ_{j<i} Aᵢⱼ vⱼ
    remᵢ = Π_{l<i} (1 − βᵢₗ) = 1 − Σ_{j<i} Aᵢⱼ

    The order of the keys is the only position there is. What becomes of the remainder is the
    caller's choice: the paper's later versions add rem · r with a learned r per head.

    Args:
        q: `(B, H, Tq, D)`.
        k, v: `(B, Hkv, Tk, D)` and `(B, Hkv, Tk, Dv)`; query head h uses head h // (H / Hkv).
        scale: factor of the logits; None: 1/√D.
        attend_current: let a query see its own key, so that j ≤ i and l ≤ i.
        attention_mask: `(B, Tk)`, bool or 0/1, 1 on real tokens; None: no padding.
        document_ids: `(B, Tk)`, integers; a run of equal numbers is one packed document; from
            cumulated lengths (`cu_seqlens`) by
            `torch.bucketize(slots, cu_seqlens[1:], right=True)`.
        query_offset: slot of the first query among the keys; None: Tk − Tq, so that the queries are
            the last of the cached keys. A single query may leave its place to `attention_mask`: 0
            on empty slots of a cache, and on its own unless `attend_current`.
        implementation: "naive" (dense), "chunked" (linear memory, any device) or "triton" (fused);
            None: "triton" for CUDA tensors where it can be had, otherwise "chunked".

    Returns:
        Output `(B, H, Tq, Dv)` and remainder `(B, H, Tq)`, in the dtype of `v`; sums are taken in
        float32 or better.

    Raises:
        ValueError: arguments do not fit together, or the implementation cannot be had.

    A query that sees no key has o = 0 and rem = 1. Source: arXiv:2410.17980.
    """
    layout = make_layout(
        q,
        k,
        v,
        attention_mask=attention_mask,
        document_ids=document_ids,
        query_offset=query_offset,
    )
    scale = 1 / math.sqrt(q.size(3)) if scale is None else scale
    if not math.isfinite(scale):
        raise ValueError(f"scale={scale} is no factor of logits: use a finite number, or None.")
    chosen = choose(implementation, q, k, v)
    if chosen == "naive":
        return naive.stickbreaking(q, k, v, layout, scale=scale, attend_current=attend_current)
    if chosen == "chunked":
        return chunked.stickbreaking(q, k, v, layout, scale=scale, attend_current=attend_current)
    from trl_ext.ops.stickbreaking import triton

    return triton.stickbreaking(q, k, v, layout, scale=scale, attend_current=attend_current)
