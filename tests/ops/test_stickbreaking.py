import importlib.util

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_ext.ops._shapes import make_layout
from trl_ext.ops.stickbreaking import chunked, stickbreaking_attention

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"


def kernels_run():
    """Whether Triton has a GPU, or was told to interpret before its first import."""
    if importlib.util.find_spec("triton") is None:
        return False
    import triton.language as tl

    return CUDA or type(tl.sum).__name__ == "InterpretedFunction"


needs_triton = pytest.mark.skipif(
    not kernels_run(), reason="needs triton, and CUDA or TRITON_INTERPRET=1 when it is imported"
)
IMPLEMENTATIONS = ["naive", "chunked", pytest.param("triton", marks=needs_triton)]
every_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


def heads(rows):
    """A matrix as the only row and head of a batch."""
    return torch.tensor(rows, device=DEVICE)[None, None]


Q = heads([[0.3, -0.5], [0.9, 0.4], [-0.6, 1.1], [0.7, -0.2]])
K = heads([[0.5, 0.8], [-0.4, 0.6], [1.2, -0.3], [0.1, 0.9]])
V = heads([[1, -0.5], [0.2, 0.7], [-0.8, 0.4], [0.6, 1.1]])
W = heads([[0.4, -0.3], [-0.2, 0.5], [0.6, 0.1], [-0.7, 0.8]])
U = heads([0.5, -0.4, 0.3, 0.2])
R = torch.tensor([0.25, -0.75], device=DEVICE)
# What becomes of the remainder, as the paper's versions have it.
REMAINDER = {
    "none": lambda output, rem, v: (output * W).sum(),
    "own": lambda output, rem, v: (output * W).sum() + (rem * U).sum(),
    "bias": lambda output, rem, v: ((output + rem[..., None] * R) * W).sum(),
    "value": lambda output, rem, v: ((output + rem[..., None] * v) * W).sum(),
}
GOLDEN_DV = [[-0.075458, 0.421459], [0.288257, 0.184372], [-0.457757, 0.523151], [0, 0]]


@every_implementation
@pytest.mark.parametrize(
    ("attend_current", "weights", "remainder"),
    [
        (
            False,
            [
                [0, 0, 0, 0],
                [0.632852, 0, 0, 0],
                [0.208024, 0.653938, 0, 0],
                [0.105288, 0.148722, 0.653938, 0],
            ],
            [1, 0.367148, 0.138038, 0.092051],
        ),
        (
            True,
            [
                [0.455921, 0, 0, 0],
                [0.329843, 0.478800, 0, 0],
                [0.140943, 0.443065, 0.322466, 0],
                [0.054690, 0.077252, 0.339679, 0.480564],
            ],
            [0.544079, 0.191358, 0.093525, 0.047815],
        ),
    ],
)
def test_golden_weights(implementation, attend_current, weights, remainder):
    options = {"attend_current": attend_current, "implementation": implementation}
    unit = torch.eye(4, device=DEVICE)[None, None]  # the output of unit values is the weights
    found, rem = stickbreaking_attention(Q, K, unit, **options)
    torch.testing.assert_close(found, heads(weights), rtol=0, atol=1e-6)
    torch.testing.assert_close(rem, heads(remainder), rtol=0, atol=1e-6)


@every_implementation
@pytest.mark.parametrize(
    ("attend_current", "mode", "loss", "dq", "dk", "dv"),
    [
        (
            *(False, "none", 0.475990),
            [[0, 0], [-0.036967, -0.059147], [0.025136, 0.012316], [0.155333, -0.043978]],
            [[-0.112643, 0.013564], [0.055768, -0.036828], [0.115842, -0.033098], [0, 0]],
            GOLDEN_DV,
        ),
        (
            *(False, "own", 0.888953),
            [[0, 0], [-0.004107, -0.006572], [0.023994, -0.013255], [0.143883, -0.050338]],
            [[-0.047797, 0.021879], [0.063341, -0.056772], [0.109883, -0.031395], [0, 0]],
            GOLDEN_DV,
        ),
        (
            *(False, "bias", 0.583966),
            [[0, 0], [-0.002054, -0.003286], [0.024850, 0.005923], [0.199704, -0.019336]],
            [[-0.028319, 0.031271], [0.073815, -0.046429], [0.138934, -0.039695], [0, 0]],
            GOLDEN_DV,
        ),
        (
            *(False, "value", 1.121413),
            [[0, 0], [-0.062433, -0.099892], [0.026810, 0.049820], [0.128997, -0.058605]],
            [[-0.185154, 0.024785], [0.029909, -0.003361], [0.102136, -0.029182], [0, 0]],
            [
                [0.324542, 0.121459],
                [0.214828, 0.367946],
                [-0.374934, 0.536954],
                [-0.064436, 0.073641],
            ],
        ),
        (
            *(True, "own", 0.995952),
            [
                [0.004385, 0.007016],
                [-0.054489, 0.075096],
                [-0.117236, 0.024392],
                [0.073317, -0.038939],
            ],
            [
                [-0.023601, 0.009525],
                [0.154635, 0.015615],
                [0.123823, -0.138676],
                [-0.009949, 0.002843],
            ],
            [
                [0.162682, 0.085992],
                [0.116003, 0.345508],
                [-0.044296, 0.303990],
                [-0.336395, 0.384451],
            ],
        ),
    ],
)
def test_golden_gradients(implementation, attend_current, mode, loss, dq, dk, dv):
    q, k, v = leaves(Q, K, V)
    options = {"attend_current": attend_current, "implementation": implementation}
    found = REMAINDER[mode](*stickbreaking_attention(q, k, v, **options), v)
    assert abs(found.item() - loss) < 2e-6
    for gradient, expected in zip(torch.autograd.grad(found, (q, k, v)), (dq, dk, dv), strict=True):
        torch.testing.assert_close(gradient, heads(expected), rtol=0, atol=1e-6)


def leaves(*tensors):
    return [x.detach().clone().requires_grad_() for x in tensors]


def random_inputs(B=1, H=2, Hkv=1, Tq=20, Tk=None, D=16, Dv=None, offset=0.0, seed=0):
    """q, k and v in float32; `offset` lowers every logit, so that the sticks last longer."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(H, Tq, D), (Hkv, Tk or Tq, D), (Hkv, Tk or Tq, Dv or D)]
    q, k, v = (torch.randn(B, *shape, generator=generator) for shape in shapes)
    q[..., 0] = q[..., 0].abs() + offset
    k[..., 0] = -k[..., 0].abs() - offset
    return [x.to(DEVICE) for x in (q, k, v)]


def everything(q, k, v, dtype=None, attention=stickbreaking_attention, **options):
    """Output, remainder and the gradients of a loss that weighs both."""
    q, k, v = leaves(*(x.to(dtype or x.dtype) for x in (q, k, v)))
    output, rem = attention(q, k, v, **options)
    generator = torch.Generator().manual_seed(1)
    draw = [torch.randn(x.shape, generator=generator).to(x) for x in (output, rem)]
    loss = (output * draw[0]).sum() + (rem * draw[1]).sum()
    return output.detach(), rem.detach(), *torch.autograd.grad(loss, (q, k, v))


def distance(found, expected):
    """‖found − expected‖ / ‖expected‖ of each tensor, the largest."""
    pairs = zip(found, expected, strict=True)
    return max(((a.double() - b).norm() / b.norm().clamp_min(1e-300)).item() for a, b in pairs)


def tiled(block):
    """The chunked form with tiles of this size."""

    def attention(q, k, v, attend_current=False, **masks):
        names = ("attention_mask", "document_ids", "query_offset")
        layout = make_layout(q, k, v, **{name: masks.get(name) for name in names})
        form = {"scale": q.size(3) ** -0.5, "attend_current": attend_current, "block": block}
        return chunked.stickbreaking(q, k, v, layout, **form)

    return attention


@every_implementation
@pytest.mark.parametrize("attend_current", [False, True])
@pytest.mark.parametrize(("T", "offset"), [(63, 0.0), (100, 1.5)])
def test_float32_is_close_to_the_float64_reference(implementation, T, offset, attend_current):
    inputs = random_inputs(Tq=T, D=32, Dv=24, offset=offset)
    options = {"attend_current": attend_current}
    found = everything(*inputs, implementation=implementation, **options)
    expected = everything(*inputs, dtype=torch.float64, implementation="naive", **options)
    assert distance(found, expected) < 3e-6


@pytest.mark.parametrize("offset", [0.0, 2.0])
def test_float32_error_does_not_grow_with_the_length(offset):
    # Peeling shares off a saved total errs by 4e-5 here.
    inputs = random_inputs(H=1, Tq=1500, D=64, offset=offset)
    found = everything(*inputs, implementation="chunked")
    expected = everything(*inputs, dtype=torch.float64, implementation="naive")
    assert distance(found, expected) < 1e-6


@every_implementation
def test_weights_are_shares_of_a_stick(implementation):
    """The definition in words: walk backwards, take βⱼ of what is left, leave the rest."""
    q, k, _ = random_inputs(H=1, Tq=7, D=4)
    unit = torch.eye(7, device=DEVICE)[None, None]
    weights, rem = stickbreaking_attention(q, k, unit, scale=0.7, implementation=implementation)
    for i in range(7):
        stick = 1.0
        for j in reversed(range(i)):
            beta = torch.sigmoid(0.7 * q[0, 0, i].double() @ k[0, 0, j].double()).item()
            assert weights[0, 0, i, j].item() == pytest.approx(stick * beta, rel=1e-5)
            stick *= 1 - beta
        assert rem[0, 0, i].item() == pytest.approx(stick, rel=1e-5)
    assert not weights.triu().any()
    torch.testing.assert_close(weights.sum(-1) + rem, torch.ones_like(rem))


@every_implementation
def test_equal_logits_halve_the_stick(implementation):
    _, k, _ = random_inputs(H=1, Tq=6)
    unit = torch.eye(6, device=DEVICE)[None, None]
    options = {"attend_current": True, "implementation": implementation}
    weights, rem = stickbreaking_attention(torch.zeros_like(k), k, unit, **options)
    half = torch.tensor([[0.5 ** (i - j + 1) * (j <= i) for j in range(6)] for i in range(6)])
    torch.testing.assert_close(weights[0, 0], half.to(DEVICE))
    torch.testing.assert_close(rem[0, 0], half[:, 0].to(DEVICE))


@every_implementation
def test_extreme_logits(implementation):
    q, v = torch.ones(1, 1, 5, 1, device=DEVICE), torch.randn(1, 1, 5, 3, device=DEVICE)
    keen, idle = torch.full_like(q, 300.0), torch.full_like(q, -300.0)
    output, rem = stickbreaking_attention(q, keen, v, implementation=implementation)
    torch.testing.assert_close(output[:, :, 1:], v[:, :, :-1])
    assert torch.equal(rem, torch.eye(5, device=DEVICE)[None, None, 0])
    output, rem = stickbreaking_attention(q, idle, v, implementation=implementation)
    assert not output.any()
    assert torch.equal(rem, torch.ones_like(rem))
    for found in (keen, idle):
        gradients = everything(q, found, v, implementation=implementation)
        assert all(x.isfinite().all() for x in gradients)


@every_implementation
def test_first_query_and_last_key_stand_alone(implementation):
    output, rem, dq, dk, dv = everything(*random_inputs(), implementation=implementation)
    assert not output[:, :, 0].any()
    assert torch.equal(rem[:, :, 0], torch.ones_like(rem[:, :, 0]))
    assert not dq[:, :, 0].any()
    assert not dk[:, :, -1].any()
    assert not dv[:, :, -1].any()


@every_implementation
@pytest.mark.parametrize("attend_current", [False, True])
def test_causal_to_the_bit(implementation, attend_current):
    q, k, v = random_inputs(Tq=40)
    options = {"attend_current": attend_current, "implementation": implementation}
    at = 17
    changed = [x.clone() for x in (k, v)]
    for x in changed:
        x[:, :, at + attend_current :] += 1e4
    for found, same in zip(
        stickbreaking_attention(q, *changed, **options),
        stickbreaking_attention(q, k, v, **options),
        strict=True,
    ):
        assert torch.equal(found[:, :, : at + 1], same[:, :, : at + 1])
        assert not torch.equal(found, same)


@every_implementation
def test_left_padding_changes_nothing(implementation):
    q, k, v = random_inputs(B=2, Tq=21)
    pad = 5
    mask = torch.ones(2, 21 + pad, dtype=torch.long, device=DEVICE)
    mask[:, :pad] = 0
    padded = [torch.cat([x[:, :, :pad] * 100, x], 2) for x in (q, k, v)]
    alone = everything(q, k, v, implementation=implementation)
    q, k, v = leaves(*padded)
    output, rem = stickbreaking_attention(
        q, k, v, attention_mask=mask, implementation=implementation
    )
    assert not output[:, :, :pad].any()
    assert torch.equal(rem[:, :, :pad], torch.ones_like(rem[:, :, :pad]))
    generator = torch.Generator().manual_seed(1)
    draw = [torch.randn(x.shape, generator=generator).to(x) for x in alone[:2]]
    loss = (output[:, :, pad:] * draw[0]).sum() + (rem[:, :, pad:] * draw[1]).sum()
    gradients = torch.autograd.grad(loss, (q, k, v))
    found = [x[:, :, pad:] for x in (output, rem, *gradients)]
    assert distance(found, [x.double() for x in alone]) < 1e-6
    assert not any(x[:, :, :pad].any() for x in gradients)


@every_implementation
def test_a_hidden_key_leaves_the_stick_whole(implementation):
    q, k, v = random_inputs(Tq=30)
    mask = torch.arange(30, device=DEVICE)[None] % 4 != 1
    keep = mask[0].nonzero()[:, 0]
    last = {"implementation": implementation}
    found = stickbreaking_attention(q[:, :, -1:], k, v, attention_mask=mask, **last)
    kept = (x[:, :, keep] for x in (k, v))
    # Slot 29 is hidden, so that the query is its own last key in neither call.
    expected = stickbreaking_attention(q[:, :, -1:], *kept, attend_current=True, **last)
    assert not mask[0, 29]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@every_implementation
def test_packed_equals_separate(implementation):
    q, k, v = random_inputs(B=2, Tq=45)
    lengths = [7, 1, 20, 17]
    number = torch.repeat_interleave(torch.tensor([3, 1, 2, 3]), torch.tensor(lengths))
    number = number.to(DEVICE)[None].expand(2, -1)
    packed = everything(q, k, v, document_ids=number, implementation=implementation)
    generator = torch.Generator().manual_seed(1)
    draw = [torch.randn(x.shape, generator=generator).to(x) for x in packed[:2]]
    for part in torch.arange(45).split(lengths):
        cut = slice(part[0], part[-1] + 1)
        inputs = leaves(*(x[:, :, cut] for x in (q, k, v)))
        output, rem = stickbreaking_attention(*inputs, implementation=implementation)
        loss = (output * draw[0][:, :, cut]).sum() + (rem * draw[1][:, :, cut]).sum()
        alone = (output, rem, *torch.autograd.grad(loss, inputs))
        for a, b in zip(packed, alone, strict=True):
            torch.testing.assert_close(a[:, :, cut], b, rtol=1e-5, atol=2e-6)


@every_implementation
@pytest.mark.parametrize("attend_current", [False, True])
def test_cached_equals_full(implementation, attend_current):
    q, k, v = random_inputs(H=4, Hkv=2, Tq=37)
    options = {"attend_current": attend_current, "implementation": implementation}
    full = stickbreaking_attention(q, k, v, **options)
    for begin, end in ((0, 20), (20, 36), (36, 37)):  # two parts of a prompt, then one token
        new = q[:, :, begin:end]
        dynamic = stickbreaking_attention(new, k[:, :, :end], v[:, :, :end], **options)
        static = stickbreaking_attention(new, k, v, query_offset=begin, **options)
        for cached in (dynamic, static):
            for a, b in zip(cached, full, strict=True):
                torch.testing.assert_close(a, b[:, :, begin:end], rtol=1e-5, atol=1e-6)


@every_implementation
def test_neighbouring_query_heads_share_a_key_head(implementation):
    q, k, v = random_inputs(H=4, Hkv=2, Tq=18)
    grouped = stickbreaking_attention(q, k, v, implementation=implementation)
    for head in range(4):
        parts = (q[:, [head]], k[:, [head // 2]], v[:, [head // 2]])
        alone = stickbreaking_attention(*parts, implementation=implementation)
        for a, b in zip(grouped, alone, strict=True):
            torch.testing.assert_close(a[:, [head]], b, rtol=1e-5, atol=1e-6)


@every_implementation
def test_segments_of_keys_combine(implementation):
    q, k, v = random_inputs(H=1, Tq=1, Tk=50)
    options = {"attend_current": True, "implementation": implementation}
    output, rem = stickbreaking_attention(q, k, v, **options)
    old, rem_old = stickbreaking_attention(q, k[:, :, :48], v[:, :, :48], **options)
    new, rem_new = stickbreaking_attention(q, k[:, :, 48:], v[:, :, 48:], **options)
    torch.testing.assert_close(new + rem_new[..., None] * old, output)
    torch.testing.assert_close(rem_new * rem_old, rem)


@every_implementation
def test_rows_of_a_batch_do_not_meet(implementation):
    q, k, v = random_inputs(B=3, Tq=33)
    k[1] += 5  # uses its sticks up early
    order = torch.tensor([2, 0, 1], device=DEVICE)
    together = stickbreaking_attention(q, k, v, implementation=implementation)
    permuted = (x[order] for x in (q, k, v))
    for a, b in zip(
        stickbreaking_attention(*permuted, implementation=implementation), together, strict=True
    ):
        torch.testing.assert_close(a, b[order], rtol=1e-6, atol=1e-7)


@every_implementation
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_once(implementation, dtype):
    if implementation == "triton" and dtype == torch.bfloat16 and not CUDA:
        pytest.skip("Triton's interpreter has no bfloat16 matmul")
    inputs = [x.to(dtype) for x in random_inputs(H=4, Hkv=2, Tq=50, D=32)]
    found = everything(*inputs, implementation=implementation)
    exact = everything(*(x.double() for x in inputs), implementation="naive")
    assert all(x.dtype == dtype for x in found)
    # The loss's own gradient is rounded to the dtype as well.
    assert distance(found, exact) < 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("implementation", ["naive", "chunked"])
def test_autocast_changes_nothing(implementation):
    inputs = random_inputs(Tq=30)
    plain = everything(*inputs, implementation=implementation)
    with torch.autocast(DEVICE, torch.bfloat16):
        found = stickbreaking_attention(*inputs, implementation=implementation)
    assert all(torch.equal(a, b) for a, b in zip(found, plain[:2], strict=True))


@pytest.mark.parametrize("attend_current", [False, True])
def test_gradcheck(attend_current):
    inputs = random_inputs(H=2, Hkv=1, Tq=5, Tk=7, D=2, Dv=3)
    mask = torch.ones(1, 7, device=DEVICE, dtype=torch.bool)
    mask[0, 3] = False

    def attention(q, k, v):
        return tiled(3)(q, k, v, attend_current=attend_current, attention_mask=mask)

    assert torch.autograd.gradcheck(attention, leaves(*(x.double() for x in inputs)))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.data())
def test_chunked_equals_naive(data):
    draw = data.draw
    B, Hkv, group = (draw(st.integers(1, 2)) for _ in range(3))
    Tq, cached = draw(st.integers(1, 11)), draw(st.integers(0, 6))
    Tk = Tq + cached + draw(st.integers(0, 3))
    sizes = {"D": draw(st.integers(1, 5)), "Dv": draw(st.integers(1, 5))}
    options = {"attend_current": draw(st.booleans()), "query_offset": cached}
    row = st.lists(st.integers(0, 1), min_size=Tk, max_size=Tk)
    for name in ("attention_mask", "document_ids"):
        if draw(st.booleans()):
            options[name] = torch.tensor([draw(row) for _ in range(B)], device=DEVICE)
    inputs = random_inputs(B, Hkv * group, Hkv, Tq, Tk, **sizes, seed=draw(st.integers(0, 99)))
    inputs = [4 * x.double() for x in inputs]
    expected = everything(*inputs, implementation="naive", **options)
    found = everything(*inputs, attention=tiled(draw(st.integers(1, 9))), **options)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("dtype", "gain"), [(torch.float32, 3), (torch.float64, 8)])
def test_used_up_sticks_are_left_out_without_a_trace(monkeypatch, dtype, gain):
    inputs = [gain * x.to(dtype) for x in random_inputs(H=2, Tq=900)]
    tiles = []
    broken = chunked._broken
    monkeypatch.setattr(chunked, "_broken", lambda z, S: tiles.append(z.numel()) or broken(z, S))
    short = everything(*inputs, attention=tiled(64))
    visited = len(tiles)
    monkeypatch.setattr(chunked, "_used_up", lambda stick: False)
    full = everything(*inputs, attention=tiled(64))
    assert visited < 0.6 * (len(tiles) - visited)
    assert all(torch.equal(a, b) for a, b in zip(short, full, strict=True))


def test_size_of_tiles_changes_rounding_only():
    inputs = [x.double() for x in random_inputs(H=4, Hkv=2, Tq=70)]
    one_tile = everything(*inputs, attention=tiled(70))
    for block in (1, 7, 32, 64):
        assert distance(everything(*inputs, attention=tiled(block)), one_tile) < 1e-13


def test_no_weight_is_denormal():
    q, k, _ = random_inputs(H=1, Tq=400)
    unit = torch.eye(400, device=DEVICE)[None, None]
    weights, rem = stickbreaking_attention(q, k, unit, implementation="chunked")
    small = torch.cat([weights, rem[..., None]], -1)
    assert small[small > 0].min() >= torch.finfo(torch.float32).tiny
    assert small[small > 0].min() < 1e-36


def test_chunked_keeps_no_scores(monkeypatch):
    tiles, saved = [], []
    broken = chunked._broken
    monkeypatch.setattr(chunked, "_broken", lambda z, S: tiles.append(z.numel()) or broken(z, S))
    inputs = random_inputs(H=4, Hkv=2, Tq=700, offset=2.0)
    keep = torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x)
    with keep:
        output, _ = stickbreaking_attention(*leaves(*inputs), implementation="chunked")
    output.sum().backward()
    assert sum(x.numel() for x in saved) <= sum(x.numel() for x in inputs)
    assert max(tiles) <= 4 * chunked.BLOCK**2


def test_compiles_whole():
    inputs = random_inputs(Tq=30)
    compiled = torch.compile(stickbreaking_attention, backend="aot_eager", fullgraph=True)
    found = everything(*inputs, attention=compiled, implementation="chunked")
    plain = everything(*inputs, implementation="chunked")
    assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))


def test_refusals(monkeypatch):
    q, k, v = random_inputs(H=3, Hkv=1)
    with pytest.raises(ValueError, match=r"implementation='flash' does not exist.*'chunked'"):
        stickbreaking_attention(q, k, v, implementation="flash")
    with pytest.raises(ValueError, match=r"scale=nan.*finite"):
        stickbreaking_attention(q, k, v, scale=float("nan"))
    with pytest.raises(ValueError, match="3 heads and k 2"):
        stickbreaking_attention(q, k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1))
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match=r"implementation='triton' .*'chunked'"):
        stickbreaking_attention(*(x.cpu() for x in (q, k, v)), implementation="triton")
    with pytest.raises(ValueError, match="query_offset=3"):
        stickbreaking_attention(q, k, v, query_offset=3)


@needs_triton
class TestTriton:
    @pytest.fixture
    def kernels(self):
        from trl_ext.ops.stickbreaking import triton

        return triton

    @pytest.fixture(autouse=True)
    def poison(self):
        """Memory that nobody wrote is NaN."""
        torch.use_deterministic_algorithms(True)
        yield
        torch.use_deterministic_algorithms(False)

    @pytest.mark.parametrize("D", [1, 24, 80])
    def test_any_width_of_head(self, D):
        inputs = random_inputs(H=1, Tq=33, D=D, Dv=2 * D)
        found = everything(*inputs, implementation="triton")
        assert distance(found, everything(*(x.double() for x in inputs))) < 1e-6

    def test_gradients_add_up_over_slabs_of_queries(self, kernels, monkeypatch):
        inputs = random_inputs(Tq=100, offset=1.0)
        together = everything(*inputs, implementation="triton")
        monkeypatch.setattr(kernels, "SCRATCH", 1)
        slabs = everything(*inputs, implementation="triton")
        assert distance(slabs, [x.double() for x in together]) < 1e-6
        assert not torch.equal(slabs[3], together[3])  # another order of the sums

    def test_used_up_sticks_are_left_out_without_a_trace(self, kernels, monkeypatch):
        inputs = [1.5 * x for x in random_inputs(H=1, Tq=250)]
        monkeypatch.setattr(kernels, "TILES_PER_LOOK", 99)
        full = everything(*inputs, implementation="triton")
        monkeypatch.setattr(kernels, "TILES_PER_LOOK", 1)
        short = everything(*inputs, implementation="triton")
        assert all(torch.equal(a, b) for a, b in zip(short, full, strict=True))

    def test_decoding_in_segments(self, kernels, monkeypatch):
        q, k, v = random_inputs(B=2, H=6, Hkv=2, Tq=1, Tk=150, offset=2.0)
        mask = torch.ones(2, 150, dtype=torch.bool, device=DEVICE)
        mask[1, :70] = False
        options = {"attention_mask": mask, "query_offset": 140}
        monkeypatch.setattr(kernels, "SEGMENT", 32)
        found = stickbreaking_attention(q, k, v, implementation="triton", **options)
        q, k, v = (x.double() for x in (q, k, v))
        expected = stickbreaking_attention(q, k, v, implementation="naive", **options)
        assert distance(found, expected) < 1e-6

    def test_a_small_share_of_many_keys_counts(self):
        # log(1 − 2⁻²⁵) rounds to 0 if 1 + w is formed first.
        q, k = (torch.ones(1, 1, n, 1, device=DEVICE) for n in (1, 1500))
        scale = -17.4
        _, rem = stickbreaking_attention(q, k, k, scale=scale, implementation="triton")
        exact = (1 + torch.tensor(scale, dtype=torch.float64).exp()).pow(-1499)
        assert abs(rem.item() - exact.item()) < 2e-7
        assert exact < 1 - 4e-5

    def test_refusals(self):
        q, k, v = random_inputs(Tq=3, D=257)
        with pytest.raises(ValueError, match=r"width 256.*257.*'chunked'"):
            stickbreaking_attention(q, k, v, implementation="triton")
        with pytest.raises(ValueError, match=r"float32 and q is torch.float64.*'chunked'"):
            stickbreaking_attention(q.double(), k.double(), v.double(), implementation="triton")

    @pytest.mark.skipif(CUDA, reason="kernels are compiled here")
    def test_the_interpreter_refuses_bfloat16(self):
        inputs = (x.bfloat16() for x in random_inputs())
        with pytest.raises(ValueError, match=r"interpreter.*bfloat16.*'chunked'"):
            stickbreaking_attention(*inputs, implementation="triton")
