"""TAPA with linear memory, in plain PyTorch for any device: online softmax over tiles.

Saved for the backward pass are q, k, v, the output and one log-sum-exp per query; scores exist for
one tile at a time, O(T·D + block²) in all. It is an operator of its own, so that a compiled model
calls it instead of unrolling its loops. The phase is reduced to the nearest turn before the cosine,
which is exact. With sᵢⱼ = a cos(wφ), w = 2π|i−j|ᵅ and Δᵢ = dOᵢ·oᵢ, the gradients are

    dsᵢⱼ = pᵢⱼ (dOᵢ·vⱼ − Δᵢ),   daᵢⱼ = dsᵢⱼ cos(wφᵢⱼ),   dφᵢⱼ = −dsᵢⱼ aᵢⱼ w sin(wφᵢⱼ)
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trl_ext.ops._shapes import Layout, group_heads, score_dtype

QUERY_BLOCK, KEY_BLOCK = 128, 256


def tapa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    *,
    amplitude_dim: int,
    phase_scale: float,
    phase_alpha: float,
    query_block: int = QUERY_BLOCK,
    key_block: int = KEY_BLOCK,
) -> Tensor:
    """Quadratic-phase TAPA, tile by tile.

    Args:
        q, k, v, layout: as `trl_ext.ops.tapa.tapa_attention` takes and checks them.
        amplitude_dim: coordinates of the amplitude, θD; the others are the phase's.
        phase_scale: φᵢⱼ = phase_scale · qᴾᵢ·kᴾⱼ.
        phase_alpha: exponent of the distance.
        query_block, key_block: largest tile; the result does not depend on it.

    Returns:
        `(B, H, Tq, Dv)`, in the dtype of `v`.
    """
    seen = (layout.query_offset, layout.first_key_BT, layout.real_BT)
    form = (amplitude_dim, phase_scale, phase_alpha, query_block, key_block)
    return _forward(q, k, v, *seen, *form)[0]


@dataclass
class _Tiling:
    """The queries and keys of a call in the precision of the scores, one block at a time.

    Heads that share a key head are stacked, so that a block of queries is `(B·Hkv, groups·m, D)`, a
    tile of scores `(B·Hkv, groups·m, n)`, and products with keys sum over the group by themselves.
    """

    layout: Layout
    sizes: tuple[int, int, int]  # B, Hkv, groups
    device: torch.device
    dtype: torch.dtype
    amplitude_dim: int
    phase_scale: float
    power_of_distance: Tensor  # (Tₖ + 1,), dᵅ

    @classmethod
    def of(
        cls, q: Tensor, k: Tensor, layout: Layout, amplitude_dim: int, scale: float, alpha: float
    ) -> "_Tiling":
        sizes, dtype = (k.size(0), k.size(1), q.size(1) // k.size(1)), score_dtype(q)
        # In float64 first: the error of a power is multiplied by the number of turns. Apple's MPS
        # has no float64.
        at = "cpu" if k.device.type == "mps" else k.device
        distances = torch.arange(k.size(2) + 1, dtype=torch.float64, device=at)
        power = distances.pow(alpha).to(dtype).to(k.device)
        return cls(layout, sizes, q.device, dtype, amplitude_dim, scale, power)

    def stacked(self, x: Tensor, rows: range) -> Tensor:
        """Queries `rows` of `(B, H, Tq, D)`, copied."""
        block = group_heads(x, self.sizes[1])[:, :, :, rows.start : rows.stop]
        return block.to(self.dtype, copy=True).flatten(2, 3).flatten(0, 1)

    def store(self, into: Tensor, rows: range, block: Tensor) -> None:
        """The reverse of `stacked`."""
        target = group_heads(into, self.sizes[1])[:, :, :, rows.start : rows.stop]
        target.copy_(block.view(target.shape))

    def scale(self, q: Tensor) -> Tensor:
        """A block of queries, or of their gradients, times the scale of each part; in place."""
        q[..., : self.amplitude_dim] *= 1 / math.sqrt(self.amplitude_dim)
        q[..., self.amplitude_dim :] *= self.phase_scale
        return q

    def keys(self, x: Tensor, columns: range) -> Tensor:
        """Keys or values `columns` of `(B·Hkv, Tk, D)`."""
        return x[:, columns.start : columns.stop].to(self.dtype)

    def per_head(self, tile: Tensor, rows: range) -> Tensor:
        """A view of a tile of scores, `(B, Hkv, groups, m, n)`, for what differs by row only."""
        return tile.view(*self.sizes, len(rows), tile.size(-1))

    def power(self, rows: range, columns: range) -> Tensor:
        """dᵅ, broadcasting against `per_head`."""
        return self.power_of_distance[self.layout.distance(rows, columns, self.device)]

    def amplitude_and_angle(
        self, q: Tensor, k: Tensor, rows: range, power: Tensor
    ) -> tuple[Tensor, Tensor]:
        """aᵢⱼ and 2π(u − round u), u = dᵅ φᵢⱼ, of a block of scaled queries and one of keys."""
        at = self.amplitude_dim
        turns = q[..., at:] @ k[..., at:].mT
        self.per_head(turns, rows).mul_(power)
        angle = turns.sub_(turns.round()).mul_(2 * math.pi)
        return q[..., :at] @ k[..., :at].mT, angle

    def hide(self, tile: Tensor, rows: range, columns: range, value: float) -> Tensor:
        """Puts `value` where the query does not see the key; in place."""
        visible = self.layout.visible(rows, columns, self.device)
        if visible is not None:
            self.per_head(tile, rows).masked_fill_(~visible, value)
        return tile


@torch.library.custom_op("trl_ext::tapa_chunked", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_offset: int,
    first_key_BT: Tensor | None,
    real_BT: Tensor | None,
    amplitude_dim: int,
    phase_scale: float,
    phase_alpha: float,
    query_block: int,
    key_block: int,
) -> tuple[Tensor, Tensor]:
    """Output `(B, H, Tq, Dv)` and log Σⱼ exp sᵢⱼ `(B, H, Tq)`, −∞ for a query that sees no key."""
    layout = Layout(query_offset, first_key_BT, real_BT)
    tiling = _Tiling.of(q, k, layout, amplitude_dim, phase_scale, phase_alpha)
    output, log_sum = _outputs(q, k, v)
    keys = k.flatten(0, 1), v.flatten(0, 1)
    with torch.autocast(q.device.type, enabled=False):  # it would round φ to bf16
        for rows, blocks in layout.tiles(q.size(2), query_block, key_block):
            o, lse = _rows(tiling, q, *keys, rows, blocks)
            tiling.store(output, rows, o)
            tiling.store(log_sum.unsqueeze(-1), rows, lse)
    return output, log_sum


@torch.library.register_fake("trl_ext::tapa_chunked")
def _outputs(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    output = v.new_empty(*q.shape[:3], v.size(3))
    return output, q.new_empty(q.shape[:3], dtype=score_dtype(q))


def _rows(
    tiling: _Tiling, q: Tensor, k: Tensor, v: Tensor, rows: range, blocks: list[range]
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of one block of queries."""
    query = tiling.scale(tiling.stacked(q, rows))
    highest = query.new_full((*query.shape[:2], 1), -math.inf)
    total, output = torch.zeros_like(highest), query.new_zeros(*query.shape[:2], v.size(-1))
    for columns in blocks:
        power = tiling.power(rows, columns)
        key = tiling.keys(k, columns)
        amplitude, angle = tiling.amplitude_and_angle(query, key, rows, power)
        score = tiling.hide(amplitude.mul_(angle.cos_()), rows, columns, -math.inf)
        new_highest = torch.maximum(highest, score.amax(-1, keepdim=True))
        # While a row has seen no key its maximum is −∞, and −∞ − (−∞) would be NaN.
        shift = new_highest.masked_fill(new_highest == -math.inf, 0)
        weight, decay = score.sub_(shift).exp_(), (highest - shift).exp_()
        total = total * decay + weight.sum(-1, keepdim=True)
        output.mul_(decay).baddbmm_(weight, tiling.keys(v, columns))
        highest = new_highest
    log_sum = highest + total.log()
    return output.div_(total.masked_fill_(total == 0, 1)), log_sum


@torch.library.custom_op("trl_ext::tapa_chunked_backward", mutates_args=())
def _backward(
    d_output: Tensor,
    output: Tensor,
    log_sum: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_offset: int,
    first_key_BT: Tensor | None,
    real_BT: Tensor | None,
    amplitude_dim: int,
    phase_scale: float,
    phase_alpha: float,
    query_block: int,
    key_block: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    layout = Layout(query_offset, first_key_BT, real_BT)
    tiling = _Tiling.of(q, k, layout, amplitude_dim, phase_scale, phase_alpha)
    dq = q.new_empty(q.shape)
    keys = k.flatten(0, 1), v.flatten(0, 1)
    dk, dv = (x.new_zeros(x.shape, dtype=tiling.dtype) for x in keys)
    with torch.autocast(q.device.type, enabled=False):
        for rows, blocks in layout.tiles(q.size(2), query_block, key_block):
            o, do = tiling.stacked(output, rows), tiling.stacked(d_output, rows)
            saved = tiling.stacked(log_sum.unsqueeze(-1), rows), (do * o).sum(-1, keepdim=True)
            query = tiling.scale(tiling.stacked(q, rows))
            d_query = torch.zeros_like(query)
            for columns in blocks:
                _backward_tile(tiling, rows, columns, query, do, saved, keys, d_query, (dk, dv))
            tiling.store(dq, rows, tiling.scale(d_query))
    return dq, dk.view(k.shape).to(k.dtype), dv.view(v.shape).to(v.dtype)


@torch.library.register_fake("trl_ext::tapa_chunked_backward")
def _gradients(
    d_output: Tensor, output: Tensor, log_sum: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _backward_tile(
    tiling: _Tiling,
    rows: range,
    columns: range,
    query: Tensor,
    do: Tensor,
    saved: tuple[Tensor, Tensor],
    keys: tuple[Tensor, Tensor],
    d_query: Tensor,
    d_keys: tuple[Tensor, Tensor],
) -> None:
    """Adds one tile's share to the gradients of its queries, keys and values."""
    (key, value), at = (tiling.keys(x, columns) for x in keys), tiling.amplitude_dim
    dk, dv = (x[:, columns.start : columns.stop] for x in d_keys)
    log_sum, Δ = saved
    power = tiling.power(rows, columns)
    amplitude, angle = tiling.amplitude_and_angle(query, key, rows, power)
    cosine, sine = angle.cos(), angle.sin_()
    p = tiling.hide((amplitude * cosine).sub_(log_sum), rows, columns, -math.inf).exp_()
    dv.baddbmm_(p.mT, do)
    ds = torch.bmm(do, value.mT).sub_(Δ).mul_(p)
    dφ = sine.mul_(amplitude).mul_(ds).mul_(-2 * math.pi)
    tiling.per_head(dφ, rows).mul_(power)
    da = ds.mul_(cosine)
    d_query[..., :at].baddbmm_(da, key[..., :at])
    d_query[..., at:].baddbmm_(dφ, key[..., at:])
    dk[..., :at].baddbmm_(da.mT, query[..., :at])
    dk[..., at:].baddbmm_(dφ.mT, query[..., at:])


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    q, k, v, query_offset, first_key_BT, real_BT, *ctx.form = inputs
    ctx.query_offset = query_offset
    ctx.save_for_backward(*output, q, k, v, first_key_BT, real_BT)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, d_output: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if d_output is None:
        return (None,) * 11
    output, log_sum, q, k, v, first_key_BT, real_BT = ctx.saved_tensors
    seen = (ctx.query_offset, first_key_BT, real_BT)
    gradients = _backward(d_output, output, log_sum, q, k, v, *seen, *ctx.form)
    return (*gradients, *[None] * 8)


torch.library.register_autograd("trl_ext::tapa_chunked", _differentiate, setup_context=_save)
