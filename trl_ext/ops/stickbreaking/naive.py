"""Stick-breaking attention as printed (arXiv:2410.17980): dense, O(T²), the reference."""

import torch
import torch.nn.functional as F
from torch import Tensor

from trl_ext.ops._shapes import Layout, group_heads, score_dtype


def stickbreaking(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, *, scale: float, attend_current: bool
) -> tuple[Tensor, Tensor]:
    """Aᵢⱼ = exp(zᵢⱼ − Σ_{j≤l} softplus(zᵢₗ)), o = A v, remᵢ = exp(−Σₗ softplus(zᵢₗ)).

    A hidden key must take no share *and* leave the stick whole: z = −∞ does both.
    Arguments and result as in `trl_ext.ops.stickbreaking.stickbreaking_attention`.
    """
    dtype, kv_heads = score_dtype(q), k.size(1)
    rows, columns = range(q.size(2)), range(k.size(2))
    visible = layout.visible(rows, columns, q.device, strict=not attend_current)
    with torch.autocast(q.device.type, enabled=False):
        z = scale * group_heads(q.to(dtype), kv_heads) @ k.to(dtype).unsqueeze(2).mT
        if visible is not None:
            z = z.masked_fill(~visible, -torch.inf)
        softplus = -F.logsigmoid(-z)  # F.softplus drops log1p(exp(−z)) above z = 20
        A = (z - softplus.flip(-1).cumsum(-1).flip(-1)).exp()
        output, remainder = A @ v.to(dtype).unsqueeze(2), softplus.sum(-1).neg().exp()
    return output.flatten(1, 2).to(v.dtype), remainder.flatten(1, 2).to(v.dtype)
