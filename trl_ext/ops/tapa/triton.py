"""TAPA fused for a GPU: one kernel forward, two backward, no atomics.

A row of a kernel's block is one query of one head; the heads that share a key head lie side by side
in it, so that keys are loaded once per group, their gradients sum over the group by themselves, and
a single new query still fills a block. Where queries are few, as in decoding, the keys are split
over programs and the parts merged by their log-sum-exp.

The power of the distance is looked up in a table that was rounded once from float64: two special
functions less per score than exp2(α log2 d), and more exact. Cosine and sine are polynomials of the
phase's fraction of a turn: multiply-adds, of which a GPU has plenty, instead of special functions,
of which each score already needs one. The scores are in base 2 throughout, the log-sum-exp too.
"""

# triton is optional, and a type checker cannot see that only a kernel calls a kernel.
# pyright: reportMissingImports=false, reportGeneralTypeIssues=false, reportArgumentType=false

import math
import os
from typing import Any

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

from trl_ext.ops._choice import fitting_tiles
from trl_ext.ops._shapes import Layout

# Fit the shared memory at head width 256 in float32: WIDE an H100's, NARROW an A100's as well.
WIDE, NARROW = (32, 32, 4, 1), (32, 16, 4, 1)
FEW_ROWS = 16  # the smallest block that the matrix units take
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def tapa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    *,
    amplitude_dim: int,
    phase_scale: float,
    phase_alpha: float,
    splits: int | None = None,
) -> Tensor:
    """Quadratic-phase TAPA in fused kernels.

    Args:
        q, k, v, layout: as `trl_ext.ops.tapa.tapa_attention` takes and checks them; float32, and
            bfloat16 or float16 with scores, phases and sums in float32.
        amplitude_dim: coordinates of the amplitude, θD; the others are the phase's.
        phase_scale: φᵢⱼ = phase_scale · qᴾᵢ·kᴾⱼ.
        phase_alpha: exponent of the distance.
        splits: programs that share the keys of a block of queries; None: as many as the GPU asks
            for. The result does not depend on it.

    Returns:
        `(B, H, Tq, Dv)`, in the dtype of `v`.
    """
    seen = (layout.query_offset, layout.first_key_BT, layout.real_BT)
    splits = _splits(q, k) if splits is None else splits
    return _forward(q, k, v, *seen, amplitude_dim, phase_scale, phase_alpha, splits)[0]


def _splits(q: Tensor, k: Tensor) -> int:
    """Enough programs for every multiprocessor, each with a few hundred keys at least."""
    if q.device.type != "cuda":
        return 1
    rows = q.size(1) // k.size(1) * q.size(2)
    programs = _blocks(rows, FEW_ROWS if rows <= FEW_ROWS else 128) * k.size(0) * k.size(1)
    wanted = 2 * torch.cuda.get_device_properties(q.device).multi_processor_count
    return max(1, min(wanted // max(programs, 1), _blocks(k.size(2), 256)))


def _blocks(length: int, size: int) -> int:
    return -(-length // size)


@triton.jit
def _turn(phase, distance, power):
    """u = dᵅ φ less its nearest whole number, and dᵅ times the scale of φ."""
    weight = tl.load(power + distance)
    turns = phase * weight
    return turns - tl.floor(turns + 0.5), weight


@triton.jit
def _cosine(u):
    """cos(2πu), |u| ≤ ½, as sin(2πr) with r = ¼ − |u|; error 2e-7."""
    r = 0.25 - tl.abs(u)
    t = r * r
    y = 39.76072207692069 * t - 76.58128455947363
    y = y * t + 81.60248074286892
    y = y * t - 41.341680668063155
    y = y * t + 6.283185280261415
    return y * r


@triton.jit
def _sine(u):
    """sin(2πu), |u| ≤ ½, as ±cos(2πr) with r = ¼ − |u|; error 2e-7."""
    r = 0.25 - tl.abs(u)
    t = r * r
    y = -24.98183609816022 * t + 60.143952330328375
    y = y * t - 85.45356819480286
    y = y * t + 64.93934655288956
    y = y * t - 19.739208548315187
    y = y * t + 1.0
    return tl.where(u < 0, -y, y)


@triton.jit
def _rows(block, row_0, Tq, offset, GROUPS: tl.constexpr, BLOCK_M: tl.constexpr):
    """Which rows exist, and their query, slot and head within the group."""
    row = row_0 + block * BLOCK_M + tl.arange(0, BLOCK_M)
    exists = row < GROUPS * Tq
    row = tl.where(exists, row, 0)
    query = row // GROUPS
    return exists, query, offset + query, row % GROUPS


@triton.jit
def _load(x, row, exists, at, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Coordinates `at` … `at + WIDTH` of the rows at offsets `row`, `(rows, PADDED)`."""
    column = tl.arange(0, PADDED)
    inside = exists[:, None] & (column < WIDTH)[None, :]
    return tl.load(x + row[:, None] + (at + column)[None, :], mask=inside, other=0.0)


@triton.jit
def _store(x, row, exists, at, value, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    column = tl.arange(0, PADDED)
    inside = exists[:, None] & (column < WIDTH)[None, :]
    tl.store(x + row[:, None] + (at + column)[None, :], value.to(x.dtype.element_ty), mask=inside)


@triton.jit
def _pairs(
    slot,
    slot_exists,
    key,
    key_exists,
    b_row,
    first_key,
    real,
    place,
    DOCUMENTS: tl.constexpr,
    PADDING: tl.constexpr,
):
    """Which pairs see each other, and their distances; the arguments broadcast to the tile."""
    visible = key_exists & slot_exists & (key <= slot)
    if DOCUMENTS:
        visible = visible & (key >= tl.load(first_key + b_row + slot, mask=slot_exists, other=0))
    if PADDING:
        visible = visible & (tl.load(real + b_row + key, mask=key_exists, other=0) != 0)
        slot = tl.load(place + b_row + slot, mask=slot_exists, other=0)
        key = tl.load(place + b_row + key, mask=key_exists, other=0)
    return visible, tl.maximum(slot - key, 0)


def _configs(*choices: tuple[int, int, int, int]) -> list[triton.Config]:
    if INTERPRETED:  # small blocks, so that small shapes have several of them
        choices = ((16, 32, 4, 1),)
    return [
        triton.Config({"BLOCK_M": m, "BLOCK_N": n}, num_warps=warps, num_stages=stages)
        for m, n, warps, stages in choices
    ]


def _fitting(configs: list[triton.Config], given: dict, **meta: Any) -> list[triton.Config]:
    """A single query per key head wants the smallest block, anything else a larger one."""
    few = [c for c in configs if (c.kwargs["BLOCK_M"] == FEW_ROWS) == meta["FEW"]] or configs
    return fitting_tiles(few, given["q"].element_size() * max(meta["A"] + meta["P"], meta["V"]))


_KEY = ["A", "P", "V", "GROUPS", "FEW"]


@triton.autotune(
    _configs(
        *((64, 64, 4, 2), (128, 64, 8, 2), (128, 32, 8, 2), (64, 32, 4, 2), WIDE),
        *((16, 64, 4, 2), (16, 128, 4, 2), (16, 32, 4, 2)),
    ),
    key=_KEY,
    prune_configs_by={"early_config_prune": _fitting},
)
@triton.jit
def _forward_kernel(
    q,
    k,
    v,
    o,
    lse,
    power,
    first_key,
    real,
    place,
    q_b,
    q_h,
    q_t,
    k_b,
    k_h,
    k_t,
    v_b,
    v_h,
    v_t,
    B,
    KV_HEADS,
    Tq,
    Tk,
    offset,
    splits,
    a_scale,
    GROUPS: tl.constexpr,
    DA: tl.constexpr,
    DP: tl.constexpr,
    DV: tl.constexpr,
    A: tl.constexpr,
    P: tl.constexpr,
    V: tl.constexpr,
    DOCUMENTS: tl.constexpr,
    PADDING: tl.constexpr,
    FEW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest rows first
    split = tl.program_id(1)
    b = (tl.program_id(2) // KV_HEADS).to(tl.int64)
    kv_head = (tl.program_id(2) % KV_HEADS).to(tl.int64)
    exists, query, slot, group = _rows(block, 0, Tq, offset, GROUPS, BLOCK_M)
    head = kv_head * GROUPS + group
    q_row = b * q_b + head * q_h + query.to(tl.int64) * q_t
    qa = _load(q, q_row, exists, 0, DA, A)
    qp = _load(q, q_row, exists, DA, DP, P)

    low = 0
    if DOCUMENTS:
        low = tl.load(first_key + b * Tk + offset + block * BLOCK_M // GROUPS)
    high = offset + (tl.minimum((block + 1) * BLOCK_M, GROUPS * Tq) - 1) // GROUPS + 1
    share = tl.cdiv(tl.cdiv(high - low, BLOCK_N), splits) * BLOCK_N
    start = low + split * share
    end = tl.minimum(start + share, high)

    highest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    output = tl.zeros((BLOCK_M, V), tl.float32)
    for n in range(start, end, BLOCK_N):
        key = n + tl.arange(0, BLOCK_N)
        key_exists = key < end
        k_row = b * k_b + kv_head * k_h + key.to(tl.int64) * k_t
        ka = _load(k, k_row, key_exists, 0, DA, A)
        kp = _load(k, k_row, key_exists, DA, DP, P)
        amplitude = tl.dot(qa, tl.trans(ka), input_precision="tf32x3")
        phase = tl.dot(qp, tl.trans(kp), input_precision="tf32x3")
        visible, distance = _pairs(
            slot[:, None],
            exists[:, None],
            key[None, :],
            key_exists[None, :],
            b * Tk,
            first_key,
            real,
            place,
            DOCUMENTS,
            PADDING,
        )
        u, _ = _turn(phase, distance, power)
        score = amplitude * (a_scale * 1.4426950408889634) * _cosine(u)
        score = tl.where(visible, score, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(score, 1))
        # While a row has seen no key its maximum is −∞, and −∞ − (−∞) would be NaN.
        shift = tl.where(new_highest == float("-inf"), 0.0, new_highest)
        weight = tl.exp2(score - shift[:, None])
        decay = tl.exp2(highest - shift)
        total = total * decay + tl.sum(weight, 1)
        v_row = b * v_b + kv_head * v_h + key.to(tl.int64) * v_t
        value = _load(v, v_row, key_exists, 0, DV, V)
        output = output * decay[:, None]
        output = tl.dot(weight.to(value.dtype), value, output, input_precision="tf32x3")
        highest = new_highest

    row = ((split * B + b) * KV_HEADS * GROUPS + head) * Tq + query
    some = tl.where(total == 0, 1.0, total)
    _store(o, row * DV, exists, 0, output / some[:, None], DV, V)
    tl.store(lse + row, highest + tl.log2(some), mask=exists)


@triton.autotune(
    _configs(
        *((64, 64, 4, 2), (64, 64, 8, 2), (64, 32, 4, 2), (128, 64, 8, 2), WIDE, NARROW),
        *((16, 64, 4, 2), (16, 32, 4, 2)),
    ),
    key=_KEY,
    prune_configs_by={"early_config_prune": _fitting},
)
@triton.jit
def _query_gradient_kernel(
    q,
    k,
    v,
    o,
    do,
    lse,
    delta,
    dq,
    power,
    first_key,
    real,
    place,
    q_b,
    q_h,
    q_t,
    k_b,
    k_h,
    k_t,
    v_b,
    v_h,
    v_t,
    KV_HEADS,
    Tq,
    Tk,
    offset,
    a_scale,
    GROUPS: tl.constexpr,
    DA: tl.constexpr,
    DP: tl.constexpr,
    DV: tl.constexpr,
    A: tl.constexpr,
    P: tl.constexpr,
    V: tl.constexpr,
    DOCUMENTS: tl.constexpr,
    PADDING: tl.constexpr,
    FEW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dq, and delta = dO·o for the kernel of the keys."""
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    b = (tl.program_id(1) // KV_HEADS).to(tl.int64)
    kv_head = (tl.program_id(1) % KV_HEADS).to(tl.int64)
    exists, query, slot, group = _rows(block, 0, Tq, offset, GROUPS, BLOCK_M)
    head = kv_head * GROUPS + group
    q_row = b * q_b + head * q_h + query.to(tl.int64) * q_t
    qa = _load(q, q_row, exists, 0, DA, A)
    qp = _load(q, q_row, exists, DA, DP, P)
    row = (b * KV_HEADS * GROUPS + head) * Tq + query
    d_output = _load(do, row * DV, exists, 0, DV, V)
    output = _load(o, row * DV, exists, 0, DV, V)
    own_delta = tl.sum(output.to(tl.float32) * d_output.to(tl.float32), 1)
    tl.store(delta + row, own_delta, mask=exists)
    log_sum = tl.load(lse + row, mask=exists, other=0.0)
    log_sum = tl.where(log_sum == float("-inf"), 0.0, log_sum)

    low = 0
    if DOCUMENTS:
        low = tl.load(first_key + b * Tk + offset + block * BLOCK_M // GROUPS)
    high = offset + (tl.minimum((block + 1) * BLOCK_M, GROUPS * Tq) - 1) // GROUPS + 1

    dqa = tl.zeros((BLOCK_M, A), tl.float32)
    dqp = tl.zeros((BLOCK_M, P), tl.float32)
    for n in range(low, high, BLOCK_N):
        key = n + tl.arange(0, BLOCK_N)
        key_exists = key < high
        k_row = b * k_b + kv_head * k_h + key.to(tl.int64) * k_t
        ka = _load(k, k_row, key_exists, 0, DA, A)
        kp = _load(k, k_row, key_exists, DA, DP, P)
        v_row = b * v_b + kv_head * v_h + key.to(tl.int64) * v_t
        value = _load(v, v_row, key_exists, 0, DV, V)
        amplitude = tl.dot(qa, tl.trans(ka), input_precision="tf32x3") * a_scale
        phase = tl.dot(qp, tl.trans(kp), input_precision="tf32x3")
        visible, distance = _pairs(
            slot[:, None],
            exists[:, None],
            key[None, :],
            key_exists[None, :],
            b * Tk,
            first_key,
            real,
            place,
            DOCUMENTS,
            PADDING,
        )
        u, weight = _turn(phase, distance, power)
        cosine = _cosine(u)
        score = amplitude * cosine * 1.4426950408889634
        p = tl.exp2(tl.where(visible, score - log_sum[:, None], float("-inf")))
        ds = p * (tl.dot(d_output, tl.trans(value), input_precision="tf32x3") - own_delta[:, None])
        d_phase = ds * amplitude * (-6.283185307179586 * weight) * _sine(u)
        dqa = tl.dot((ds * cosine).to(ka.dtype), ka, dqa, input_precision="tf32x3")
        dqp = tl.dot(d_phase.to(kp.dtype), kp, dqp, input_precision="tf32x3")
    _store(dq, row * (DA + DP), exists, 0, dqa * a_scale, DA, A)
    _store(dq, row * (DA + DP), exists, DA, dqp, DP, P)


@triton.autotune(
    _configs(
        *((64, 64, 8, 2), (32, 64, 8, 2), (32, 64, 4, 2), (64, 32, 4, 2), WIDE, NARROW),
        *((16, 64, 4, 2), (16, 32, 4, 2)),
    ),
    key=_KEY,
    prune_configs_by={"early_config_prune": _fitting},
)
@triton.jit
def _key_gradient_kernel(
    q,
    k,
    v,
    do,
    lse,
    delta,
    dk,
    dv,
    power,
    first_key,
    end_of_document,
    real,
    place,
    q_b,
    q_h,
    q_t,
    k_b,
    k_h,
    k_t,
    v_b,
    v_h,
    v_t,
    KV_HEADS,
    Tq,
    Tk,
    offset,
    a_scale,
    GROUPS: tl.constexpr,
    DA: tl.constexpr,
    DP: tl.constexpr,
    DV: tl.constexpr,
    A: tl.constexpr,
    P: tl.constexpr,
    V: tl.constexpr,
    DOCUMENTS: tl.constexpr,
    PADDING: tl.constexpr,
    FEW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dk and dv: a block of keys meets the queries from its own slot on."""
    block = tl.program_id(0)
    b = (tl.program_id(1) // KV_HEADS).to(tl.int64)
    kv_head = (tl.program_id(1) % KV_HEADS).to(tl.int64)
    key = block * BLOCK_N + tl.arange(0, BLOCK_N)
    key_exists = key < Tk
    k_row = b * k_b + kv_head * k_h + key.to(tl.int64) * k_t
    ka = _load(k, k_row, key_exists, 0, DA, A)
    kp = _load(k, k_row, key_exists, DA, DP, P)
    v_row = b * v_b + kv_head * v_h + key.to(tl.int64) * v_t
    value = _load(v, v_row, key_exists, 0, DV, V)

    start = tl.maximum(block * BLOCK_N - offset, 0) * GROUPS
    end = Tq * GROUPS
    if DOCUMENTS:
        last = tl.minimum((block + 1) * BLOCK_N, Tk) - 1
        end = tl.minimum(end, (tl.load(end_of_document + b * Tk + last) - offset) * GROUPS)

    dka = tl.zeros((BLOCK_N, A), tl.float32)
    dkp = tl.zeros((BLOCK_N, P), tl.float32)
    d_value = tl.zeros((BLOCK_N, V), tl.float32)
    for m in range(start, end, BLOCK_M):
        exists, query, slot, group = _rows(0, m, Tq, offset, GROUPS, BLOCK_M)
        head = kv_head * GROUPS + group
        q_row = b * q_b + head * q_h + query.to(tl.int64) * q_t
        qa = _load(q, q_row, exists, 0, DA, A)
        qp = _load(q, q_row, exists, DA, DP, P)
        row = (b * KV_HEADS * GROUPS + head) * Tq + query
        d_output = _load(do, row * DV, exists, 0, DV, V)
        log_sum = tl.load(lse + row, mask=exists, other=0.0)
        log_sum = tl.where(log_sum == float("-inf"), 0.0, log_sum)
        own_delta = tl.load(delta + row, mask=exists, other=0.0)
        amplitude = tl.dot(ka, tl.trans(qa), input_precision="tf32x3") * a_scale
        phase = tl.dot(kp, tl.trans(qp), input_precision="tf32x3")
        visible, distance = _pairs(
            slot[None, :],
            exists[None, :],
            key[:, None],
            key_exists[:, None],
            b * Tk,
            first_key,
            real,
            place,
            DOCUMENTS,
            PADDING,
        )
        u, weight = _turn(phase, distance, power)
        cosine = _cosine(u)
        score = amplitude * cosine * 1.4426950408889634
        p = tl.exp2(tl.where(visible, score - log_sum[None, :], float("-inf")))
        d_value = tl.dot(p.to(d_output.dtype), d_output, d_value, input_precision="tf32x3")
        ds = p * (tl.dot(value, tl.trans(d_output), input_precision="tf32x3") - own_delta[None, :])
        d_phase = ds * amplitude * (-6.283185307179586 * weight) * _sine(u)
        dka = tl.dot((ds * cosine).to(qa.dtype), qa, dka, input_precision="tf32x3")
        dkp = tl.dot(d_phase.to(qp.dtype), qp, dkp, input_precision="tf32x3")

    row = ((b * KV_HEADS + kv_head) * Tk + key).to(tl.int64)
    _store(dk, row * (DA + DP), key_exists, 0, dka * a_scale, DA, A)
    _store(dk, row * (DA + DP), key_exists, DA, dkp, DP, P)
    _store(dv, row * DV, key_exists, 0, d_value, DV, V)


class _Call:
    """What every kernel of a call is told."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layout: Layout,
        amplitude_dim: int,
        phase_scale: float,
        phase_alpha: float,
    ) -> None:
        self.tensors = tuple(x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        self.groups, self.kv_heads = q.size(1) // k.size(1), k.size(1)
        self.batch, self.queries, self.keys = q.size(0), q.size(2), k.size(2)
        distances = torch.arange(k.size(2) + 1, dtype=torch.float64, device=k.device)
        self.power = (distances.pow(phase_alpha) * phase_scale).float()
        first, real = layout.first_key_BT, layout.real_BT
        self.first_key = self.power if first is None else first.int().contiguous()
        self.real = self.power if real is None else real.to(torch.int8).contiguous()
        self.place = self.power if real is None else real.cumsum(-1, dtype=torch.int32)
        self.end_of_document = self.power
        if first is not None:
            self.end_of_document = torch.searchsorted(
                self.first_key, self.first_key, right=True, out_int32=True
            )
        widths = amplitude_dim, q.size(3) - amplitude_dim, v.size(3)
        padded = [max(16, triton.next_power_of_2(width)) for width in widths]
        self.strides = [s for x in self.tensors for s in x.stride()[:3]]
        self.sizes = (self.kv_heads, self.queries, self.keys, layout.query_offset)
        self.a_scale = 1 / math.sqrt(amplitude_dim)
        self.constants = {
            "GROUPS": self.groups,
            **dict(zip(("DA", "DP", "DV"), widths, strict=True)),
            **dict(zip(("A", "P", "V"), padded, strict=True)),
            "DOCUMENTS": first is not None,
            "PADDING": real is not None,
            "FEW": self.groups * self.queries <= FEW_ROWS,
        }

    def row_blocks(self, meta: dict) -> int:
        return _blocks(self.groups * self.queries, meta["BLOCK_M"])


@torch.library.custom_op("trl_ext::tapa_triton", mutates_args=())
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
    splits: int,
) -> tuple[Tensor, Tensor]:
    """Output `(B, H, Tq, Dv)` and log₂ Σⱼ exp sᵢⱼ `(B, H, Tq)`, −∞ for a query that sees no key."""
    layout = Layout(query_offset, first_key_BT, real_BT)
    call = _Call(q, k, v, layout, amplitude_dim, phase_scale, phase_alpha)
    shape = (splits, *q.shape[:3])
    o = v.new_empty(*shape, v.size(3), dtype=v.dtype if splits == 1 else torch.float32)
    lse = q.new_empty(shape, dtype=torch.float32)
    with torch.cuda.device_of(q):
        _forward_kernel[lambda meta: (call.row_blocks(meta), splits, call.batch * call.kv_heads)](
            *(*call.tensors, o, lse, call.power, call.first_key, call.real, call.place),
            *(*call.strides, call.batch, *call.sizes, splits, call.a_scale),
            **call.constants,
        )
    if splits == 1:
        return o.squeeze(0), lse.squeeze(0)
    highest = lse.amax(0)
    share = torch.exp2(lse - highest.masked_fill(highest == -math.inf, 0))
    total = share.sum(0)
    merged = (o * share.unsqueeze(-1)).sum(0) / total.masked_fill(total == 0, 1).unsqueeze(-1)
    return merged.to(v.dtype), highest + total.log2()


@torch.library.register_fake("trl_ext::tapa_triton")
def _outputs(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    output = v.new_empty(*q.shape[:3], v.size(3))
    return output, q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("trl_ext::tapa_triton_backward", mutates_args=())
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    layout = Layout(query_offset, first_key_BT, real_BT)
    call = _Call(q, k, v, layout, amplitude_dim, phase_scale, phase_alpha)
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    delta, do = torch.empty_like(log_sum), d_output.contiguous()
    heads = call.batch * call.kv_heads
    shared = (*call.strides, *call.sizes, call.a_scale)
    with torch.cuda.device_of(q):
        _query_gradient_kernel[lambda meta: (call.row_blocks(meta), heads)](
            *(*call.tensors, output, do, log_sum, delta, dq),
            *(call.power, call.first_key, call.real, call.place, *shared),
            **call.constants,
        )
        _key_gradient_kernel[lambda meta: (_blocks(call.keys, meta["BLOCK_N"]), heads)](
            *(*call.tensors, do, log_sum, delta, dk, dv, call.power),
            *(call.first_key, call.end_of_document, call.real, call.place, *shared),
            **call.constants,
        )
    return dq, dk, dv


@torch.library.register_fake("trl_ext::tapa_triton_backward")
def _gradients(
    d_output: Tensor, output: Tensor, log_sum: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    q, k, v, query_offset, first_key_BT, real_BT, *form, _ = inputs
    ctx.query_offset, ctx.form = query_offset, form
    ctx.save_for_backward(*output, q, k, v, first_key_BT, real_BT)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, d_output: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if d_output is None:
        return (None,) * 10
    output, log_sum, q, k, v, first_key_BT, real_BT = ctx.saved_tensors
    seen = (ctx.query_offset, first_key_BT, real_BT)
    gradients = _backward(d_output, output, log_sum, q, k, v, *seen, *ctx.form)
    return (*gradients, *[None] * 7)


torch.library.register_autograd("trl_ext::tapa_triton", _differentiate, setup_context=_save)
