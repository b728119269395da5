"""`from_llama`: the weights are the checkpoint's, and nothing that is no Llama slips through."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tests.models.variants import SIZES, VOCABULARY, tokens
from trl_ext.models import StickBreakingForCausalLM, TapaForCausalLM, stickbreaking, tapa

# Each converts to a model that on a single token does what its source does: see the test.
CONVERSIONS = {
    "tapa": (tapa.from_llama, {}),
    "stickbreaking": (stickbreaking.from_llama, {"remainder": "value"}),
}
SOURCES: dict[str, tuple[type, type, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "llama_tied": (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": True}),
    "llama_biased": (LlamaConfig, LlamaForCausalLM, {"attention_bias": True, "mlp_bias": True}),
    "llama_wide": (LlamaConfig, LlamaForCausalLM, {"head_dim": 16, "hidden_act": "gelu"}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
}


def source_of(name, **fields):
    config, model_class, own = SOURCES[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = model_class(config(**{**SIZES, **own, **fields}))
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.fixture(params=SOURCES)
def source(request):
    return source_of(request.param)


@pytest.fixture(params=CONVERSIONS)
def conversion(request):
    convert, fields = CONVERSIONS[request.param]
    return lambda model, **more: convert(model, **{**fields, **more})


def test_weights_are_those_of_the_source(source, conversion):
    weights, converted = source.state_dict(), conversion(source).state_dict()
    assert weights.keys() <= converted.keys()
    assert all(torch.equal(converted[name], weights[name]) for name in weights)
    fresh = {name: converted[name] for name in converted.keys() - weights.keys()}
    assert all(name.endswith("o_proj.bias") for name in fresh)
    assert all(not weight.any() for weight in fresh.values())


def test_a_single_token_is_answered_as_by_the_source(source, conversion):
    """One key takes all of a softmax, and none leaves the value the whole stick: both give v."""
    one = torch.arange(VOCABULARY)[:, None]
    assert torch.equal(conversion(source)(one).logits, source(one).logits)


def test_two_tokens_are_not(source, conversion):
    """The attention is another: this is a start for training, as the docstring says."""
    two = tokens(8, 2)
    assert not torch.allclose(conversion(source)(two).logits, source(two).logits, atol=1e-2)


def test_the_source_stays_as_it_is(conversion):
    source = source_of("llama")
    before = {name: weight.clone() for name, weight in source.state_dict().items()}
    converted = conversion(source)
    with torch.no_grad():
        for parameter in converted.parameters():
            parameter.zero_()
    assert all(torch.equal(weight, before[name]) for name, weight in source.state_dict().items())


@pytest.mark.parametrize("name", ["llama", "llama_tied"])
def test_ties_ids_dtype_mode_and_generation_are_carried(name, conversion):
    source = source_of(name, max_position_embeddings=77).to(torch.bfloat16).train()
    source.generation_config.max_new_tokens = 7
    source.config.name_or_path = "someone/source"
    converted = conversion(source)
    tied = converted.lm_head.weight is converted.model.embed_tokens.weight
    assert tied == (name == "llama_tied")
    for field in ("vocab_size", "pad_token_id", "eos_token_id", "max_position_embeddings"):
        assert getattr(converted.config, field) == getattr(source.config, field)
    assert {p.dtype for p in converted.parameters()} == {torch.bfloat16}
    assert converted.training
    assert converted.generation_config.max_new_tokens == 7
    assert converted.generation_config is not source.generation_config
    assert converted.config.name_or_path == "someone/source"


def test_a_path_does_as_a_model_does(tmp_path, conversion):
    source = source_of("llama")
    source.save_pretrained(tmp_path)
    ids = tokens(2, 9)
    assert torch.equal(conversion(str(tmp_path))(ids).logits, conversion(source)(ids).logits)


def test_fields_are_those_of_the_method():
    source = source_of("llama")
    model = tapa.from_llama(source, phase="linear", amplitude_fraction=0.25, phase_alpha=0.2)
    assert isinstance(model, TapaForCausalLM)
    assert (model.config.phase, model.config.amplitude_fraction) == ("linear", 0.25)
    model = tapa.from_llama(source, attn_implementation="tapa_naive")
    assert model.config._attn_implementation == "tapa_naive"
    model = stickbreaking.from_llama(source, head_norm=True)
    assert isinstance(model, StickBreakingForCausalLM)
    for layer in model.model.layers:
        assert torch.equal(layer.self_attn.head_norm.weight, torch.ones(4, 8))
        assert torch.equal(layer.self_attn.remainder_bias, torch.zeros(4, 8))


def test_training_goes_on(conversion):
    """Every weight learns, those that the source did not have too."""
    model = conversion(source_of("qwen2")).train()
    fresh = conversion(source_of("qwen2"))
    ids = torch.arange(3, VOCABULARY).repeat(2, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(12):
        loss = model(ids, labels=ids).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.6 * losses[0]
    pairs = zip(model.parameters(), fresh.parameters(), strict=True)
    assert all(not torch.equal(one, other) for one, other in pairs)


REFUSED = {
    "multipliers": (GemmaConfig, GemmaForCausalLM, {"head_dim": 8}, "model_type='gemma'"),
    "norms of q and k": (Qwen3Config, Qwen3ForCausalLM, {}, "model_type='qwen3'"),
    "experts": (MixtralConfig, MixtralForCausalLM, {}, "model_type='mixtral'"),
    "a window": (MistralConfig, MistralForCausalLM, {"sliding_window": 8}, "sliding_window=8"),
    "no head": (LlamaConfig, LlamaForSequenceClassification, {}, r"'score.weight'\] have no place"),
    "dropout": (LlamaConfig, LlamaForCausalLM, {"attention_dropout": 0.1}, "attention_dropout=0.1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_llama_is_refused(name, conversion):
    config, model_class, fields, said = REFUSED[name]
    with pytest.raises(ValueError, match=said):
        conversion(model_class(config(**{**SIZES, **fields})))


def test_other_keys_and_shapes_are_named(conversion):
    with pytest.raises(ValueError, match=r"\['lm_head.weight'.* have another shape"):
        conversion(source_of("llama"), hidden_size=64, head_dim=8)
    model = source_of("llama")
    model.model.layers[0].self_attn.q_norm = torch.nn.LayerNorm(8)
    with pytest.raises(ValueError, match=r"'model.layers.0.self_attn.q_norm.bias'.* have no place"):
        conversion(model)
    adapted = get_peft_model(source_of("llama"), LoraConfig())
    with pytest.raises(ValueError, match=r"lora_A.* have no place.*without adapters"):
        conversion(adapted.base_model.model)
    with pytest.raises(ValueError, match=r"source is a PeftModel.*merge_and_unload"):
        conversion(adapted)
    offloaded = source_of("llama").to("meta")
    with pytest.raises(ValueError, match="missing or offloaded"):
        conversion(offloaded)


def test_a_field_that_does_not_exist_is_refused(conversion):
    with pytest.raises(ValueError, match=r"no fields \['phase_alfa'\]"):
        conversion(source_of("llama"), phase_alfa=0.2)
    with pytest.raises(ValueError, match="dtype is that of the source"):
        conversion(source_of("llama"), dtype="bfloat16")
