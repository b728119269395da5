"""TAPA against its definition, its paper's golden numbers, and itself in other layouts."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ops.test_stickbreaking import DEVICE, every_implementation
from trl_ext.ops import tapa_attention
from trl_ext.ops._shapes import make_layout
from trl_ext.ops.tapa import chunked

EVERYWHERE = ["naive", "chunked"]
PAPER = {"amplitude_fraction": 0.5, "phase_alpha": 0.1}


def tensors(B=2, H=4, kv_heads=2, T=33, D=8, Dv=6, queries=None, dtype=torch.float64, seed=0):
    draw = torch.Generator().manual_seed(seed)
    sizes = (B, H, queries or T, D), (B, kv_heads, T, D), (B, kv_heads, T, Dv)
    return [torch.randn(size, generator=draw, dtype=torch.float64).to(dtype) for size in sizes]


def outputs_and_gradients(q, k, v, **arguments):
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    o = tapa_attention(*leaves, **(PAPER | arguments))
    weights = torch.cos(torch.arange(o.numel(), dtype=torch.float64)).view_as(o).to(o.dtype)
    return [o.detach(), *torch.autograd.grad((o * weights).sum(), leaves)]


def relative_error(x, reference):
    return ((x.double() - reference).norm() / reference.norm()).item()


def by_hand(q, k, v, amplitude_dim, alpha, phase):
    """Eq. 11-13 and 16 for one head, with lists and loops."""
    (T, D), A = (len(q), len(q[0])), amplitude_dim
    o = []
    for i in range(T):
        scores = []
        for j in range(i + 1):
            amplitude = sum(q[i][c] * k[j][c] for c in range(A)) / math.sqrt(A)
            if phase == "quadratic":
                phi = sum(q[i][c] * k[j][c] for c in range(A, D)) / math.sqrt(D - A)
            else:
                phi = sum(q[i][c] + k[j][c] for c in range(A, D)) / math.sqrt(D - A)
            scores.append(amplitude * math.cos(2 * math.pi * (i - j) ** alpha * phi))
        shares = [math.exp(score) for score in scores]
        o.append(
            [sum(s * v[j][c] for j, s in enumerate(shares)) / sum(shares) for c in range(len(v[0]))]
        )
    return torch.tensor(o, dtype=torch.float64)


@pytest.mark.parametrize("implementation", EVERYWHERE)
@pytest.mark.parametrize("phase", ["quadratic", "linear"])
@pytest.mark.parametrize(("fraction", "alpha"), [(0.5, 0.1), (0.25, 0.5), (0.75, 1.0)])
def test_equals_the_definition_pair_by_pair(implementation, phase, fraction, alpha):
    q, k, v = tensors(B=1, H=1, kv_heads=1, T=7)
    expected = by_hand(*(x[0, 0].tolist() for x in (q, k, v)), round(fraction * 8), alpha, phase)
    o = tapa_attention(
        *(q, k, v),
        amplitude_fraction=fraction,
        phase_alpha=alpha,
        phase=phase,
        implementation=implementation,
    )
    torch.testing.assert_close(o[0, 0], expected, rtol=0, atol=1e-13)


@every_implementation
def test_golden_example(implementation):
    dtype = torch.float32 if implementation == "triton" else torch.float64

    def table(rows):
        return torch.tensor(rows, dtype=dtype, device=DEVICE)[None, None].requires_grad_()

    q = table([[0.5, -0.3, 0.2, 0.4], [0.1, 0.8, -0.5, 0.3], [-0.7, 0.6, 0.9, -0.2]])
    k = table([[0.4, 0.2, -0.6, 0.5], [-0.3, 0.9, 0.1, 0.7], [0.8, -0.5, 0.3, -0.4]])
    v = table([[1, 0.5, -0.5, 0.2], [-0.4, 0.3, 0.8, -1], [0.6, -0.2, 0.1, 0.9]])
    weights = table([[0.3, -0.1, 0.2, 0.5], [-0.6, 0.4, 0.1, 0.2], [0.7, 0.2, -0.3, -0.4]])
    o = tapa_attention(q, k, v, **PAPER, implementation=implementation)
    loss = (o * weights).sum()
    dq, dk, dv = torch.autograd.grad(loss, (q, k, v))
    expected = {
        "o": [
            [1.000000, 0.500000, -0.500000, 0.200000],
            [0.113294, 0.373328, 0.323370, -0.560034],
            [0.231917, 0.285531, 0.250462, -0.288440],
        ],
        "dq": [
            [0.000000, 0.000000, 0.000000, 0.000000],
            [-0.014280, 0.104927, -0.051758, 0.043132],
            [-0.049216, -0.112886, -0.002125, -0.063498],
        ],
        "dk": [
            [0.105184, -0.050879, -0.052443, 0.027948],
            [0.088168, 0.018960, -0.074990, 0.016664],
            [0.021750, -0.018643, 0.000000, 0.000000],
        ],
        "dv": [
            [0.314508, 0.113653, 0.136167, 0.439333],
            [-0.028562, 0.353760, -0.087287, -0.074159],
            [0.114054, 0.032587, -0.048880, -0.065174],
        ],
    }
    for name, value in {"o": o, "dq": dq, "dk": dk, "dv": dv}.items():
        assert (value - table(expected[name])).abs().max() < 2e-6, name
    assert loss.item() == pytest.approx(0.511370, abs=1e-6)


def layouts(T):
    mask = torch.ones(2, T, dtype=torch.long)
    mask[1, :5], mask[1, T // 2 : T // 2 + 3] = 0, 0
    documents = (torch.arange(T) // 19).expand(2, T)
    return [
        {},
        {"attention_mask": mask},
        {"document_ids": documents},
        {"attention_mask": mask, "document_ids": documents},
    ]


@pytest.mark.parametrize("phase", ["quadratic", "linear"])
@pytest.mark.parametrize("T", [63, 100])
def test_float32_and_its_gradients_agree_with_the_float64_definition(T, phase):
    qkv = tensors(T=T, D=32, Dv=24)
    for layout in layouts(T):
        reference = outputs_and_gradients(*qkv, **layout, phase=phase, implementation="naive")
        for implementation, dtype, limit in [
            ("chunked", torch.float64, 1e-13),
            ("chunked", torch.float32, 1e-5),
            ("naive", torch.float32, 1e-5),
        ]:
            got = outputs_and_gradients(
                *(x.to(dtype) for x in qkv), **layout, phase=phase, implementation=implementation
            )
            errors = [relative_error(x, y) for x, y in zip(got, reference, strict=True)]
            assert max(errors) < limit, (implementation, dtype, layout.keys(), errors)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    kv_heads=st.integers(1, 2),
    groups=st.integers(1, 3),
    keys=st.integers(1, 12),
    queries=st.integers(1, 12),
    amplitude_dim=st.integers(1, 5),
    blocks=st.tuples(st.integers(1, 13), st.integers(1, 13)),
    alpha=st.sampled_from([0.1, 0.5, 1.0]),
    data=st.data(),
)
def test_any_shape_layout_and_block(
    kv_heads, groups, keys, queries, amplitude_dim, blocks, alpha, data
):
    queries = min(queries, keys)
    offset = data.draw(st.integers(0, keys - queries))
    bits = st.lists(st.integers(0, 1), min_size=2 * keys, max_size=2 * keys)
    mask = data.draw(st.none() | bits.map(lambda x: torch.tensor(x).view(2, keys)))
    documents = data.draw(st.none() | bits.map(lambda x: torch.tensor(x).view(2, keys)))
    q, k, v = tensors(H=kv_heads * groups, kv_heads=kv_heads, T=keys, D=6, queries=queries)
    seen = {"attention_mask": mask, "document_ids": documents, "query_offset": offset}
    form = {"amplitude_fraction": amplitude_dim / 6, "phase_alpha": alpha}
    reference = outputs_and_gradients(q, k, v, **seen, **form, implementation="naive")
    leaves = [x.requires_grad_() for x in (q, k, v)]
    o = chunked.tapa(
        *leaves,
        make_layout(q, k, v, **seen),
        amplitude_dim=amplitude_dim,
        phase_scale=1 / math.sqrt(6 - amplitude_dim),
        phase_alpha=alpha,
        query_block=blocks[0],
        key_block=blocks[1],
    )
    weights = torch.cos(torch.arange(o.numel(), dtype=torch.float64)).view_as(o)
    got = [o, *torch.autograd.grad((o * weights).sum(), leaves)]
    for x, y in zip(got, reference, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-11)


@pytest.mark.parametrize("layout", layouts(7), ids=lambda layout: "+".join(layout) or "plain")
def test_gradients_of_the_chunked_form_are_those_of_its_output(layout):
    q, k, v = (x.requires_grad_() for x in tensors(H=2, kv_heads=1, T=7, D=4, Dv=3))
    causal = make_layout(
        q, k, v, **(dict.fromkeys(("attention_mask", "document_ids", "query_offset")) | layout)
    )
    form = {"amplitude_dim": 2, "phase_scale": 0.7, "phase_alpha": 0.3}
    assert torch.autograd.gradcheck(
        lambda *qkv: chunked.tapa(*qkv, causal, **form, query_block=3, key_block=2), (q, k, v)
    )


@pytest.mark.parametrize("implementation", EVERYWHERE)
def test_the_future_has_no_influence_at_all(implementation):
    q, k, v = tensors(T=300, D=4, dtype=torch.float32)
    at = 131  # inside a block, on either side of which blocks are complete
    before = tapa_attention(q, k, v, **PAPER, implementation=implementation)
    k[:, :, at:], v[:, :, at:] = 7.0, -9.0
    after = tapa_attention(q, k, v, **PAPER, implementation=implementation)
    assert (before[:, :, :at] - after[:, :, :at]).abs().max() == 0.0
    assert (before[:, :, at:] - after[:, :, at:]).abs().amin(dim=(0, 1, 3)).min() > 0

    q, k, v = (x.requires_grad_() for x in (q, k, v))
    o = tapa_attention(q, k, v, **PAPER, implementation=implementation)
    for gradient in torch.autograd.grad(o[:, :, :at].sum(), (q, k, v)):
        assert gradient[:, :, at:].abs().max() == 0.0
        assert gradient[:, :, : at - 1].abs().max() > 0


@pytest.mark.parametrize("implementation", EVERYWHERE)
def test_padding_anywhere_changes_nothing(implementation):
    short, T = 21, 33
    qkv = tensors(B=1, T=short)
    alone = outputs_and_gradients(*qkv, implementation=implementation)
    for real in (
        torch.arange(T - short, T),  # left
        torch.arange(short),  # right
        torch.cat([torch.arange(4, 15), torch.arange(20, 30)]),  # both, and between
    ):
        padded = [torch.full((1, x.size(1), T, x.size(3)), 3.0, dtype=x.dtype) for x in qkv]
        for x, y in zip(padded, qkv, strict=True):
            x[:, :, real] = y
        mask = torch.zeros(1, T, dtype=torch.bool)
        mask[:, real] = True
        leaves = [x.requires_grad_() for x in padded]
        o = tapa_attention(*leaves, **PAPER, attention_mask=mask, implementation=implementation)
        weights = torch.cos(torch.arange(alone[0].numel(), dtype=torch.float64))
        loss = (o[:, :, real] * weights.view_as(alone[0])).sum()
        got = [o, *torch.autograd.grad(loss, leaves)]
        for x, y in zip(got, alone, strict=True):
            torch.testing.assert_close(x[:, :, real], y, rtol=0, atol=1e-12)
        assert got[2][:, :, ~mask[0]].abs().max() == 0.0


@pytest.mark.parametrize("implementation", EVERYWHERE)
def test_packing_equals_separate_rows(implementation):
    lengths = [5, 1, 130, 14]
    parts = [tensors(B=1, T=T, seed=T) for T in lengths]
    packed = [torch.cat(x, 2) for x in zip(*parts, strict=True)]
    ids = torch.repeat_interleave(torch.tensor([4, 9, 4, 0]), torch.tensor(lengths))[None]
    leaves = [x.requires_grad_() for x in packed]
    o = tapa_attention(*leaves, **PAPER, document_ids=ids, implementation=implementation)
    separate = [outputs_and_gradients(*part, implementation=implementation) for part in parts]
    weights = [torch.cos(torch.arange(x[0].numel(), dtype=torch.float64)) for x in separate]
    weights = torch.cat([w.view_as(x[0]) for w, x in zip(weights, separate, strict=True)], 2)
    got = [o, *torch.autograd.grad((o * weights).sum(), leaves)]
    for x, ys in zip(got, zip(*separate, strict=True), strict=True):
        torch.testing.assert_close(x, torch.cat(ys, 2), rtol=0, atol=1e-12)


@pytest.mark.parametrize("implementation", EVERYWHERE)
def test_cache_in_any_steps_equals_the_whole(implementation):
    q, k, v = tensors(T=33)
    mask = torch.ones(2, 33, dtype=torch.long)
    mask[1, :6] = 0
    for seen in ({}, {"attention_mask": mask}):
        whole = tapa_attention(q, k, v, **PAPER, **seen, implementation=implementation)
        for cuts in ([0, 9, 33], [0, 32, 33], [0, 20, 21, 22, 33]):
            for start, end in itertools.pairwise(cuts):
                step = {name: x[:, :end] for name, x in seen.items()}
                part = tapa_attention(
                    q[:, :, start:end],
                    k[:, :, :end],
                    v[:, :, :end],
                    **(PAPER | step),
                    implementation=implementation,
                )
                torch.testing.assert_close(part, whole[:, :, start:end], rtol=0, atol=1e-12)


@pytest.mark.parametrize("implementation", EVERYWHERE)
def test_static_cache_does_not_show_its_unwritten_end(implementation):
    q, k, v = tensors(T=33)
    written = tapa_attention(
        q[:, :, 9:20], k[:, :, :20], v[:, :, :20], **PAPER, implementation=implementation
    )
    mask = (torch.arange(33) < 20).expand(2, 33)
    for seen in ({}, {"attention_mask": mask}):
        o = tapa_attention(
            *(q[:, :, 9:20], k, v),
            **(PAPER | seen),
            query_offset=9,
            implementation=implementation,
        )
        torch.testing.assert_close(o, written, rtol=0, atol=1e-12)


def test_default_blocks_do_not_show():
    q, k, v = tensors(B=1, H=2, kv_heads=1, T=700, D=4)
    reference = outputs_and_gradients(q, k, v, implementation="naive")
    got = outputs_and_gradients(q, k, v, implementation="chunked")
    for x, y in zip(got, reference, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-11)


@pytest.mark.parametrize("implementation", EVERYWHERE)
def test_rows_and_heads_do_not_mix(implementation):
    q, k, v = tensors(B=3)
    order = torch.tensor([2, 0, 1])
    o = tapa_attention(q, k, v, **PAPER, implementation=implementation)
    shuffled = tapa_attention(q[order], k[order], v[order], **PAPER, implementation=implementation)
    torch.testing.assert_close(shuffled, o[order], rtol=0, atol=1e-14)
    repeated = (x.repeat_interleave(2, 1) for x in (k, v))
    one_each = tapa_attention(q, *repeated, **PAPER, implementation=implementation)
    torch.testing.assert_close(one_each, o, rtol=0, atol=1e-14)


@pytest.mark.parametrize("implementation", EVERYWHERE)
def test_a_single_key_gives_its_value_and_no_gradient_to_scores(implementation):
    o, dq, dk, _ = outputs_and_gradients(*(qkv := tensors(T=1)), implementation=implementation)
    assert torch.equal(o, qkv[2].repeat_interleave(2, 1))
    assert max(dq.abs().max(), dk.abs().max()) < 1e-14


@pytest.mark.parametrize("implementation", EVERYWHERE)
def test_without_a_phase_it_is_softmax_attention_on_the_amplitude(implementation):
    q, k, v = tensors()
    expected = F.scaled_dot_product_attention(
        q[..., :4], k[..., :4], v, is_causal=True, enable_gqa=True
    )
    for zero in (q, k):
        silent = zero.clone()
        silent[..., 4:] = 0
        pair = (silent, k) if zero is q else (q, silent)
        o = tapa_attention(*pair, v, **PAPER, implementation=implementation)
        torch.testing.assert_close(o, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("implementation", EVERYWHERE)
def test_the_phase_has_no_sign(implementation):
    q, k, v = tensors()
    turned = torch.cat([q[..., :4], -q[..., 4:]], -1)
    o = tapa_attention(q, k, v, **PAPER, implementation=implementation)
    assert torch.equal(tapa_attention(turned, k, v, **PAPER, implementation=implementation), o)


@pytest.mark.parametrize("implementation", EVERYWHERE)
def test_queries_that_see_no_key_give_zero_and_finite_gradients(implementation):
    mask = torch.ones(2, 33, dtype=torch.long)
    mask[0, :4], mask[1] = 0, 0
    results = outputs_and_gradients(*tensors(), attention_mask=mask, implementation=implementation)
    assert all(x.isfinite().all() for x in results)
    o, dq, dk, dv = results
    for x in (o, dq):
        assert x[0, :, :4].abs().max() == 0.0 and x[0, :, 5:].abs().amin(-1).min() > 0
    assert all(x[1].abs().max() == 0.0 for x in (o, dq, dk, dv))


@pytest.mark.parametrize("implementation", EVERYWHERE)
def test_many_turns_cost_little_precision(implementation):
    q, k, v = tensors(B=1, T=100, D=32)
    q[..., 16:] *= 4  # a standard deviation of 4 turns before the power of the distance
    reference = tapa_attention(q, k, v, **PAPER, implementation="naive")
    o = tapa_attention(q.float(), k.float(), v.float(), **PAPER, implementation=implementation)
    assert relative_error(o, reference) < 1e-5


@pytest.mark.parametrize("implementation", EVERYWHERE)
def test_low_precision_is_paid_once_for_the_inputs(implementation):
    rounded = tensors(T=100, D=32, dtype=torch.bfloat16)
    exact = outputs_and_gradients(*(x.double() for x in rounded), implementation="naive")
    got = outputs_and_gradients(*rounded, implementation=implementation)
    assert all(x.dtype == torch.bfloat16 for x in got)
    # Rounding the result itself costs 2^-9 at most; a phase in bf16 would cost 2 %.
    assert relative_error(got[0], exact[0]) < 2**-9
    assert max(relative_error(x, y) for x, y in zip(got[1:], exact[1:], strict=True)) < 2**-7


@pytest.mark.parametrize("implementation", EVERYWHERE)
@pytest.mark.parametrize("phase", ["quadratic", "linear"])
def test_autocast_does_not_reach_the_scores(implementation, phase):
    arguments = {"implementation": implementation, "phase": phase}
    qkv = tensors(T=40, D=16, dtype=torch.float32)
    plain = outputs_and_gradients(*qkv, **arguments)
    with torch.autocast("cpu", torch.bfloat16):
        inside = outputs_and_gradients(*qkv, **arguments)
    assert torch.equal(inside[0], plain[0])
    if implementation == "chunked":
        assert all(torch.equal(x, y) for x, y in zip(inside, plain, strict=True))


@pytest.mark.parametrize("layout", layouts(40), ids=lambda layout: "+".join(layout) or "plain")
def test_compiled_as_one_graph(layout):
    qkv = tensors(T=40, dtype=torch.float32)
    torch.compiler.reset()
    compiled = torch.compile(tapa_attention, fullgraph=True, backend="aot_eager")
    leaves = [x.clone().requires_grad_() for x in qkv]
    o = compiled(*leaves, **PAPER, **layout, implementation="chunked")
    weights = torch.cos(torch.arange(o.numel(), dtype=torch.float64)).view_as(o).float()
    got = [o, *torch.autograd.grad((o * weights).sum(), leaves)]
    for x, y in zip(
        got, outputs_and_gradients(*qkv, **layout, implementation="chunked"), strict=True
    ):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-6)


def largest_allocation(implementation, T):
    """Bytes of the largest tensor that one forward and backward pass asks for."""
    q, k, v = tensors(B=1, H=1, kv_heads=1, T=T, D=4, Dv=4, dtype=torch.float32)
    with torch.profiler.profile(profile_memory=True) as profile:
        outputs_and_gradients(q, k, v, implementation=implementation)
    return max(event.self_cpu_memory_usage for event in profile.events())


def test_memory_of_the_chunked_form_does_not_grow_with_the_square():
    scores = 1024 * 1024 * 4
    assert largest_allocation("naive", 1024) >= scores  # the measure sees a dense matrix
    assert largest_allocation("chunked", 1024) <= scores / 16


def test_what_the_paper_does_not_mean_is_refused():
    q, k, v = tensors()
    cases = [
        ({"amplitude_fraction": 0.0}, "amplitude_fraction=0.0 of head width 8"),
        ({"amplitude_fraction": 1.0}, "amplitude_fraction=1.0"),
        ({"amplitude_fraction": 0.3}, "whole number from 1 to 7"),
        ({"amplitude_fraction": math.nan}, "amplitude_fraction=nan"),
        ({"phase_alpha": 0.0}, "phase_alpha=0.0"),
        ({"phase_alpha": math.inf}, "phase_alpha=inf"),
        ({"phase": "cubic"}, "phase='cubic'"),
        ({"implementation": "flash"}, "implementation='flash' does not exist"),
        ({"attention_mask": torch.ones(2, 1, 33, 33)}, "attention_mask has shape"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            tapa_attention(q, k, v, **(PAPER | arguments))
    assert torch.equal(
        tapa_attention(q, k, v, **PAPER), tapa_attention(q, k, v, **PAPER, implementation="chunked")
    )
