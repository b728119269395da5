"""The same tests for every variant: what a forward pass and its gradients must not depend on."""

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import DataCollatorWithFlattening, StaticCache

from tests.models.variants import (
    BOTH,
    CLASSIFIER,
    VARIANTS,
    gradients,
    largest,
    tiny,
    tokens,
)
from trl_ext.models._visible import Visible

CLOSE = 1e-5  # float32, on logits of order one
LENGTHS = (5, 3, 8)
# Triton's interpreter is slow, and its variants are compared in `tests/ops`.
FAST = [*((variant, "chunked") for variant in VARIANTS), *((variant, "triton") for variant in BOTH)]


def padded(rows, side):
    """Rows of different lengths as one batch, with its mask."""
    longest = max(map(len, rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        where = slice(longest - len(row), None) if side == "left" else slice(len(row))
        ids[i, where], mask[i, where] = row, 1
    return ids, mask


def documents():
    return [tokens(n, seed=n) for n in LENGTHS]


def packed(rows):
    """Rows one after another, with positions that restart."""
    positions = torch.cat([torch.arange(len(row)) for row in rows])
    return torch.cat(rows)[None], positions[None]


def written_out(model, ids_T):
    """The logits of one row from the papers' formulas, pair by pair of tokens, in float64."""
    model, config = model.double(), model.config
    x = model.model.embed_tokens.weight[ids_T]
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        h = rms_norm(x, layer.input_layernorm.weight)
        q, k, v = (
            linear(h).unflatten(-1, (-1, 8)).transpose(0, 1)
            for linear in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        serves = [head * k.size(0) // 4 for head in range(4)]
        attend = softmax_with_phase if config.model_type == "tapa" else broken_stick
        o = torch.stack([attend(attention, i, q[i], k[j], v[j]) for i, j in enumerate(serves)], 1)
        x = x + attention.o_proj(o.flatten(1))
        h = rms_norm(x, layer.post_attention_layernorm.weight)
        x = x + mlp.down_proj(F.silu(mlp.gate_proj(h)) * mlp.up_proj(h))
    return model.lm_head(rms_norm(x, model.model.norm.weight))


def rms_norm(x, weight):
    return weight * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def softmax_with_phase(attention, head, q_TD, k_TD, v_TD):
    config, rows = attention.config, []
    split = int(config.amplitude_fraction * 8)
    for i, q in enumerate(q_TD):
        scores = []
        for j, k in enumerate(k_TD[: i + 1]):
            pair = q + k if config.phase == "linear" else q * k
            phase = pair[split:].sum() / (8 - split) ** 0.5
            turns = (i - j) ** config.phase_alpha * phase
            scores.append(q[:split] @ k[:split] / split**0.5 * torch.cos(2 * torch.pi * turns))
        rows.append(torch.stack(scores).softmax(0) @ v_TD[: i + 1])
    return torch.stack(rows)


def broken_stick(attention, head, q_TD, k_TD, v_TD):
    config, rows = attention.config, []
    for i, q in enumerate(q_TD):
        stick, o = 1.0, torch.zeros_like(q)
        for j in reversed(range(i + config.attend_current)):
            share = torch.sigmoid(q @ k_TD[j] / 8**0.5)
            o, stick = o + stick * share * v_TD[j], stick * (1 - share)
        if config.remainder != "none":
            own = v_TD[i] if config.remainder == "value" else attention.remainder_bias[head]
            o = o + stick * own
        rows.append(rms_norm(o, attention.head_norm.weight[head]) if config.head_norm else o)
    return torch.stack(rows)


class TestForward:
    def test_the_papers_formulas(self, model):
        ids = tokens(1, 9)
        logits = model(ids).logits[0]
        assert largest(logits, written_out(model, ids[0])) < CLOSE

    def test_a_later_token_changes_nothing_before_it(self, model):
        ids = tokens(2, 11)
        for name in ("eager", f"{model.config.model_type}_naive"):
            model.set_attn_implementation(name)
            before = model(ids).logits
            for at in range(1, 11):
                changed = torch.cat([ids[:, :at], tokens(2, 11 - at, seed=at)], 1)
                after = model(changed).logits
                assert torch.equal(before[:, :at], after[:, :at])
                assert largest(before[:, at], after[:, at]) > 1e-3

    def test_an_earlier_token_matters(self, model):
        ids = tokens(1, 11)
        changed = ids.clone()
        changed[0, 0] = 3 if ids[0, 0] != 3 else 4
        assert largest(model(ids).logits[:, -1], model(changed).logits[:, -1]) > 1e-3

    def test_the_order_of_earlier_tokens_matters(self, model):
        """One layer sees a set of keys, and only distance or order tells two of them apart."""
        model.model.layers = model.model.layers[:1]
        ids = tokens(1, 11)
        swapped = ids[:, [1, 0, *range(2, 11)]]
        assert largest(model(ids).logits[:, -1], model(swapped).logits[:, -1]) > 1e-3

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_padding_changes_nothing(self, model, side):
        rows = documents()
        ids, mask = padded(rows, side)
        logits = model(ids, attention_mask=mask).logits
        for i, row in enumerate(rows):
            alone = model(row[None]).logits[0]
            assert largest(logits[i][mask[i] == 1], alone) < CLOSE

    def test_holes_in_the_mask_change_nothing(self, model):
        ids = tokens(2, 9)
        mask = torch.tensor([[0, 1, 1, 0, 0, 1, 1, 0, 1], [1, 1, 0, 1, 1, 1, 0, 1, 1]])
        logits = model(ids, attention_mask=mask).logits
        for i in range(2):
            real = mask[i] == 1
            assert largest(logits[i][real], model(ids[i][real][None]).logits[0]) < CLOSE

    def test_a_mask_of_ones_is_none(self, model):
        ids = tokens(2, 9)
        ones = torch.ones_like(ids)
        for mask in (ones, ones.bool(), ones.float()):
            assert largest(model(ids).logits, model(ids, attention_mask=mask).logits) < CLOSE

    def test_a_row_of_padding_is_finite_and_has_no_gradient(self, model):
        ids, mask = tokens(2, 6), torch.ones(2, 6, dtype=torch.long)
        mask[0] = 0
        logits = model(ids, attention_mask=mask).logits
        assert logits.isfinite().all()
        loss = F.cross_entropy(logits[1], ids[1])
        alone = F.cross_entropy(model(ids[1:]).logits[0], ids[1])
        assert largest(gradients(model, loss), gradients(model, alone)) < CLOSE

    def test_filling_a_cache_changes_not_a_bit(self, model):
        """Gradient checkpointing leaves the cache out, and must give the same loss."""
        ids, mask = padded(documents(), "right")
        with_cache, without = (
            model(ids, attention_mask=mask, use_cache=use_cache).logits
            for use_cache in (True, False)
        )
        assert torch.equal(with_cache, without)

    def test_rows_do_not_know_each_other(self, model):
        ids, mask = padded(documents(), "left")
        logits = model(ids, attention_mask=mask).logits
        order = torch.tensor([2, 0, 1])
        permuted = model(ids[order], attention_mask=mask[order]).logits
        assert largest(permuted, logits[order]) < CLOSE

    @pytest.mark.parametrize("told", ["position_ids", "cu_seq_lens_q", "cached"])
    def test_packed_documents_equal_separate_rows(self, model, told):
        rows = documents()
        ids, positions = packed(rows)
        ends = torch.tensor([0, *LENGTHS]).cumsum(0)
        how = {"position_ids": positions}
        if told == "cu_seq_lens_q":
            how = {"cu_seq_lens_q": ends}
        logits = model(ids, use_cache=told == "cached", **how).logits[0]
        for row, document in zip(rows, logits.split(LENGTHS), strict=True):
            assert largest(document, model(row[None]).logits[0]) < CLOSE

    def test_packed_rows_of_a_batch_have_their_own_documents(self, model):
        ids = tokens(2, 8)
        positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3], [0, 1, 0, 1, 2, 3, 4, 5]])
        logits = model(ids, position_ids=positions).logits
        for i, at in ((0, 4), (1, 2)):
            assert largest(logits[i, :at], model(ids[i : i + 1, :at]).logits[0]) < CLOSE
            assert largest(logits[i, at:], model(ids[i : i + 1, at:]).logits[0]) < CLOSE

    @pytest.mark.parametrize("kernels", [False, True])
    def test_the_collator_of_transformers_packs(self, model, kernels):
        """Loss over a flattened batch: the mean over all tokens that separate rows predict."""
        rows = documents()
        collate = DataCollatorWithFlattening(
            return_flash_attn_kwargs=kernels, return_seq_idx=kernels
        )
        batch = collate([{"input_ids": row.tolist()} for row in rows])
        alone = [
            F.cross_entropy(model(row[None]).logits[0, :-1], row[1:], reduction="none")
            for row in rows
        ]
        assert abs(model(**batch).loss - torch.cat(alone).mean()) < CLOSE

    def test_positions_without_a_restart_are_ignored(self, model):
        ids = tokens(2, 8)
        shifted = model(ids, position_ids=torch.arange(100, 108)[None]).logits
        assert largest(shifted, model(ids).logits) < CLOSE

    @pytest.mark.parametrize(("variant", "name"), FAST)
    def test_a_fast_implementation_equals_the_naive_one(self, variant, name):
        if name == "triton":
            pytest.importorskip("triton")
        model = tiny(variant)
        ids, mask = padded(documents(), "left")
        found = []
        for chosen in ("naive", name):
            model.set_attn_implementation(f"{model.config.model_type}_{chosen}")
            logits = model(ids, attention_mask=mask).logits[mask == 1]
            found.append((logits, gradients(model, logits.square().mean())))
        (naive, expected), (fast, grads) = found
        assert largest(fast, naive) < CLOSE
        assert (grads - expected).norm() < CLOSE * expected.norm()

    def test_the_last_block_may_be_ragged(self, model):
        """More keys than one tile of the chunked form has, and no multiple of it."""
        ids = tokens(1, 301)
        eager = model(ids).logits
        model.set_attn_implementation(f"{model.config.model_type}_naive")
        assert largest(eager, model(ids).logits) < CLOSE


class TestOutputs:
    def test_attention_weights_are_shares_of_one(self, model):
        ids, mask = padded(documents(), "left")
        out = model(ids, attention_mask=mask, output_attentions=True, output_hidden_states=True)
        assert len(out.attentions) == 2 and out.attentions[0].shape == (3, 4, 8, 8)
        config = model.config
        strict = config.model_type == "stickbreaking" and not config.attend_current
        seen = torch.ones(8, 8).tril(-1 if strict else 0).bool() & (mask[:, None, None] == 1)
        for weights, expected in zip(out.attentions, row_sums(model, out, ids, mask), strict=True):
            assert (weights[~seen.expand_as(weights)] == 0).all() and (weights >= 0).all()
            assert largest(weights.sum(-1), expected) < CLOSE
        plain = model(ids, attention_mask=mask)
        assert plain.attentions is None and torch.equal(plain.logits, out.logits)

    def test_hidden_states_are_the_residual_stream(self, model):
        ids = tokens(2, 7)
        out = model(ids, output_hidden_states=True)
        assert len(out.hidden_states) == 3
        assert torch.equal(out.hidden_states[0], model.model.embed_tokens(ids))
        assert torch.equal(model.lm_head(out.hidden_states[-1]), out.logits)

    def test_options_of_the_configuration_count_too(self, model):
        model.config.output_attentions = model.config.output_hidden_states = True
        out = model(tokens(1, 5))
        assert len(out.attentions) == 2 and len(out.hidden_states) == 3

    def test_loss_is_that_of_the_next_token(self, model):
        ids = tokens(2, 9)
        labels = ids.masked_fill(torch.arange(9) < 4, -100)
        out = model(ids, labels=labels)
        expected = F.cross_entropy(out.logits[:, 3:-1].flatten(0, 1), ids[:, 4:].flatten())
        assert abs(out.loss - expected) < CLOSE
        summed = model(ids, labels=labels, num_items_in_batch=20).loss
        assert abs(summed - expected * 10 / 20) < CLOSE

    def test_logits_to_keep(self, model):
        ids = tokens(2, 9)
        logits = model(ids).logits
        columns = torch.tensor([[0, 8], [3, 2]])
        for keep, expected in (
            (1, logits[:, -1:]),
            (4, logits[:, -4:]),
            (torch.tensor([1, 5]), logits[:, [1, 5]]),
            (columns, logits[torch.arange(2)[:, None], columns]),
            (ids % 2 == 0, logits[ids % 2 == 0]),
        ):
            assert largest(model(ids, logits_to_keep=keep).logits, expected) < CLOSE

    def test_embeddings_in_the_place_of_tokens(self, model):
        ids = tokens(2, 9)
        embeddings = model.get_input_embeddings()(ids)
        assert torch.equal(model(inputs_embeds=embeddings).logits, model(ids).logits)

    def test_a_tuple_on_request(self, model):
        ids = tokens(1, 5)
        loss, logits, *_ = model(ids, labels=ids, return_dict=False)
        assert torch.equal(logits, model(ids).logits) and loss.dim() == 0

    @pytest.mark.parametrize("side", ["left", "right"])
    @pytest.mark.parametrize("variant", VARIANTS)
    def test_a_classifier_reads_the_last_token(self, variant, side):
        model = tiny(variant, classes=CLASSIFIER, num_labels=3)
        rows = documents()
        ids, mask = padded(rows, side)
        scores = model(ids, attention_mask=mask).logits
        alone = torch.cat([model(row[None]).logits for row in rows])
        assert scores.shape == (3, 3) and largest(scores, alone) < CLOSE


def row_sums(model, out, ids, mask):
    """1 for a softmax; 1 − Π (1 − β) over the visible keys for a stick, per layer."""
    if model.config.model_type == "tapa":
        return [mask[:, None].expand(-1, 4, -1).float()] * 2
    diagonal = 0 if model.config.attend_current else -1
    seen = torch.ones(8, 8).tril(diagonal).bool() & (mask[:, None, None] == 1)
    sums = []
    for layer, hidden in zip(model.model.layers, out.hidden_states, strict=False):
        x = layer.input_layernorm(hidden)
        q, k = (
            projection(x).unflatten(-1, (-1, 8)).transpose(1, 2)
            for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj)
        )
        k = k.repeat_interleave(q.size(1) // k.size(1), 1)
        left = torch.sigmoid(-q @ k.mT / 8**0.5)
        sums.append(1 - left.masked_fill(~seen, 1).prod(-1))
    return sums


class TestTraining:
    @pytest.mark.parametrize("reentrant", [False, True])
    def test_gradient_checkpointing_changes_nothing(self, model, reentrant):
        ids, mask = padded(documents(), "right")
        batch = {"input_ids": ids, "attention_mask": mask, "labels": ids}
        model.train()
        before = model(**batch)
        expected = gradients(model, before.loss)
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
        calls = []
        model.model.layers[0].register_forward_pre_hook(lambda *_: calls.append("layer"))
        model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append("mlp"))
        after = model(**batch)
        after.loss.backward()
        assert calls == ["layer", "mlp", "mlp"], "backward did not compute the layer again"
        assert torch.equal(after.loss, before.loss)
        found = torch.cat([p.grad.flatten() for p in model.parameters()])
        assert (found - expected).norm() < CLOSE * expected.norm()

    def test_gradient_checkpointing_of_packed_documents(self, model):
        ids, positions = packed(documents())
        model.train()
        expected = gradients(model, model(ids, position_ids=positions, labels=ids).loss)
        model.activation_checkpointing_enable()
        found = gradients(model, model(ids, position_ids=positions, labels=ids).loss)
        assert (found - expected).norm() < CLOSE * expected.norm()

    def test_autocast_changes_little(self, model):
        ids = tokens(2, 9)
        full = model(ids).logits
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(ids, labels=ids).loss
            logits = model(ids).logits
        assert logits.dtype == torch.bfloat16 and largest(logits.float(), full) < 0.1
        assert gradients(model, loss).isfinite().all()

    def test_autocast_leaves_the_scores_in_float32(self, model):
        """Large ones here: in bfloat16 they would be wrong by percents."""
        attention, seen = model.model.layers[0].self_attn, {}
        for name in "qkv":
            projection = attention.get_submodule(f"{name}_proj")
            projection.register_forward_hook(lambda *io, name=name: seen.update({name: io[-1]}))
        attention.o_proj.register_forward_pre_hook(lambda _, args: seen.update(o=args[0]))
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            attention.q_proj.weight *= 4
            attention.k_proj.weight *= 4
            model(tokens(2, 30))
        assert seen["q"].dtype == torch.bfloat16
        q, k, v = (seen[name].float().unflatten(-1, (-1, 8)).transpose(1, 2) for name in "qkv")
        visible = Visible(attention_mask=None, document_ids=None, query_offset=None)
        o = attention.attend(q, k, v, own_values=v, implementation="naive", visible=visible)
        exact = o.transpose(1, 2).flatten(2)
        assert (seen["o"].float() - exact).norm() < 0.004 * exact.norm()

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision(self, model, dtype):
        ids, mask = padded(documents(), "left")
        full = model(ids, attention_mask=mask).logits
        half = model.to(dtype)(ids, attention_mask=mask).logits
        assert half.dtype == dtype and largest(half.float()[mask == 1], full[mask == 1]) < 0.1

    def test_a_step_of_adam_lowers_the_loss(self, model):
        ids = tokens(4, 12)
        model.train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        losses = []
        for _ in range(5):
            loss = model(ids, labels=ids).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0] - 0.1


def compiled_on(backend):
    return pytest.param(backend, marks=pytest.mark.slow) if backend == "inductor" else backend


@pytest.mark.parametrize("backend", [compiled_on(b) for b in ("aot_eager", "inductor")])
@pytest.mark.parametrize("variant", BOTH)
class TestCompile:
    """As one graph. `aot_eager` traces the backward pass too, `inductor` writes code for both."""

    @pytest.fixture(autouse=True)
    def fresh(self):
        torch.compiler.reset()  # what one test compiled, the next would take for its own

    def test_forward_and_backward(self, variant, backend):
        model = tiny(variant).train()
        compiled = torch.compile(model, fullgraph=True, backend=backend)
        ids, mask = padded(documents(), "left")
        batch = {"input_ids": ids, "attention_mask": mask, "labels": ids}
        ours, theirs = model(**batch), compiled(**batch)
        assert largest(ours.logits[mask == 1], theirs.logits[mask == 1]) < CLOSE
        expected = gradients(model, ours.loss)
        assert (gradients(model, theirs.loss) - expected).norm() < CLOSE * expected.norm()

    def test_other_shapes_ask_for_no_other_graphs(self, variant, backend):
        model = tiny(variant)
        counter = CompileCounterWithBackend(backend)
        compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
        with torch.no_grad():
            for size in ((2, 5), (3, 9), (4, 12), (5, 20)):
                ids = tokens(*size)
                ours, theirs = (f(ids, use_cache=False).logits for f in (model, compiled))
                assert largest(ours, theirs) < CLOSE
        assert counter.frame_count <= 2  # the first shape may have one of its own

    def test_packed_documents(self, variant, backend):
        model = tiny(variant)
        compiled = torch.compile(model, fullgraph=True, backend=backend)
        ids, positions = packed(documents())
        with torch.no_grad():
            ours, theirs = (f(ids, position_ids=positions).logits for f in (model, compiled))
        assert largest(ours, theirs) < CLOSE

    def test_decoding_with_a_static_cache_is_compiled_once(self, variant, backend):
        model = tiny(variant)
        counter = CompileCounterWithBackend(backend)
        compiled = torch.compile(model, fullgraph=True, backend=counter)
        ids, mask = tokens(2, 10), torch.ones(2, 10, dtype=torch.long)
        mask[0, :3] = 0
        cache = StaticCache(config=model.config, max_cache_len=16)
        room = torch.nn.functional.pad(mask, (0, 6), value=1)
        with torch.no_grad():
            expected = model(ids, attention_mask=mask).logits
            model(ids[:, :6], attention_mask=mask[:, :6], cache=cache)
            for t in range(6, 10):
                step = compiled(ids[:, t : t + 1], attention_mask=room, cache=cache)
                assert largest(step.logits[:, 0], expected[:, t]) < CLOSE
        assert counter.frame_count == 1
