"""Stick-breaking attention in fused kernels: forward, backward and decoding with a cache.

The equations are those of `chunked.py`, in logarithms to base 2. A program walks from the nearest
keys to the oldest and carries log S per query. Gradients take three kernels, none with atomics:

    1. per block of queries, outwards: log S in front of each tile, kept;
    2. per block of queries, back: dq, and Σ_{l<j} eᵢₗ in front of each tile, kept;
    3. per block of keys, over the queries that visited it: dk and dv.

What is kept is two floats per query and tile. So that it stays within `SCRATCH` bytes at any
length, the three run slab by slab of the queries, and dk and dv add up. The tiles they share are
fixed; the forward's are tuned.

One new query per row, as in decoding: the heads of a group stand in one block, and segments of the
keys run side by side. Two segments combine by o = o_new + S_new · o_old and S = S_new · S_old.

Dropped from the paper's kernels: the softplus that is linear above 15, spin locks around dk and dv,
and their bf16 buffers.
"""

# Kernels are written in Triton's language, whose types are not Python's.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportFunctionMemberAccess=false, reportIndexIssue=false, reportMissingImports=false
# pyright: reportOperatorIssue=false

import math
import os
from typing import Any, NamedTuple

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError(
        "implementation='triton' needs the package triton, which is not installed: install it, or "
        "use 'chunked', which computes the same on any device."
    ) from error

from trl_ext.ops._choice import WIDEST, fitting_tiles
from trl_ext.ops._shapes import Layout

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
SCRATCH = 256 * 2**20
SEGMENT = 512  # keys of a program that decodes
TILES_PER_LOOK = 4  # tiles between two looks at whether the sticks are used up


def stickbreaking(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, *, scale: float, attend_current: bool
) -> tuple[Tensor, Tensor]:
    """Stick-breaking attention, fused; for float32, bfloat16 and float16 on CUDA.

    Args:
        q, k, v, layout, scale, attend_current: as in
            `trl_ext.ops.stickbreaking.stickbreaking_attention`; head widths up to 256.

    Returns:
        Output `(B, H, Tq, Dv)` and remainder `(B, H, Tq)`, in the dtype of `v`.

    Raises:
        ValueError: a head is too wide.
    """
    if max(q.size(3), v.size(3)) > WIDEST:
        raise ValueError(
            f"implementation='triton' takes heads of width {WIDEST} at most, and q has {q.size(3)} "
            f"and v {v.size(3)}: use 'chunked'."
        )
    first_key, real = layout.first_key_BT, layout.real_BT
    if first_key is not None:
        first_key = first_key.int().contiguous()
    if real is not None:
        real = real.to(torch.int8).contiguous()
    form = (first_key, real, layout.query_offset, scale, attend_current)
    output, remainder = _forward(q, k, v, *form)
    return output, remainder.to(v.dtype)


class _Blocks(NamedTuple):
    """Queries and keys of a tile in the backward pass, whose kernels share what they keep."""

    queries: int
    keys: int

    @classmethod
    def of(cls, q: Tensor, v: Tensor) -> "_Blocks":
        wide = max(q.size(3), v.size(3))
        if q.dtype == torch.float32:
            return cls(32, 16 if wide > 128 else 32) if wide > 64 else cls(64, 32)
        return cls(64, 32) if wide > 64 else cls(64, 64)


def _width(x: Tensor) -> int:
    return max(16, triton.next_power_of_2(x.size(3)))


@torch.library.custom_op("trl_ext::stickbreaking_triton", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first_key_BT: Tensor | None,
    real_BT: Tensor | None,
    query_offset: int,
    scale: float,
    attend_current: bool,
) -> tuple[Tensor, Tensor]:
    B, H, Tq, D = q.shape
    Hkv, Tk, Dv = k.size(1), k.size(2), v.size(3)
    decodes = Tq == 1
    heads, rows = (Hkv, H // Hkv) if decodes else (H, Tq)
    q = q.contiguous().view(B, heads, rows, D)
    k, v = k.contiguous(), v.contiguous()
    segments = triton.cdiv(query_offset + 1, SEGMENT) if decodes else 1
    output = q.new_empty(segments, B, heads, rows, Dv, dtype=torch.float32 if decodes else v.dtype)
    log_stick = q.new_empty(segments, B, heads, rows, dtype=torch.float32)
    kernel = _decoding if decodes else _prefill
    kernel[lambda meta: (triton.cdiv(rows, meta["BLOCK_M"]), B * heads, segments)](
        *(q, k, v, first_key_BT, real_BT, output, log_stick),
        *(scale * math.log2(math.e), heads, heads // Hkv, rows, Tk, query_offset, D, Dv, B * heads),
        STEP=0 if decodes else 1,
        SEGMENT=SEGMENT if decodes else 0,
        STRICT=not attend_current,
        HAS_FIRST=first_key_BT is not None,
        HAS_REAL=real_BT is not None,
        BLOCK_D=_width(q),
        BLOCK_DV=_width(v),
        LOOK=TILES_PER_LOOK,
    )
    if not decodes:
        return output[0], _length(log_stick[0])
    newer = log_stick.flip(0).cumsum(0).flip(0) - log_stick  # log S in front of each segment
    total = (output * newer.exp2().unsqueeze(-1)).sum(0).to(v.dtype)
    return total.view(B, H, 1, Dv), _length(log_stick.sum(0)).view(B, H, 1)


def _length(log_stick: Tensor) -> Tensor:
    # As of a weight: no denormal, and so none that depends on where the walk stopped.
    return torch.where(log_stick > -126, log_stick.exp2(), 0.0)


@torch.library.custom_op("trl_ext::stickbreaking_triton_backward", mutates_args=())
def _backward(
    d_output: Tensor,
    d_remainder: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first_key_BT: Tensor | None,
    real_BT: Tensor | None,
    remainder: Tensor,
    query_offset: int,
    scale: float,
    attend_current: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    B, H, Tq, D = q.shape
    Hkv, Tk, Dv = k.size(1), k.size(2), v.size(3)
    q, k, v, d_output = (x.contiguous() for x in (q, k, v, d_output))
    d_left = (d_remainder * remainder).float().contiguous()
    dq = torch.empty_like(q)
    dk, dv = (torch.zeros_like(x, dtype=torch.float32) for x in (k, v))
    block = _Blocks.of(q, v)
    tiles = triton.cdiv(Tk, block.keys)
    whole = triton.cdiv(Tq, block.queries)
    blocks = max(1, min(whole, SCRATCH // (8 * B * H * tiles * block.queries)))
    log_stick, older = q.new_empty(2, B * H, tiles, blocks * block.queries, dtype=torch.float32)
    oldest = torch.empty(B * H, blocks, dtype=torch.int32, device=q.device)
    common = {
        "STRICT": not attend_current,
        "HAS_FIRST": first_key_BT is not None,
        "HAS_REAL": real_BT is not None,
        "BLOCK_M": block.queries,
        "BLOCK_N": block.keys,
        "BLOCK_D": _width(q),
    }
    scale2 = scale * math.log2(math.e)
    for start in range(0, whole, blocks):
        here = min(blocks, whole - start)
        sizes = (H, H // Hkv, Tq, Tk, query_offset, D, Dv, start, blocks, tiles)
        masks = (first_key_BT, real_BT)
        _sticks_kernel[(here, B * H)](
            *(q, k, *masks, log_stick, oldest, scale2, *sizes), LOOK=TILES_PER_LOOK, **common
        )
        wide = {"BLOCK_DV": _width(v), **common}
        _queries_kernel[(here, B * H)](
            *(q, k, v, *masks, d_output, d_left, log_stick, older, oldest, dq),
            *(scale2, scale, *sizes),
            **wide,
        )
        _keys_kernel[(tiles, B * Hkv)](
            *(q, k, v, *masks, d_output, log_stick, older, oldest, dk, dv),
            *(scale2, scale, *sizes, here),
            **wide,
        )
    return dq, dk.to(k.dtype), dv.to(v.dtype)


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *form: Any) -> tuple[Tensor, Tensor]:
    return v.new_empty(*q.shape[:3], v.size(3)), v.new_empty(q.shape[:3], dtype=torch.float32)


@_backward.register_fake
def _(d_output: Tensor, d_remainder: Tensor, q: Tensor, k: Tensor, v: Tensor, *form: Any):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(*inputs[:5], output[1])
    ctx.form = inputs[5:]


def _differentiate(ctx: Any, d_output: Tensor, d_remainder: Tensor) -> tuple[Tensor | None, ...]:
    gradients = _backward(d_output, d_remainder, *ctx.saved_tensors, *ctx.form)
    return *gradients, *(None,) * 5


_forward.register_autograd(_differentiate, setup_context=_save)


def _configs(*choices: tuple[int, int, int, int]) -> list[triton.Config]:
    """Queries and keys of a tile, warps and stages to try."""
    if INTERPRETED:  # a small tile, so that small shapes have several of them
        choices = ((min(32, choices[0][0]), 32, 4, 1),)
    return [
        triton.Config({"BLOCK_M": m, "BLOCK_N": n}, num_warps=warps, num_stages=stages)
        for m, n, warps, stages in choices
    ]


def _fitting(configs: list[triton.Config], given: dict, **meta: Any) -> list[triton.Config]:
    width = max(meta["BLOCK_D"], meta["BLOCK_DV"])
    return fitting_tiles(configs, given["Q"].element_size() * width)


def _spreads(*choices: tuple[int, int]) -> list[triton.Config]:
    """Warps and stages to try."""
    choices = choices[:1] if INTERPRETED else choices
    return [triton.Config({}, num_warps=warps, num_stages=stages) for warps, stages in choices]


@triton.jit
def _log_share_left(z):
    """log₂(1 − σ) of logits to base 2, and w = 2^−|z|, of which σ is made."""
    w = tl.exp2(-tl.abs(z))
    # 1 + w drops the low bits of a small w, and over many keys they add up.
    series = w * (1.0 - w * (0.5 - w * (0.33333333 - 0.25 * w))) * 1.4426950408889634
    log1p = tl.where(w < 0.015625, series, tl.log2(1.0 + w))
    return -(tl.maximum(z, 0.0) + log1p), w


@triton.jit
def _share(z, w):
    """σ of a logit."""
    return tl.where(z >= 0, 1.0, w) / (1.0 + w)


@triton.jit
def _weights(z, left, log_stick):
    """Aⱼ = 2^(zⱼ + log S + Σ_{l≥j} log(1 − σ(zₗ))), 0 where that is no normal float."""
    log_weight = z + (log_stick[:, None] + tl.cumsum(left, axis=1, reverse=True))
    return tl.where(log_weight > -126.0, tl.exp2(log_weight), 0.0)


@triton.jit
def _logits(
    q, K, Real, row, slots, first, columns, scale2, Tk, D,
    STRICT: tl.constexpr, HAS_REAL: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Logits to base 2 of a tile, −∞ where the key is hidden, and the keys."""
    inside = columns < Tk
    k = _rows_of(K, columns, inside, D, BLOCK_D)
    z = tl.dot(q, tl.trans(k), input_precision="tf32x3") * scale2
    seen = (columns[None, :] >= first[:, None]) & inside[None, :]
    if STRICT:
        seen = seen & (columns[None, :] < slots[:, None])
    else:
        seen = seen & (columns[None, :] <= slots[:, None])
    if HAS_REAL:
        seen = seen & (tl.load(Real + row + columns, mask=inside, other=0) != 0)[None, :]
    return tl.where(seen, z, float("-inf")), k


@triton.jit
def _rows_of(X, rows, inside, width, BLOCK: tl.constexpr):
    """Rows of a contiguous matrix, 0 outside."""
    c = tl.arange(0, BLOCK)
    return tl.load(
        X + rows[:, None] * width + c[None, :],
        mask=inside[:, None] & (c < width)[None, :],
        other=0.0,
    )


@triton.jit
def _first_keys(First, row, slots, inside, Tk, HAS_FIRST: tl.constexpr):
    """First slot that each query may see; none where there is no query."""
    first = slots * 0
    if HAS_FIRST:
        first = tl.load(First + row + slots, mask=inside, other=0)
    return tl.where(inside, first, Tk)


@triton.jit
def _forward_kernel(
    Q, K, V, First, Real, Out, Stick,
    scale2, H, G, Tq, Tk, offset, D, DV, BH,
    STEP: tl.constexpr, SEGMENT: tl.constexpr, STRICT: tl.constexpr,
    HAS_FIRST: tl.constexpr, HAS_REAL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    LOOK: tl.constexpr,
):  # fmt: skip
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # those with most keys start first
    bh = tl.program_id(1).to(tl.int64)
    batch, kv = bh // H, bh // H * (H // G) + bh % H // G
    K += kv * Tk * D
    V += kv * Tk * DV
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < Tq
    slots = offset + rows * STEP
    first = _first_keys(First, batch * Tk, slots, inside, Tk, HAS_FIRST)
    q = _rows_of(Q + bh * Tq * D, rows, inside, D, BLOCK_D)

    low = tl.min(first, 0)
    high = tl.minimum(offset + tl.minimum(block * BLOCK_M + BLOCK_M, Tq) * STEP + (1 - STEP), Tk)
    if SEGMENT:
        low = tl.maximum(low, tl.program_id(2) * SEGMENT)
        high = tl.minimum(high, tl.program_id(2) * SEGMENT + SEGMENT)
    stop = low // BLOCK_N
    tile = tl.cdiv(high, BLOCK_N)
    stick = tl.where(inside, 0.0, -1e30)
    total = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    while (tile > stop) & (tl.max(stick, 0) > -127.0):
        for _ in range(0, tl.minimum(LOOK, tile - stop)):
            tile -= 1
            columns = tile * BLOCK_N + tl.arange(0, BLOCK_N)
            z, _k = _logits(
                q, K, Real, batch * Tk, slots, first, columns, scale2, Tk, D,
                STRICT, HAS_REAL, BLOCK_D,
            )  # fmt: skip
            left, _w = _log_share_left(z)
            weights = _weights(z, left, stick)
            v = _rows_of(V, columns, columns < Tk, DV, BLOCK_DV)
            total += tl.dot(weights.to(v.dtype), v, input_precision="tf32x3")
            stick += tl.sum(left, 1)

    at = (tl.program_id(2).to(tl.int64) * BH + bh) * Tq
    c = tl.arange(0, BLOCK_DV)
    tl.store(
        Out + at * DV + rows[:, None] * DV + c[None, :],
        total.to(Out.dtype.element_ty),
        mask=inside[:, None] & (c < DV)[None, :],
    )
    tl.store(Stick + at + rows, stick, mask=inside)


_WIDTHS = ["BLOCK_D", "BLOCK_DV"]
_prefill = triton.autotune(
    _configs((64, 64, 4, 3), (64, 32, 4, 3), (128, 64, 8, 3), (128, 32, 8, 3), (32, 32, 4, 1)),
    key=_WIDTHS,
    prune_configs_by={"early_config_prune": _fitting},
)(_forward_kernel)
_decoding = triton.autotune(
    _configs((16, 64, 4, 3), (16, 128, 4, 2), (16, 32, 4, 2)),
    key=_WIDTHS,
    prune_configs_by={"early_config_prune": _fitting},
)(_forward_kernel)


@triton.autotune(_spreads((4, 2), (4, 3), (8, 3)), key=["BLOCK_D"])
@triton.jit
def _sticks_kernel(
    Q, K, First, Real, Stick, Oldest,
    scale2, H, G, Tq, Tk, offset, D, DV, start, blocks, tiles,
    STRICT: tl.constexpr, HAS_FIRST: tl.constexpr, HAS_REAL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, LOOK: tl.constexpr,
):  # fmt: skip
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    batch, kv = bh // H, bh // H * (H // G) + bh % H // G
    K += kv * Tk * D
    local = block * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = start * BLOCK_M + local
    inside = rows < Tq
    slots = offset + rows
    first = _first_keys(First, batch * Tk, slots, inside, Tk, HAS_FIRST)
    q = _rows_of(Q + bh * Tq * D, rows, inside, D, BLOCK_D)

    stop = tl.min(first, 0) // BLOCK_N
    tile = tl.cdiv(tl.minimum(offset + (start + block + 1) * BLOCK_M, Tk), BLOCK_N)
    stick = tl.where(inside, 0.0, -1e30)
    while (tile > stop) & (tl.max(stick, 0) > -127.0):
        for _ in range(0, tl.minimum(LOOK, tile - stop)):
            tile -= 1
            columns = tile * BLOCK_N + tl.arange(0, BLOCK_N)
            z, _k = _logits(
                q, K, Real, batch * Tk, slots, first, columns, scale2, Tk, D,
                STRICT, HAS_REAL, BLOCK_D,
            )  # fmt: skip
            left, _w = _log_share_left(z)
            tl.store(Stick + (bh * tiles + tile) * blocks * BLOCK_M + local, stick)
            stick += tl.sum(left, 1)
    tl.store(Oldest + bh * blocks + block, tile)


@triton.autotune(_spreads((4, 2), (4, 3), (8, 2)), key=_WIDTHS)
@triton.jit
def _queries_kernel(
    Q, K, V, First, Real, dO, Left, Stick, Older, Oldest, dQ,
    scale2, scale, H, G, Tq, Tk, offset, D, DV, start, blocks, tiles,
    STRICT: tl.constexpr, HAS_FIRST: tl.constexpr, HAS_REAL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    batch, kv = bh // H, bh // H * (H // G) + bh % H // G
    K += kv * Tk * D
    V += kv * Tk * DV
    local = block * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = start * BLOCK_M + local
    inside = rows < Tq
    slots = offset + rows
    first = _first_keys(First, batch * Tk, slots, inside, Tk, HAS_FIRST)
    q = _rows_of(Q + bh * Tq * D, rows, inside, D, BLOCK_D)
    do = _rows_of(dO + bh * Tq * DV, rows, inside, DV, BLOCK_DV)

    # The remainder acts like a key older than all others.
    older = tl.load(Left + bh * Tq + rows, mask=inside, other=0.0)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    end = tl.cdiv(tl.minimum(offset + (start + block + 1) * BLOCK_M, Tk), BLOCK_N)
    for tile in range(tl.load(Oldest + bh * blocks + block), end):
        columns = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        z, k = _logits(
            q, K, Real, batch * Tk, slots, first, columns, scale2, Tk, D,
            STRICT, HAS_REAL, BLOCK_D,
        )  # fmt: skip
        kept = (bh * tiles + tile) * blocks * BLOCK_M + local
        left, w = _log_share_left(z)
        weights = _weights(z, left, tl.load(Stick + kept))
        v = _rows_of(V, columns, columns < Tk, DV, BLOCK_DV)
        e = weights * tl.dot(do, tl.trans(v), input_precision="tf32x3")
        tl.store(Older + kept, older)
        dz = e - _share(z, w) * (older[:, None] + tl.cumsum(e, axis=1))
        older += tl.sum(e, 1)
        dq += tl.dot(dz.to(k.dtype), k, input_precision="tf32x3")

    c = tl.arange(0, BLOCK_D)
    tl.store(
        dQ + bh * Tq * D + rows[:, None] * D + c[None, :],
        (dq * scale).to(dQ.dtype.element_ty),
        mask=inside[:, None] & (c < D)[None, :],
    )


@triton.autotune(_spreads((4, 2), (4, 3), (8, 2)), key=_WIDTHS, restore_value=["dK", "dV"])
@triton.jit
def _keys_kernel(
    Q, K, V, First, Real, dO, Stick, Older, Oldest, dK, dV,
    scale2, scale, H, G, Tq, Tk, offset, D, DV, start, blocks, tiles, here,
    STRICT: tl.constexpr, HAS_FIRST: tl.constexpr, HAS_REAL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    kv = tl.program_id(1).to(tl.int64)
    batch = kv // (H // G)
    K += kv * Tk * D
    columns = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    v = _rows_of(V + kv * Tk * DV, columns, columns < Tk, DV, BLOCK_DV)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)

    begin = tl.maximum((tile * BLOCK_N - offset) // BLOCK_M - start, 0)
    for head in range(0, G):
        bh = kv * G + head
        for block in range(begin, here):
            last = tl.cdiv(tl.minimum(offset + (start + block + 1) * BLOCK_M, Tk), BLOCK_N)
            if (tl.load(Oldest + bh * blocks + block) <= tile) & (tile < last):
                local = block * BLOCK_M + tl.arange(0, BLOCK_M)
                rows = start * BLOCK_M + local
                inside = rows < Tq
                slots = offset + rows
                first = _first_keys(First, batch * Tk, slots, inside, Tk, HAS_FIRST)
                q = _rows_of(Q + bh * Tq * D, rows, inside, D, BLOCK_D)
                do = _rows_of(dO + bh * Tq * DV, rows, inside, DV, BLOCK_DV)
                z, _k = _logits(
                    q, K, Real, batch * Tk, slots, first, columns, scale2, Tk, D,
                    STRICT, HAS_REAL, BLOCK_D,
                )  # fmt: skip
                kept = (bh * tiles + tile) * blocks * BLOCK_M + local
                left, w = _log_share_left(z)
                weights = _weights(z, left, tl.load(Stick + kept))
                e = weights * tl.dot(do, tl.trans(v), input_precision="tf32x3")
                older = tl.load(Older + kept)[:, None] + tl.cumsum(e, axis=1)
                dz = e - _share(z, w) * older
                dv += tl.dot(tl.trans(weights.to(do.dtype)), do, input_precision="tf32x3")
                dk += tl.dot(tl.trans(dz.to(q.dtype)), q, input_precision="tf32x3")

    inside_k = (columns < Tk)[:, None]
    c, cv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    at_k = dK + kv * Tk * D + columns[:, None] * D + c[None, :]
    at_v = dV + kv * Tk * DV + columns[:, None] * DV + cv[None, :]
    # Earlier slabs of queries have added theirs.
    seen_k, seen_v = inside_k & (c < D)[None, :], inside_k & (cv < DV)[None, :]
    tl.store(at_k, tl.load(at_k, mask=seen_k, other=0.0) + dk * scale, mask=seen_k)
    tl.store(at_v, tl.load(at_v, mask=seen_v, other=0.0) + dv, mask=seen_v)
