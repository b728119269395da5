"""The fused kernels against the float64 definition: on a GPU, or under Triton's interpreter."""

import itertools
import math

import pytest
import torch

from tests.ops.test_tapa import (
    PAPER,
    layouts,
    outputs_and_gradients,
    relative_error,
    tensors,
)
from trl_ext.ops import tapa_attention
from trl_ext.ops._shapes import make_layout

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
fused = pytest.importorskip("trl_ext.ops.tapa.triton")
_cosine, _sine = fused._cosine, fused._sine
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ALONE = {"attention_mask": None, "document_ids": None, "query_offset": None}


def small(T=37, dtype=torch.float32, **sizes):
    sizes = {"B": 1, "H": 2, "kv_heads": 1} | sizes
    return [x.to(DEVICE, dtype) for x in tensors(T=T, dtype=dtype, **sizes)]


def compare(qkv, limit, **arguments):
    """Largest error of the output and of each gradient, relative to the float64 definition."""
    arguments = {n: x.to(DEVICE) if torch.is_tensor(x) else x for n, x in arguments.items()}
    reference = outputs_and_gradients(
        *(x.double() for x in qkv), **arguments, implementation="naive"
    )
    got = outputs_and_gradients(*qkv, **arguments, implementation="triton")
    errors = [relative_error(x, y) for x, y in zip(got, reference, strict=True)]
    assert max(errors) < limit, errors


def test_plain_and_grouped():
    compare(small(), 1e-5)
    compare(small(T=18, B=2, H=6, kv_heads=2), 1e-5)


@pytest.mark.parametrize("layout", layouts(40)[1:], ids="+".join)
def test_padded_and_packed(layout):
    compare(small(T=40, B=2), 1e-5, **layout)


@pytest.mark.parametrize(("D", "fraction", "Dv"), [(24, 0.25, 5), (6, 0.5, 40), (48, 0.75, 32)])
def test_widths_that_are_no_power_of_two(D, fraction, Dv):
    compare(small(T=17, D=D, Dv=Dv), 1e-5, amplitude_fraction=fraction, phase_alpha=0.5)


def test_linear_phase():
    compare(small(), 1e-5, phase="linear")


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float16,
        pytest.param(
            torch.bfloat16,
            marks=pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter misreads bfloat16"),
        ),
    ],
)
def test_low_precision_keeps_the_phase_in_float32(dtype):
    # The weights are rounded before their product with v: 2^-9 of each in bf16, on average less.
    compare(small(D=32, dtype=dtype), 2**-7)
    compare(small(T=20, D=32, dtype=dtype), 2**-7, phase="linear")


@pytest.mark.parametrize(("queries", "offset"), [(1, 36), (1, 12), (5, 32), (5, 9)])
def test_queries_of_a_cache(queries, offset):
    mask = torch.ones(1, 37, dtype=torch.long)
    mask[0, :3] = 0
    qkv = small(queries=queries)
    compare(qkv, 1e-5, query_offset=offset)
    compare(qkv, 1e-5, query_offset=offset, attention_mask=mask)


@pytest.mark.parametrize("documents", [False, True])
def test_split_keys_equal_whole_keys(documents):
    q, k, v = small(T=100, queries=3)
    ids = (torch.arange(100, device=DEVICE) // 98)[None] if documents else None
    layout = make_layout(q, k, v, **(ALONE | {"document_ids": ids}))
    form = {"amplitude_dim": 4, "phase_scale": 0.5, "phase_alpha": 0.1}
    results = []
    for splits in (1, 2, 3, 7):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        o = fused.tapa(*leaves, layout, **form, splits=splits)
        results.append([o, *torch.autograd.grad(o.square().sum(), leaves)])
    for other in results[1:]:
        for x, y in zip(other, results[0], strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


def test_the_future_has_no_influence_at_all():
    q, k, v = small()
    before = tapa_attention(q, k, v, **PAPER, implementation="triton")
    k[:, :, 21:], v[:, :, 21:] = 7.0, -9.0
    after = tapa_attention(q, k, v, **PAPER, implementation="triton")
    assert (before[:, :, :21] - after[:, :, :21]).abs().max() == 0.0
    assert (before[:, :, 21:] - after[:, :, 21:]).abs().amin(dim=(0, 1, 3)).min() > 0
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    o = tapa_attention(q, k, v, **PAPER, implementation="triton")
    for gradient in torch.autograd.grad(o[:, :, :21].sum(), (q, k, v)):
        assert gradient[:, :, 21:].abs().max() == 0.0
        assert gradient[:, :, :20].abs().max() > 0


def test_queries_that_see_no_key_and_uninitialised_memory():
    """Buffers start as NaN here: whatever a kernel leaves unwritten shows."""
    mask = torch.ones(2, 37, dtype=torch.long, device=DEVICE)
    mask[0, :4], mask[1] = 0, 0
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # fills empty tensors with NaN
    try:
        results = outputs_and_gradients(*small(B=2), attention_mask=mask, implementation="triton")
    finally:
        torch.use_deterministic_algorithms(before)
    assert all(x.isfinite().all() for x in results)
    o, dq, *_ = results
    assert max(x[0, :, :4].abs().max() for x in (o, dq)) == 0.0
    assert max(x[1].abs().max() for x in results) == 0.0


def test_tensors_in_another_order_of_memory():
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in small(T=20, B=2, H=4))
    assert not q.is_contiguous()
    compare((q, k, v), 1e-5)
    wide = torch.zeros(*q.shape[:3], 2 * q.size(3), device=DEVICE)
    wide[..., ::2] = q
    compare((wide[..., ::2], k, v), 1e-5)


def test_as_an_operator_of_torch():
    q, k, v = (x.requires_grad_() for x in small(T=5))
    torch.library.opcheck(fused._forward, (q, k, v, 0, None, None, 4, 0.5, 0.1, 1))


@triton.jit
def _waves(u, cosine, sine, N: tl.constexpr):
    at = tl.arange(0, N)
    x = tl.load(u + at)
    tl.store(cosine + at, _cosine(x))
    tl.store(sine + at, _sine(x))


def test_cosine_and_sine_of_turns():
    u = torch.linspace(-0.5, 0.5, 4096, device=DEVICE)
    cosine, sine = torch.empty_like(u), torch.empty_like(u)
    _waves[(1,)](u, cosine, sine, 4096)
    for got, exact in ((cosine, torch.cos), (sine, torch.sin)):
        assert (got - exact(2 * math.pi * u.double())).abs().max() < 5e-7


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU: the interpreter is too slow")
@pytest.mark.parametrize("T", [63, 100, 1000])
def test_lengths_and_widths_of_models(T):
    for D, dtype in itertools.product([32, 64, 128, 256], [torch.float32, torch.bfloat16]):
        qkv = small(T=T, B=2, H=4, kv_heads=2, D=D, Dv=D, dtype=dtype)
        for layout in layouts(T):
            compare(qkv, 1e-5 if dtype == torch.float32 else 2**-6, **layout)
