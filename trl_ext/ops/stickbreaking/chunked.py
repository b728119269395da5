"""Stick-breaking attention with linear memory, in plain PyTorch for any device.

A block of queries walks its tiles from the nearest keys to the oldest and carries S, what is left
of each stick: a product of σ(−z), as exact as the sum of its logarithms and faster. Only q, k and v
are saved for the backward pass, and scores exist for one tile at a time, O(T·D + block²) in all. It
is an operator of its own, so that a compiled model calls it instead of unrolling its loops.
Gradients: with eᵢⱼ = Aᵢⱼ dOᵢ·vⱼ,

    dzᵢⱼ = eᵢⱼ − σ(zᵢⱼ) (dremᵢ remᵢ + Σ_{l≤j} eᵢₗ)

The remainder stands in that sum like a key older than all others. So the backward walks twice: to
the oldest key for S, and back for the sum. Dropped: the paper's single walk, which takes the
tiles' shares off a saved total, and the walk that takes eᵢₗ off a saved sum. Both subtract nearly
equal numbers where little is left of a stick, and their float32 error grows with the length.

Once every stick of a block is too short for a float, older tiles are left out, to the same bits.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trl_ext.ops._shapes import Layout, group_heads, score_dtype

BLOCK = 128


def stickbreaking(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    *,
    scale: float,
    attend_current: bool,
    block: int = BLOCK,
) -> tuple[Tensor, Tensor]:
    """Stick-breaking attention, tile by tile.

    Args:
        q, k, v, layout, scale, attend_current: as in
            `trl_ext.ops.stickbreaking.stickbreaking_attention`.
        block: largest number of queries and of keys in a tile, ≥ 1; it changes rounding only.

    Returns:
        Output `(B, H, Tq, Dv)` and remainder `(B, H, Tq)`, in the dtype of `v`.
    """
    masks = (layout.first_key_BT, layout.real_BT, layout.query_offset)
    return _forward(q, k, v, *masks, scale, attend_current, block)


@torch.library.custom_op("trl_ext::stickbreaking_chunked", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first_key_BT: Tensor | None,
    real_BT: Tensor | None,
    query_offset: int,
    scale: float,
    attend_current: bool,
    block: int,
) -> tuple[Tensor, Tensor]:
    layout = Layout(query_offset, first_key_BT, real_BT)
    k, v = _under_one_stride(k, v)
    tiles = _Tiles(q, k, v, layout, scale, attend_current, block)
    output, remainder = v.new_empty(*q.shape[:3], v.size(3)), v.new_empty(q.shape[:3])
    with torch.autocast(q.device.type, enabled=False):
        for rows, blocks in tiles.walk():
            q_rows = tiles.queries(q, rows) * scale
            total = q_rows.new_zeros(*q_rows.shape[:3], v.size(3))
            stick = q_rows.new_ones(q_rows.shape[:3])
            for columns in blocks:
                z = tiles.logits(q_rows, rows, columns)
                S, stick = _broken(z, stick)
                total += _cut(S.mul_(z.sigmoid_())) @ tiles.keys(v, columns)
                if _used_up(stick):
                    break
            tiles.put(output, rows, total)
            tiles.put(remainder, rows, stick)
    return output, remainder


@torch.library.custom_op("trl_ext::stickbreaking_chunked_backward", mutates_args=())
def _backward(
    d_output: Tensor,
    d_remainder: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first_key_BT: Tensor | None,
    real_BT: Tensor | None,
    query_offset: int,
    scale: float,
    attend_current: bool,
    block: int,
) -> tuple[Tensor, Tensor, Tensor]:
    layout = Layout(query_offset, first_key_BT, real_BT)
    dq, dk, dv = (torch.zeros_like(x, dtype=score_dtype(x)) for x in (q, k, v))
    k, v = _under_one_stride(k, v)
    tiles = _Tiles(q, k, v, layout, scale, attend_current, block)
    with torch.autocast(q.device.type, enabled=False):
        for rows, blocks in tiles.walk():
            q_rows, do = tiles.queries(q, rows) * scale, tiles.queries(d_output, rows)
            visited, stick = _walk_out(tiles, q_rows, rows, blocks)
            older = stick * tiles.queries(d_remainder, rows)
            dq_rows = torch.zeros_like(q_rows)
            for columns, stick in reversed(visited):
                z = tiles.logits(q_rows, rows, columns)
                S, _ = _broken(z, stick)
                share = z.sigmoid_()
                weights = _cut(S.mul_(share))
                dv[:, :, columns.start : columns.stop] += weights.mT @ do
                e = weights.mul_(do @ tiles.keys(v, columns).mT)
                sum_of_older = e.cumsum(-1).add_(older.unsqueeze(-1))
                older = sum_of_older[..., -1]
                dz = e.addcmul_(share, sum_of_older, value=-1)
                dq_rows += dz @ tiles.keys(k, columns)
                dk[:, :, columns.start : columns.stop] += dz.mT @ q_rows
            tiles.put(dq, rows, dq_rows * scale)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *form: Any) -> tuple[Tensor, Tensor]:
    return v.new_empty(*q.shape[:3], v.size(3)), v.new_empty(q.shape[:3])


@_backward.register_fake
def _(d_output: Tensor, d_remainder: Tensor, q: Tensor, k: Tensor, v: Tensor, *form: Any):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.form = inputs[5:]


def _differentiate(ctx: Any, d_output: Tensor, d_remainder: Tensor) -> tuple[Tensor | None, ...]:
    gradients = _backward(d_output, d_remainder, *ctx.saved_tensors, *ctx.form)
    return *gradients, *(None,) * 6


_forward.register_autograd(_differentiate, setup_context=_save)


def _under_one_stride(k: Tensor, v: Tensor) -> Iterator[Tensor]:
    # Where rows and heads are not under one stride, as without a cache, matmul copies each tile,
    # and of a transposed one it makes another matrix for BLAS, whose last bit differs.
    return (x.flatten(0, 1).unflatten(0, x.shape[:2]) for x in (k, v))


class _Tiles(NamedTuple):
    """Tiles in the dtype of scores; the queries of a key head stand in one, `(B, Hkv, g·m, ·)`."""

    q: Tensor
    k: Tensor
    v: Tensor
    layout: Layout
    scale: float
    attend_current: bool
    block: int

    def walk(self) -> Iterator[tuple[range, list[range]]]:
        """Blocks of queries, each with its blocks of keys from the nearest to the oldest."""
        for rows, columns in self.layout.tiles(self.q.size(2), self.block, self.block):
            yield rows, columns[::-1]

    def queries(self, x: Tensor, rows: range) -> Tensor:
        """Positions `rows` of a tensor `(B, H, Tq, ...)`, `(B, Hkv, g·m, ...)`."""
        heads = group_heads(x[:, :, rows.start : rows.stop], self.k.size(1))
        return heads.to(score_dtype(self.q)).flatten(2, 3)

    def put(self, x: Tensor, rows: range, part: Tensor) -> None:
        """Writes what `queries` would read."""
        x[:, :, rows.start : rows.stop] = part.unflatten(2, (-1, len(rows))).flatten(1, 2)

    def keys(self, x: Tensor, columns: range) -> Tensor:
        """Slots `columns` of k or v."""
        return x[:, :, columns.start : columns.stop].to(score_dtype(self.q))

    def logits(self, q_rows: Tensor, rows: range, columns: range) -> Tensor:
        """zᵢⱼ of a tile, −∞ where the key is hidden; `q_rows` are scaled."""
        z = q_rows @ self.keys(self.k, columns).mT
        strict = not self.attend_current
        visible = self.layout.visible(rows, columns, z.device, strict=strict)
        if visible is not None:
            z.unflatten(2, (-1, len(rows))).masked_fill_(~visible, -torch.inf)
        return z


def _walk_out(
    tiles: _Tiles, q_rows: Tensor, rows: range, blocks: list[range]
) -> tuple[list[tuple[range, Tensor]], Tensor]:
    """Tiles that count, the nearest first, with the S that reaches each; and the last S."""
    # One tensor: small ones that outlive their tiles would keep the tiles' memory from reuse.
    sticks = q_rows.new_ones(len(blocks) + 1, *q_rows.shape[:3])
    visited = 0
    for columns in blocks:
        _, sticks[visited + 1] = _broken(tiles.logits(q_rows, rows, columns), sticks[visited])
        visited += 1
        if _used_up(sticks[visited]):
            break
    return list(zip(blocks[:visited], sticks, strict=False)), sticks[visited]


def _broken(z: Tensor, stick: Tensor) -> tuple[Tensor, Tensor]:
    """What is left of the sticks in front of each key of a tile: Sⱼ = S Π_{l>j} σ(−zₗ).

    Args:
        z: `(..., n)`, logits in the order of the keys.
        stick: `(...)`, the S that reaches the tile's nearest key.

    Returns:
        Sⱼ `(..., n)` and the S `(...)` that the tile leaves.
    """
    S = z.new_empty(*z.shape[:-1], z.size(-1) + 1)
    S[..., 0] = stick
    S[..., 1:] = z.neg().sigmoid_().flip(-1)
    S.cumprod_(-1)
    return S[..., :-1].flip(-1), _cut(S[..., -1].clone())


def _cut(x: Tensor) -> Tensor:
    # Denormal weights slow a matmul twentyfold. With them gone, keys add not even a bit once the
    # stick is shorter.
    return torch.threshold_(x, torch.finfo(x.dtype).tiny, 0.0)


def _used_up(stick: Tensor) -> bool:
    return not stick.any()
