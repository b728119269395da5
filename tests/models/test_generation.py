"""`generate` and every cache against full forward passes of the same sequences."""

import pytest
import torch
from transformers import CompileConfig, DynamicCache, StaticCache

from tests.models.variants import largest, tokens

CLOSE = 1e-5
NEW = 7
# No row ends early, so that all lengths are known.
EXACTLY = {"max_new_tokens": NEW, "min_new_tokens": NEW, "return_dict_in_generate": True}
STEPWISE = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 0.7, "top_p": 0.9},
    "no_cache": {"use_cache": False},
    "static": {"cache_implementation": "static"},
    "static_sampling": {"cache_implementation": "static", "do_sample": True},
    "chunked_prefill": {"prefill_chunk_size": 3},
    "chunked_static_prefill": {"prefill_chunk_size": 3, "cache_implementation": "static"},
}
BEAMS = {
    "beams": {},
    "beam_sampling": {"do_sample": True},
    "static_beams": {"cache_implementation": "static"},
    "two_per_prompt": {"num_return_sequences": 2},
}


def batch():
    """Two prompts, the second padded on the left, and their mask."""
    ids, mask = tokens(2, 9), torch.ones(2, 9, dtype=torch.long)
    ids[1, :4], mask[1, :4] = 0, 0
    return ids, mask


def full_logits(model, sequences, mask):
    """Without a cache, `(B, T, V)`."""
    grown = torch.nn.functional.pad(mask, (0, sequences.size(1) - mask.size(1)), value=1)
    with torch.no_grad():
        return model(sequences, attention_mask=grown, use_cache=False).logits


def generate(model, ids, mask=None, **options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return model.generate(ids, attention_mask=mask, **{**EXACTLY, **options})


def by_hand(model, ids):
    """Greedy decoding of one row by full passes."""
    for _ in range(NEW):
        with torch.no_grad():
            logits = model(ids, use_cache=False).logits[:, -1]
        logits[:, model.config.eos_token_id] = -torch.inf
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
    return ids


class TestGenerate:
    @pytest.mark.parametrize("mode", STEPWISE)
    def test_each_step_has_the_logits_of_a_full_pass(self, model, mode):
        ids, mask = batch()
        out = generate(model, ids, mask, output_logits=True, **STEPWISE[mode])
        expected = full_logits(model, out.sequences, mask)[:, 8:-1]
        assert largest(torch.stack(out.logits, 1), expected) < CLOSE

    @pytest.mark.parametrize("mode", BEAMS)
    def test_beams_are_scored_as_by_a_full_pass(self, model, mode):
        """The mean log-probability of the new tokens, for each returned beam."""
        ids, mask = batch()
        out = generate(model, ids, mask, num_beams=3, output_scores=True, **BEAMS[mode])
        beams = BEAMS[mode].get("num_return_sequences", 1)
        logits = full_logits(model, out.sequences, mask.repeat_interleave(beams, 0))[:, 8:-1]
        logp = logits.log_softmax(-1).gather(-1, out.sequences[:, 9:, None])
        assert largest(out.sequences_scores, logp.squeeze(-1).mean(1)) < CLOSE

    @pytest.mark.parametrize("cache", [None, "static"])
    def test_a_batch_is_its_rows_one_by_one(self, model, cache):
        ids, mask = batch()
        out = generate(model, ids, mask, cache_implementation=cache).sequences
        assert torch.equal(out[0], by_hand(model, ids[:1])[0])
        assert torch.equal(out[1, 4:], by_hand(model, ids[1:, 4:])[0])

    def test_a_static_cache_can_be_used_twice(self, model):
        """Its length is a tensor that changes in place: nothing may keep it."""
        first, second = (tokens(1, 6, seed=s) for s in (1, 2))
        for ids in (first, second):
            out = generate(model, ids, cache_implementation="static").sequences
            assert torch.equal(out, by_hand(model, ids))

    def test_compiled_steps_say_the_same(self, main_model):
        """`generate` compiles decoding with a static cache, by itself on a GPU only."""
        ids, mask = batch()
        compile_config = CompileConfig(backend="eager", mode=None, fullgraph=True)
        compile_config._compile_all_devices = True
        calls = count_compiled_calls(main_model)
        options = {"cache_implementation": "static", "compile_config": compile_config}
        compiled = generate(main_model, ids, mask, **options).sequences
        assert len(calls) == NEW - 1
        assert torch.equal(compiled, generate(main_model, ids, mask).sequences)

    @pytest.mark.parametrize("helper", ["assistant", "prompt_lookup", "early_exit"])
    def test_assisted_generation_says_the_same(self, model, helper):
        ids = tokens(1, 4).repeat(1, 3)
        options = {"prompt_lookup_num_tokens": 3}
        if helper == "early_exit":
            options = {"assistant_early_exit": 1}
        if helper == "assistant":
            # Nearly the model, so that some guesses are right and some are taken back.
            assistant = tiny_like(model)
            options = {"assistant_model": assistant}
        out = generate(model, ids, **options).sequences
        assert torch.equal(out, by_hand(model, ids))

    @pytest.mark.parametrize("cache", [DynamicCache, StaticCache])
    def test_a_second_turn_continues_the_cache(self, model, cache):
        ids, mask = batch()
        options = {"max_cache_len": 40} if cache is StaticCache else {}
        kept = cache(config=model.config, **options)
        first = generate(model, ids, mask, cache=kept)
        # A row that ended early is padded behind its answer, so the mask has a hole.
        said, mask = first.sequences, torch.nn.functional.pad(mask, (0, NEW), value=1)
        said[0, -3:], mask[0, -3:] = 0, 0
        question = torch.cat([said, tokens(2, 5, seed=3)], 1)
        mask = torch.nn.functional.pad(mask, (0, 5), value=1)
        again = generate(model, question, mask, cache=first.cache).sequences
        for row in range(2):
            alone = by_hand(model, question[row][mask[row] == 1][None])[0]
            assert torch.equal(again[row, -NEW:], alone[-NEW:])

    @pytest.mark.parametrize("cache", [None, "static"])
    def test_each_step_has_the_attention_weights_of_a_full_pass(self, model, cache):
        ids, mask = batch()
        options = {"cache_implementation": cache, "output_attentions": True}
        out = generate(model, ids, mask, **options)
        grown = torch.nn.functional.pad(mask, (0, NEW - 1), value=1)
        whole = model(out.sequences[:, :-1], attention_mask=grown, output_attentions=True)
        for found, expected in zip(out.attentions[-1], whole.attentions, strict=True):
            assert largest(found, expected[:, :, -1:]) < CLOSE

    def test_guidance_away_from_another_prompt(self, model):
        """The processor decodes a second row with a cache of its own."""
        ids, scale = tokens(1, 6), 1.7
        found = generate(model, ids, guidance_scale=scale).sequences
        rows = [ids, ids[:, -1:]]  # its prompt is the last token, unless one is given
        for _ in range(NEW):
            with torch.no_grad():
                logp, other = (
                    model(r, use_cache=False).logits[:, -1].log_softmax(-1) for r in rows
                )
            guided = other + scale * (logp - other)
            guided[:, model.config.eos_token_id] = -torch.inf
            rows = [torch.cat([row, guided.argmax(-1, keepdim=True)], 1) for row in rows]
        assert torch.equal(found, rows[0])

    def test_training_with_checkpointed_gradients_may_be_interrupted(self, model):
        """As trainers that sample do it: the mode stays, and the host leaves caches out of it."""
        ids = tokens(1, 6)
        expected = by_hand(model, ids)
        model.train().activation_checkpointing_enable()
        assert torch.equal(generate(model, ids).sequences, expected)

    def test_generation_from_embeddings(self, model):
        ids = tokens(1, 6)
        embeddings = model.get_input_embeddings()(ids)
        out = model.generate(inputs_embeds=embeddings, max_new_tokens=NEW, min_new_tokens=NEW)
        assert torch.equal(out, by_hand(model, ids)[:, 6:])

    def test_generation_streams(self, model):
        class Streamer:
            pieces = ()

            def put(self, value):
                self.pieces += (value.flatten(),)

            def end(self):
                pass

        ids, streamer = tokens(1, 6), Streamer()
        out = generate(model, ids, streamer=streamer).sequences
        assert torch.equal(torch.cat(streamer.pieces), out[0])


def count_compiled_calls(model):
    """One entry for each call of what `generate` compiled."""
    calls, get = [], model.get_compiled_call

    def counting(config):
        compiled = get(config)
        return lambda *args, **kwargs: (calls.append(1), compiled(*args, **kwargs))[1]

    model.get_compiled_call = counting
    return calls


def tiny_like(model, noise=0.05):
    """A copy with slightly other weights."""
    variant = type(model)(model.config).eval()
    variant.load_state_dict(model.state_dict())
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in variant.parameters():
            parameter += noise * torch.randn(parameter.shape, generator=draw)
    return variant


def prefilled(model, ids, cache, **options):
    with torch.no_grad():
        return model(ids, cache=cache, use_cache=True, **options)


@pytest.fixture(params=["dynamic", "static"])
def new_cache(request):
    """A function from a configuration to an empty cache."""
    if request.param == "dynamic":
        return lambda config: DynamicCache(config=config)
    return lambda config: StaticCache(config=config, max_cache_len=20)


class TestCache:
    @pytest.mark.parametrize("parts", [(1,) * 12, (5, 7), (5, 1, 4, 2), (11, 1)], ids=str)
    @pytest.mark.parametrize("padding", [0, 3])
    def test_in_parts_as_in_one(self, model, new_cache, parts, padding):
        ids, mask = tokens(2, 12), torch.ones(2, 12, dtype=torch.long)
        mask[0, :padding] = 0
        expected, cache, seen, found = full_logits(model, ids, mask), new_cache(model.config), 0, []
        for part in parts:
            seen += part
            options = {"attention_mask": mask[:, :seen]} if padding else {}
            found.append(prefilled(model, ids[:, seen - part : seen], cache, **options).logits)
        found = torch.cat(found, 1)
        assert largest(found[mask == 1], expected[mask == 1]) < CLOSE

    def test_a_mask_may_hide_keys_of_a_static_cache_that_are_not_there_yet(self, model):
        ids, cache = tokens(1, 6), StaticCache(config=model.config, max_cache_len=10)
        room = torch.ones(1, 10, dtype=torch.long)
        expected = full_logits(model, ids, room[:, :6])
        found = [
            prefilled(model, part, cache, attention_mask=room).logits
            for part in ids.split([4, 1, 1], 1)
        ]
        assert largest(torch.cat(found, 1), expected) < CLOSE

    def test_the_hosts_old_name_is_understood(self, model):
        """Under an unknown name it would be dropped, and a token follow from itself alone."""
        ids, cache = tokens(1, 6), DynamicCache(config=model.config)
        prefilled(model, ids[:, :4], cache)
        with pytest.warns(FutureWarning, match="`past_key_values` is deprecated"):
            found = model(ids[:, 4:], past_key_values=cache).logits
        assert largest(found, model(ids).logits[:, 4:]) < CLOSE

    def test_cropping_takes_back_tokens(self, model):
        ids, cache = tokens(1, 10), DynamicCache(config=model.config)
        prefilled(model, torch.cat([ids[:, :6], tokens(1, 3, seed=5)], 1), cache)
        cache.crop(-3)
        found = prefilled(model, ids[:, 6:], cache).logits
        assert largest(found, model(ids).logits[:, 6:]) < CLOSE

    def test_rows_of_a_cache_can_be_reordered(self, model, new_cache):
        ids, cache = tokens(3, 8), new_cache(model.config)
        order = torch.tensor([2, 0, 0])
        prefilled(model, ids[:, :5], cache)
        cache.reorder_cache(order)
        found = prefilled(model, ids[order, 5:], cache).logits
        assert largest(found, model(ids[order]).logits[:, 5:]) < CLOSE

    def test_an_emptied_cache_is_new(self, model, new_cache):
        cache = new_cache(model.config)
        prefilled(model, tokens(2, 6, seed=1), cache)
        cache.reset()
        ids = tokens(2, 6)
        assert largest(prefilled(model, ids, cache).logits, model(ids).logits) < CLOSE

    def test_no_cache_unless_wanted(self, model):
        ids = tokens(1, 5)
        assert model(ids, use_cache=False).cache is None
        assert model(ids).cache.get_seq_length() == 5
        model.config.use_cache = False
        assert model(ids).cache is None

    def test_a_quantized_cache_is_close(self, main_model):
        """Four bits move TAPA's logits by 6 % and stick-breaking's by 3 %."""
        pytest.importorskip("optimum.quanto")
        ids, mask = batch()
        form = {"backend": "quanto", "nbits": 4, "residual_length": 4, "q_group_size": 8}
        cache = {"cache_implementation": "quantized", "cache_config": form}
        out = generate(main_model, ids, mask, output_logits=True, **cache)
        expected = full_logits(main_model, out.sequences, mask)[:, 8:-1]
        assert 0 < (torch.stack(out.logits, 1) - expected).norm() < 0.1 * expected.norm()

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="offloads from CUDA")
    def test_an_offloaded_cache_says_the_same(self, model):
        ids = tokens(2, 9)
        expected = torch.cat([by_hand(model, row[None]) for row in ids])
        model.cuda()
        for cache in ("offloaded", "offloaded_static"):
            out = generate(model, ids.cuda(), cache_implementation=cache).sequences
            assert torch.equal(out.cpu(), expected)
