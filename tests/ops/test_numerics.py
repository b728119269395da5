"""Every implementation of both attentions against its definition in float64: one bound for all.

Float32 outputs and gradients within 1e-5 of the float64 definition, relative to its norm, whatever
the length, the width of a head, padding, packing or cache.
"""

from functools import partial

import pytest
import torch

from tests.ops.test_stickbreaking import CUDA, DEVICE, kernels_run
from trl_ext.ops import stickbreaking_attention, tapa_attention
from trl_ext.ops._choice import best_of, fitting_tiles

LIMIT = {torch.float32: 1e-5, torch.float16: 2**-7, torch.bfloat16: 2**-5}
needs_triton = pytest.mark.skipif(not kernels_run(), reason="needs triton, and CUDA or interpreter")
interpreted = pytest.mark.skipif(CUDA, reason="only Triton's interpreter takes so long")
CASES = [
    *(("naive", T, 32, torch.float32) for T in (63, 100, 1000)),
    *(("chunked", T, 32, torch.float32) for T in (63, 100, 1000)),
    *(("chunked", 63, D, torch.float32) for D in (64, 128, 256)),
    *(("chunked", 63, 32, dtype) for dtype in (torch.float16, torch.bfloat16)),
]
SMALL = [
    *(("triton", T, 32, torch.float32) for T in (63, 100, 1000)),
    *(("triton", 33, D, torch.float32) for D in (64, 128, 256)),
    ("triton", 33, 64, torch.float16),
]
ON_A_GPU = [
    ("triton", T, D, dtype) for T in (63, 100, 1000) for D in (32, 64, 128, 256) for dtype in LIMIT
]


def tapa(q, k, v, **options):
    return (tapa_attention(q, k, v, amplitude_fraction=0.5, phase_alpha=0.1, **options),)


ATTENTIONS = {"tapa": tapa, "stickbreaking": stickbreaking_attention}


def layouts(T):
    """Plain, padded, packed and cached: options, and the number of queries."""
    slots = torch.arange(T, device=DEVICE).repeat(2, 1)
    padded = (slots >= torch.tensor([[0], [7]], device=DEVICE)) & (slots % 10 != 4)
    lengths = torch.tensor([0, 5, 6, T // 2, T], device=DEVICE)  # cu_seqlens
    packed = torch.bucketize(slots, lengths[1:], right=True)
    return {
        "plain": ({}, T),
        "padded": ({"attention_mask": padded}, T),
        "packed": ({"document_ids": packed}, T),
        "cached": ({"attention_mask": padded}, 9),
        "decoding": ({"attention_mask": padded, "query_offset": T - 3}, 1),
    }


def inputs(T, D, queries, dtype, lowered=6.0):
    draw = torch.Generator().manual_seed(0)
    heads = 2 if CUDA else 1
    sizes = (2, 2 * heads, queries, D), (2, heads, T, D), (2, heads, T, D)
    q, k, v = (torch.randn(size, generator=draw) for size in sizes)
    q[..., 0], k[..., 0] = lowered, -(D**0.5)  # sticks that last
    return [x.to(DEVICE, dtype) for x in (q, k, v)]


def results(attention, qkv, implementation, options):
    """Outputs and the gradients of a sum that weighs each number differently."""
    leaves = [x.detach().clone().requires_grad_() for x in qkv]  # with the tensor's strides
    outputs = ATTENTIONS[attention](*leaves, implementation=implementation, **options)
    weights = [torch.arange(x.numel(), dtype=torch.float64).cos().view_as(x) for x in outputs]
    loss = sum((x.double() * w.to(DEVICE)).sum() for x, w in zip(outputs, weights, strict=True))
    return [*outputs, *torch.autograd.grad(loss, leaves)]


def name_of(case):
    return "-".join(str(x).removeprefix("torch.") for x in case)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize(
    "case",
    [
        *CASES,
        *(
            pytest.param(case, marks=[needs_triton, interpreted], id=name_of(case))
            for case in SMALL
        ),
        *(
            pytest.param(
                case, marks=pytest.mark.skipif(not CUDA, reason="needs a GPU"), id=name_of(case)
            )
            for case in ON_A_GPU
        ),
    ],
    ids=name_of,
)
def test_within_the_bound_of_the_float64_definition(attention, case):
    implementation, T, D, dtype = case
    cases = layouts(T)
    if implementation == "triton" and not CUDA and T != 63:
        # The interpreter takes its time: minutes for a thousand queries.
        cases = {name: cases[name] for name in (["cached"] if T == 1000 else ["plain"])}
    for name, (options, queries) in cases.items():
        qkv = inputs(T, D, queries, dtype)
        found = results(attention, qkv, implementation, options)
        expected = results(attention, [x.double() for x in qkv], "naive", options)
        for i, (x, y) in enumerate(zip(found, expected, strict=True)):
            error = ((x.double() - y.double()).norm() / y.double().norm()).item()
            assert error < LIMIT[dtype], (name, i, error)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize(
    "implementation", ["naive", "chunked", pytest.param("triton", marks=needs_triton)]
)
@pytest.mark.parametrize("cached", [20, 29])
def test_a_mask_alone_places_one_query_in_a_static_cache(attention, implementation, cached):
    """As a compiled model decodes: the number of cached keys is a tensor, and no integer."""
    options = layouts(30)["padded"][0]
    dtype = torch.float32 if implementation == "triton" else torch.float64
    q, k, v = inputs(30, 16, 30, dtype, lowered=2.0)
    written = {name: x[:, : cached + 1] for name, x in options.items()}
    expected = ATTENTIONS[attention](
        *(x[:, :, : cached + 1].double() for x in (q, k, v)), implementation="naive", **written
    )
    k[:, :, cached + 1 :], v[:, :, cached + 1 :] = 7.0, -9.0
    slots, place = torch.arange(30, device=DEVICE), torch.tensor(cached, device=DEVICE)
    filled = slots < place if attention == "stickbreaking" else slots <= place
    mask = options["attention_mask"] & filled
    query = q[:, :, cached : cached + 1]
    found = ATTENTIONS[attention](query, k, v, attention_mask=mask, implementation=implementation)
    for x, y in zip(found, expected, strict=True):
        error = (x - y[:, :, cached : cached + 1]).abs().max()
        assert error < (1e-5 if implementation == "triton" else 1e-12)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("T", [8, 33, 300])
def test_how_tensors_lie_in_memory_changes_not_a_bit(attention, T):
    """A cache lays keys out otherwise than a projection: it must not show in what is trained."""
    draw = torch.Generator().manual_seed(0)
    qkv = [torch.randn(2, heads, T, 16, generator=draw) for heads in (4, 2, 2)]
    projected = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv]
    assert not any(x.is_contiguous() for x in projected)
    found, expected = (results(attention, x, "chunked", {}) for x in (projected, qkv))
    for x, y in zip(found, expected, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize(
    ("device", "dtype", "width", "installed", "chosen"),
    [
        ("cuda", torch.bfloat16, 256, True, "triton"),
        ("cuda", torch.float32, 64, True, "triton"),
        ("cuda", torch.float64, 64, True, "chunked"),
        ("cuda", torch.bfloat16, 64, False, "chunked"),
        ("cuda", torch.bfloat16, 320, True, "chunked"),
        ("cpu", torch.bfloat16, 64, True, "chunked"),
    ],
)
def test_the_device_chooses(device, dtype, width, installed, chosen, monkeypatch):
    monkeypatch.setattr("trl_ext.ops._choice._has_triton", lambda: installed)
    assert best_of(torch.device(device), dtype, width) == chosen


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_forward_mode_gradients_are_right_or_refused(attention):
    draw = torch.Generator().manual_seed(0)
    kinds = {"generator": draw, "dtype": torch.float64}
    qkv, step = (tuple(torch.randn(1, 2, 9, 4, **kinds) for _ in range(3)) for _ in range(2))

    def output(*qkv):
        return ATTENTIONS[attention](*qkv, implementation="naive")[0]

    _, slope = torch.func.jvp(output, qkv, step)
    near = [output(*(x + h * dx for x, dx in zip(qkv, step, strict=True))) for h in (1e-6, -1e-6)]
    torch.testing.assert_close(slope, (near[0] - near[1]) / 2e-6, rtol=1e-6, atol=1e-6)
    for implementation in ("chunked", None):
        with pytest.raises(ValueError, match="no forward-mode gradients"):
            attend = partial(ATTENTIONS[attention], implementation=implementation)
            torch.func.jvp(lambda *x, f=attend: f(*x)[0], qkv, step)


class Tile:
    def __init__(self, queries, keys, stages):
        self.kwargs, self.num_stages = {"BLOCK_M": queries, "BLOCK_N": keys}, stages


def test_tiles_that_no_chip_has_room_for_are_not_tried():
    tiles = [Tile(128, 64, 2), Tile(64, 64, 2), Tile(32, 32, 1)]
    assert fitting_tiles(tiles, 256) == tiles
    assert fitting_tiles(tiles, 512) == tiles[1:]
    assert fitting_tiles(tiles, 1024) == tiles[2:]
    assert fitting_tiles(tiles, 8192) == tiles[2:]
