"""Branches of a cache against `generate` on each prefix, and their law by enumeration."""

import itertools
from collections import Counter

import pytest
import torch
from transformers import (
    DynamicLayer,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Lfm2Config,
    Lfm2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MiniMaxConfig,
    MiniMaxForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

import trl_ext.rollouts.branching as branching
from tests.exact import PROMPTS, SPOKEN, TOKENIZER, A, B, table, tabular, token_logps
from tests.models.variants import CAUSAL, VARIANTS, config_of
from tests.rollouts.models import (
    EOS,
    PAD,
    VOCAB,
    adapted,
    generation_config,
    sharp_llama,
    tiny_gpt2,
)
from trl_ext.rollouts import branch
from trl_ext.rollouts._roomy import RoomyLayer

K = 3
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": EOS,
    "initializer_range": 0.4,
}
ALTERNATING = ["sliding_attention", "full_attention"]


def ours(variant):
    config = config_of(variant)
    return CAUSAL[type(config)](config)


MODELS = {
    "llama": sharp_llama,
    "gpt2": tiny_gpt2,
    "lora": lambda: adapted(sharp_llama()),
    **{variant: lambda variant=variant: ours(variant) for variant in VARIANTS},
    "sliding window": lambda: MistralForCausalLM(MistralConfig(sliding_window=4, **SIZES)),
    "some sliding": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(sliding_window=4, head_dim=8, layer_types=ALTERNATING, **SIZES)
    ),
    "convolutions": lambda: Lfm2ForCausalLM(
        Lfm2Config(layer_types=["conv", "full_attention"], **SIZES)
    ),
    "rows of its own": lambda: MiniMaxForCausalLM(
        MiniMaxConfig(
            layer_types=["full_attention", "linear_attention"],
            num_local_experts=2,
            head_dim=8,
            **SIZES,
        )
    ),
    "no tokens counted": lambda: MambaForCausalLM(
        MambaConfig(**{k: v for k, v in SIZES.items() if "heads" not in k})
    ),
}


def seeded(make):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make().eval()


def prefixes_of(lengths):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in lengths]


def branched(model, prefixes, budgets, rows_per_pass=9, branches=K, **options):
    return branch(
        model,
        prefixes,
        generation_config(**options),
        branches=branches,
        max_new_tokens=budgets,
        eos_token_ids=[EOS],
        rows_per_pass=rows_per_pass,
    )


GREEDY = {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}


def greedy(model, prefix, budget):
    """As `generate` goes on from this prefix, alone and without a cache of ours."""
    mask = torch.ones(1, len(prefix), dtype=torch.long)
    config = generation_config(**{**GREEDY, "max_new_tokens": budget})
    out = model.generate(torch.tensor([prefix]), attention_mask=mask, generation_config=config)
    return out[0, len(prefix) :].tolist()


@pytest.mark.parametrize("name", MODELS)
def test_greedy_branches_are_greedy_generation(name):
    """Through left pads, a prefix of one token, budgets of its own per row, and dropped rows."""
    model, prefixes = seeded(MODELS[name]), prefixes_of((1, 3, 7, 7, 12, 5))
    budgets = [40, 3, 17, 16, 1, 33]
    found = branched(model, prefixes, budgets, **GREEDY)
    for prefix, budget, rows in zip(prefixes, budgets, found, strict=True):
        assert rows == [greedy(model, prefix, budget)] * K


def test_rows_that_end_early_are_dropped_with_their_cache(monkeypatch):
    model, seen = sharp_llama(), []
    forward = model.forward

    def watched(input_ids, **kwargs):
        seen.append(tuple(input_ids.shape))
        return forward(input_ids=input_ids, **kwargs)

    model.forward = watched
    monkeypatch.setattr(branching, "STRIDE", 2)
    prefixes, budgets = prefixes_of((5, 5, 5)), [1, 4, 6]
    branched(model, prefixes, budgets, **GREEDY, min_p=None)
    assert seen[0] == (3, 4), "one prefill, of distinct prefixes, all but the last token"
    assert [rows for rows, width in seen[1:]] == [9, 9, 6, 6, 3, 3]
    assert {width for _, width in seen[1:]} == {1}


def test_prefixes_of_like_length_are_prefilled_together():
    model, seen = sharp_llama(), []
    forward = model.forward

    def watched(input_ids, **kwargs):
        seen.append(tuple(input_ids.shape))
        return forward(input_ids=input_ids, **kwargs)

    model.forward = watched
    branched(model, prefixes_of((3, 20, 4, 19)), [1] * 4, rows_per_pass=6)
    assert [shape for shape in seen if shape[1] > 1] == [(2, 3), (2, 19)]


@pytest.mark.parametrize("options", [{}, {"temperature": 0.5}, {"top_k": 2}], ids=str)
def test_sampled_branches_have_the_law_of_the_policy(options):
    """On the table, by enumeration: each continuation as often as its probability says."""
    weights, n = table(3), 6000
    prompt, begun = PROMPTS[0], (A,)
    config = {"eos_token_id": [TOKENIZER.eos_token_id], "pad_token_id": TOKENIZER.pad_token_id}
    model = tabular(weights)
    model.config.num_hidden_layers = 1  # `generate` makes a cache of so many, which stays empty
    torch.manual_seed(0)
    rows = branch(
        model,
        [[prompt], [prompt, *begun]],
        generation_config(**config, **options),
        branches=n,
        max_new_tokens=[1, 2],
        eos_token_ids=[TOKENIZER.eos_token_id],
        rows_per_pass=2 * n,
    )
    tempered = weights / options.get("temperature", 1.0)
    if "top_k" in options:
        lowest = tempered.topk(2, dim=0).values[-1]
        tempered = tempered.masked_fill(tempered < lowest, -1e9)
    eos = TOKENIZER.eos_token_id
    both = [
        [(token,) for token in SPOKEN],
        [(eos,), *itertools.product((A, B), SPOKEN)],
    ]
    for last, sampled, outcomes in zip((prompt, A), rows, both, strict=True):
        counts = Counter(map(tuple, sampled))
        assert set(counts) <= set(outcomes)
        for outcome in outcomes:
            p = float(token_logps(tempered, last, outcome).sum().exp())
            assert abs(counts[outcome] / n - p) <= 4 * (p * (1 - p) / n) ** 0.5 + 1e-12


def test_with_a_cache_the_law_is_that_of_generate():
    """First tokens of a Llama behind padded prefixes, against its own next-token law."""
    model, prefixes, n = sharp_llama(), prefixes_of((2, 9)), 4000
    torch.manual_seed(0)
    rows = branched(model, prefixes, [2, 2], rows_per_pass=2 * n, branches=n, temperature=2.0)
    for prefix, sampled in zip(prefixes, rows, strict=True):
        with torch.no_grad():
            law = (model(torch.tensor([prefix])).logits[0, -1] / 2.0).softmax(-1)
        counts = torch.bincount(torch.tensor([row[0] for row in sampled]), minlength=VOCAB) / n
        assert (counts - law).abs().max() <= 4 * 0.5 / n**0.5
        assert {len(row) for row in sampled} <= {1, 2}
        assert all(EOS not in row[:-1] and (len(row) == 2 or row == [EOS]) for row in sampled)


def test_branches_are_drawn_from_the_global_random_state():
    model, prefixes = sharp_llama(), prefixes_of((2, 9))
    first, again, other = (
        (torch.manual_seed(seed), branched(model, prefixes, [9, 9]))[1] for seed in (0, 0, 1)
    )
    assert first == again != other


def test_a_layer_with_room_holds_what_a_growing_layer_holds():
    """Also behind its room, where `generate` never goes by itself, and in rows taken from it."""
    generator = torch.Generator().manual_seed(0)
    first, *more = (torch.randn(2, 2, n, 3, generator=generator) for n in (4, 1, 1, 2, 1))
    plain, rows = DynamicLayer(), torch.tensor([1, 1, 0])
    plain.update(first, 2 * first)
    roomy = RoomyLayer(plain, rows, room=3)
    plain.reorder_cache(rows)
    for states in more:
        told = [layer.update(states[rows], 2 * states[rows]) for layer in (plain, roomy)]
        for (keys, values), layer in zip(told, (plain, roomy), strict=True):
            assert torch.equal(keys, told[0][0]) and torch.equal(values, told[0][1])
            assert layer.get_seq_length() == keys.size(-2)
    again = RoomyLayer(roomy, torch.tensor([2]), room=1)
    assert torch.equal(again.keys, plain.keys[2:]) and torch.equal(again.values, plain.values[2:])


def test_the_given_options_are_left_as_they_were():
    config = generation_config(cache_implementation="static")
    before = config.to_dict()
    branch(
        sharp_llama(),
        [[5, 6]],
        config,
        branches=2,
        max_new_tokens=[3],
        eos_token_ids=[EOS],
        rows_per_pass=2,
    )
    assert config.to_dict() == before


def test_a_cache_that_the_model_s_own_options_name_is_left_aside():
    """As some checkpoints on the Hub have it: `generate` would take no cache of ours."""
    model, prefixes = sharp_llama(), prefixes_of((5, 9))
    expected = [[greedy(model, prefix, 20)] * K for prefix in prefixes]
    model.generation_config.cache_implementation = "static"
    assert branched(model, prefixes, [20, 20], **GREEDY) == expected
    assert model.generation_config.cache_implementation == "static"


def test_an_end_that_only_the_options_know_ends_a_continuation():
    model, prefixes = sharp_llama(), prefixes_of((5,))
    tokens = greedy(model, prefixes[0], 20)
    end = next(token for token in tokens[1:] if token not in tokens[:1])
    ((row, *_),) = branched(model, prefixes, [40], **GREEDY, eos_token_id=[end])
    assert row == tokens[: tokens.index(end) + 1]
    ((row, *_),) = branched(model, prefixes, [40], **GREEDY, eos_token_id=end)
    assert row == tokens[: tokens.index(end) + 1]


def test_options_of_the_model_s_own_are_refused_too():
    model = sharp_llama()
    model.generation_config.min_new_tokens = 3
    message = "min_new_tokens=3 is not supported in the model's generation_config where"
    with pytest.raises(ValueError, match=message):
        branched(model, [[5]], [2])
    assert branched(model, [[5]], [2], min_new_tokens=0), "what is asked for comes first"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"prefixes": [[5], []]}, "the length of prefix_ids is 0"),
        ({"budgets": [2, 0]}, "max_new_tokens is 0"),
        ({"branches": 0}, "branches is 0"),
        ({"min_new_tokens": 3}, r"min_new_tokens=3 is not supported where .* at None|0"),
        ({"num_beams": 2}, "num_beams=2 is not supported where"),
        ({"encoder_repetition_penalty": 1.5}, r"encoder_repetition_penalty=1\.5 is not"),
        ({"encoder_no_repeat_ngram_size": 2}, "encoder_no_repeat_ngram_size=2 is not"),
        ({"token_healing": True}, "token_healing=True is not"),
        ({"min_length": 3}, "min_length=3 is not"),
        ({"max_time": 9.0}, r"max_time=9\.0 is not"),
        ({"stop_strings": ["."]}, r"stop_strings=\['\.'\] is not"),
        ({"forced_eos_token_id": 1}, "forced_eos_token_id=1 is not"),
    ],
    ids=str,
)
def test_what_cannot_be_continued_is_refused(options, reason):
    given = {"prefixes": [[5], [6]], "budgets": [2, 2], **options}
    with pytest.raises(ValueError, match=reason):
        branched(sharp_llama(), **given)


def test_nothing_to_branch():
    assert branched(sharp_llama(), [], []) == []
