"""Saved and loaded, in one file or many, whole or in part, wider or in another precision."""

import copy
import json
import os
import pickle
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)

from tests.models.variants import (
    BOTH,
    CAUSAL,
    VARIANTS,
    VOCABULARY,
    config_of,
    largest,
    tiny,
    tokens,
)

IDS = tokens(2, 9)
KNOWN = """
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import trl_ext
assert not {"tapa", "stickbreaking"} & set(CONFIG_MAPPING), "a bare import registers nothing"
"""


def tied(model):
    return model.get_input_embeddings().weight is model.get_output_embeddings().weight


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **options)


@pytest.mark.parametrize(
    "statement",
    ["import trl_ext.models", "from trl_ext import TapaModel", "trl_ext.StickBreakingConfig"],
)
def test_one_import_makes_both_types_known(statement, tmp_path):
    """In a fresh process; saved without code, so that only the registration can find the class."""
    for name in BOTH:
        config_of(name).to_json_file(tmp_path / f"{name}.json")
    lines = [
        f"AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(r'{tmp_path / name}.json'))"
        for name in BOTH
    ]
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", "\n".join([KNOWN, statement, *lines])],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr[-2000:]


class TestCheckpoints:
    def test_a_round_trip_changes_no_bit(self, model, tmp_path):
        model.save_pretrained(tmp_path)
        again = load(tmp_path)
        assert type(again) is type(model) and not again.training
        assert torch.equal(again(IDS).logits, model(IDS).logits)
        assert tied(again) == tied(model) == model.config.tie_word_embeddings
        saved = load_file(tmp_path / "model.safetensors")
        assert ("lm_head.weight" in saved) != tied(model)
        left_out = {"lm_head.weight"} if tied(model) else set()
        assert set(saved) == set(model.state_dict()) - left_out

    def test_shards(self, model, tmp_path):
        model.save_pretrained(tmp_path, max_shard_size="20KB")
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert len(set(index["weight_map"].values())) > 1
        again = load(tmp_path)
        assert torch.equal(again(IDS).logits, model(IDS).logits) and tied(again) == tied(model)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16"])
    def test_a_dtype_on_loading(self, model, dtype, tmp_path):
        model.save_pretrained(tmp_path)
        again = load(tmp_path, dtype=dtype)
        assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
        for name, parameter in again.named_parameters():
            assert torch.equal(parameter, model.get_parameter(name).bfloat16()), name

    def test_the_dtype_of_the_checkpoint(self, model, tmp_path):
        model.half().save_pretrained(tmp_path)
        assert load(tmp_path, dtype="auto").dtype == torch.float16
        assert load(tmp_path, dtype=torch.float32).dtype == torch.float32

    @pytest.mark.parametrize("device_map", ["cpu", "auto", "sequential", {"": "cpu"}], ids=str)
    def test_device_map(self, model, device_map, tmp_path):
        model.save_pretrained(tmp_path)
        again = load(tmp_path, device_map=device_map)
        assert largest(again(IDS.to(again.device)).logits.cpu(), model(IDS).logits) < 1e-5

    def test_layers_kept_on_disk(self, model, tmp_path):
        """Accelerate brings each in when its turn comes, and the cache goes along."""
        model.save_pretrained(tmp_path)
        split = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.norm": "cpu"}
        split |= {"model.layers.1": "disk", "lm_head": "cpu"}
        again = load(tmp_path, device_map=split, offload_folder=str(tmp_path / "offloaded"))
        assert next(again.model.layers[1].parameters()).device.type == "meta"
        assert torch.equal(again(IDS).logits, model(IDS).logits)
        options = {"max_new_tokens": 4, "do_sample": False}
        assert torch.equal(again.generate(IDS, **options), model.generate(IDS, **options))

    def test_the_other_classes_load_the_same_weights(self, model, tmp_path):
        model.save_pretrained(tmp_path)
        backbone = AutoModel.from_pretrained(tmp_path)
        hidden = backbone(IDS).last_hidden_state
        assert torch.equal(model.lm_head(hidden), model(IDS).logits)
        classifier, loaded = AutoModelForSequenceClassification.from_pretrained(
            tmp_path, num_labels=3, output_loading_info=True
        )
        assert set(loaded["missing_keys"]) == {"score.weight"}
        assert torch.equal(classifier.model(IDS).last_hidden_state, hidden)
        assert 0 < classifier.score.weight.std() < 0.1

    def test_a_backbone_grows_a_head(self, model, tmp_path):
        model.model.save_pretrained(tmp_path)
        again = load(tmp_path)
        assert torch.equal(again.model(IDS).last_hidden_state, model.model(IDS).last_hidden_state)
        assert tied(again) == model.config.tie_word_embeddings

    def test_an_attention_is_chosen_on_loading_and_not_saved(self, model, tmp_path):
        model.save_pretrained(tmp_path)
        naive = f"{model.config.model_type}_naive"
        again = load(tmp_path, attn_implementation=naive)
        assert again.config._attn_implementation == naive
        assert largest(again(IDS).logits, model(IDS).logits) < 1e-5
        again.save_pretrained(tmp_path / "again")
        assert load(tmp_path / "again").config._attn_implementation == "eager"

    def test_copies_and_pickles(self, model):
        for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(again(IDS).logits, model(IDS).logits) and tied(again) == tied(model)


@pytest.mark.parametrize("variant", VARIANTS)
class TestConfiguration:
    def test_every_field_is_kept(self, variant, tmp_path):
        config = config_of(variant)
        config.save_pretrained(tmp_path)
        again = AutoConfig.from_pretrained(tmp_path)
        assert type(again) is type(config)
        assert again.to_diff_dict() == config.to_diff_dict()
        for field, value in {**VARIANTS[variant][1], "head_dim": 8}.items():
            assert getattr(again, field) == value

    def test_auto_classes_build_the_model(self, variant):
        config = config_of(variant)
        built = AutoModelForCausalLM.from_config(config)
        assert type(built) is CAUSAL[type(config)] and built.config._attn_implementation == "eager"
        assert built(IDS).logits.shape == (2, 9, VOCABULARY)


class TestInitialization:
    def test_a_fresh_model_is_drawn_as_its_configuration_says(self, model):
        fresh = type(model)(model.config)
        for name, parameter in fresh.named_parameters():
            if "norm" in name:
                assert (parameter == 1).all(), name
            elif "bias" in name:
                assert (parameter == 0).all(), name
            else:
                assert abs(parameter.std() / 0.02 - 1) < 0.2, name

    def test_missing_parameters_are_drawn_too(self, tmp_path):
        """They have passed through the meta device, where nothing is drawn: the remainder bias must
        start at 0 and the head norm at 1, so that the first changes nothing."""
        plain = tiny("stickbreaking", remainder="none")
        plain.save_pretrained(tmp_path)
        again, loaded = load(tmp_path, remainder="bias", output_loading_info=True)
        assert set(loaded["missing_keys"]) == {
            f"model.layers.{i}.self_attn.remainder_bias" for i in range(2)
        }
        assert torch.equal(again(IDS).logits, plain(IDS).logits)
        normed = load(tmp_path, head_norm=True)
        for layer in normed.model.layers:
            assert (layer.self_attn.head_norm.weight == 1).all()

    def test_a_model_built_without_memory_is_whole_after_loading(self, model, tmp_path):
        model.save_pretrained(tmp_path)
        with torch.device("meta"):
            empty = type(model)(model.config)
        assert {p.device.type for p in empty.parameters()} == {"meta"}
        again = load(tmp_path)
        assert {t.device.type for t in (*again.parameters(), *again.buffers())} == {"cpu"}


class TestVocabulary:
    @pytest.mark.parametrize("size", [VOCABULARY + 9, VOCABULARY - 3])
    def test_resizing_keeps_what_it_can(self, model, size, tmp_path):
        ids, before = IDS.clamp(max=size - 1), model(IDS.clamp(max=size - 1)).logits
        model.resize_token_embeddings(size)
        kept, was_tied = min(size, VOCABULARY), model.config.tie_word_embeddings
        assert model.config.vocab_size == size and tied(model) == was_tied
        assert torch.equal(model(ids).logits[..., :kept], before[..., :kept])
        assert model(ids).logits.size(-1) == size and model(ids, labels=ids).loss.isfinite()
        model.save_pretrained(tmp_path)
        again = load(tmp_path)
        assert torch.equal(again(ids).logits, model(ids).logits) and tied(again) == was_tied

    def test_a_new_token_is_trained(self, model):
        model.resize_token_embeddings(VOCABULARY + 1)
        ids = torch.full((1, 4), VOCABULARY)
        model(ids, labels=ids).loss.backward()
        assert model.get_input_embeddings().weight.grad[VOCABULARY].abs().sum() > 0
        assert model.get_output_embeddings().weight.grad[VOCABULARY].abs().sum() > 0

    def test_embeddings_can_be_replaced(self, model):
        other = torch.nn.Embedding(VOCABULARY, 32)
        model.set_input_embeddings(other)
        assert model.get_input_embeddings() is other and model.base_model is model.model
