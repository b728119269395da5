"""TAPA as the paper prints it (arXiv:2509.12635, eq. 11-13): dense, O(T²), the reference."""

import math

import torch
from torch import Tensor

from trl_ext.ops._shapes import Layout, group_heads, score_dtype


def tapa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    *,
    amplitude_dim: int,
    phase_alpha: float,
    phase: str,
) -> Tensor:
    """softmaxⱼ(aᵢⱼ · cos(2π |i−j|ᵅ φᵢⱼ)) v, each query head on its own key head.

    Arguments and result as in `trl_ext.ops.tapa.tapa_attention`; `amplitude_dim` is θD.
    """
    dtype, kv_heads = score_dtype(q), k.size(1)
    rows, columns = range(q.size(2)), range(k.size(2))
    split = [amplitude_dim, q.size(3) - amplitude_dim]
    with torch.autocast(q.device.type, enabled=False):  # it would round φ to bf16
        qA, qP = group_heads(q.to(dtype), kv_heads).split(split, -1)
        kA, kP = k.to(dtype).unsqueeze(2).split(split, -1)
        a = qA @ kA.mT / math.sqrt(split[0])
        φ = qP @ kP.mT if phase == "quadratic" else qP.sum(-1, True) + kP.sum(-1, True).mT
        φ = φ / math.sqrt(split[1])
        distance = layout.distance(rows, columns, q.device).to(dtype)
        s = a * torch.cos(2 * math.pi * distance**phase_alpha * φ)
        if (visible := layout.visible(rows, columns, q.device)) is None:
            visible = torch.ones_like(s, dtype=torch.bool)
        # A row without a visible key gives 0: −∞ throughout would give NaN.
        p = s.masked_fill(~visible, torch.finfo(dtype).min).softmax(-1) * visible
        return (p @ v.to(dtype).unsqueeze(2)).flatten(1, 2).to(v.dtype)
