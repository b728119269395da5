"""What would silently compute another attention, or mean nothing, is refused in plain words."""

import runpy
import sys
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    StaticCache,
    Trainer,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tests.models.variants import BOTH, SIZES, config_of, tiny, tokens
from trl_ext.models import StickBreakingConfig, TapaConfig, _configuration

FOREIGN = [
    *("sdpa", "flash_attention_2", "flash_attention_3", "flex_attention", "vllm"),
    *("paged|eager", "paged|sdpa", "kernels-community/flash-attn", "no such attention"),
]
IDS = tokens(1, 5)
OLD = r"needs transformers 5\.24 or later, and here is"


@pytest.fixture(autouse=True)
def softmax_of_a_server():
    """What vLLM's Transformers backend does: a softmax of its own under a registered name."""

    def softmax(module, query, key, value, *_, scaling=1.0, **__):
        key, value = (x.repeat_interleave(query.size(1) // x.size(1), 1) for x in (key, value))
        return (query @ key.mT * scaling).softmax(-1) @ value, None

    AttentionInterface.register("vllm", softmax)
    AttentionMaskInterface.register("vllm", lambda **_: None)
    yield
    for interface in (AttentionInterface, AttentionMaskInterface):
        interface._global_mapping.pop("vllm")


@pytest.fixture(autouse=True)
def no_downloads(monkeypatch):
    def download(*_, **__):
        raise AssertionError("tried to fetch a kernel")

    monkeypatch.setattr("transformers.modeling_utils.lazy_import_flash_attention", download)


@pytest.mark.parametrize("name", FOREIGN)
class TestForeignAttention:
    said = "would compute another attention than that of '{}'.*'{}_chunked'.*vLLM.*use `generate`"

    def refused(self, model_type):
        return pytest.raises(ValueError, match=self.said.format(model_type, model_type))

    @pytest.mark.parametrize("variant", BOTH)
    def test_refused_at_construction(self, variant, name):
        with self.refused(variant):
            AutoModelForCausalLM.from_config(config_of(variant), attn_implementation=name)

    def test_refused_on_loading(self, main_model, name, tmp_path):
        main_model.save_pretrained(tmp_path)
        with self.refused(main_model.config.model_type):
            AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=name)

    def test_refused_on_a_change(self, main_model, name):
        for given in (name, {"": name}):
            with self.refused(main_model.config.model_type):
                main_model.set_attn_implementation(given)
        assert main_model(IDS).logits.isfinite().all()

    def test_refused_at_a_call(self, main_model, name):
        """Engines set the name on the configuration, behind the model's back."""
        main_model.config._attn_implementation = name
        with self.refused(main_model.config.model_type):
            main_model(IDS)


@pytest.mark.parametrize("variant", BOTH)
class TestWholeModels:
    def test_the_attention_of_the_other_model(self, variant):
        other = next(b for b in BOTH if b != variant)
        with pytest.raises(ValueError, match=f"'{other}_chunked' would compute another attention"):
            tiny(variant).set_attn_implementation(f"{other}_chunked")

    def test_own_names_change_nothing_but_the_speed(self, variant):
        model = tiny(variant)
        for name in ("eager", f"{variant}_naive", {"": f"{variant}_chunked"}):
            model.set_attn_implementation(name)
            model(IDS)
        assert model.config._attn_implementation == f"{variant}_chunked"

    @pytest.mark.parametrize("implementation", ["naive", "chunked", "triton"])
    def test_a_stock_llama_cannot_take_the_function(self, variant, implementation):
        name = f"{variant}_{implementation}"
        llama = LlamaForCausalLM._from_config(LlamaConfig(**SIZES), attn_implementation=name)
        said = f"LlamaAttention cannot take its attention from '{variant}'.*{variant}.from_llama"
        with pytest.raises(ValueError, match=said):
            llama(IDS)

    def test_the_flags_that_engines_read(self, variant):
        """Any of them set would be leave to bring in a softmax."""
        model = tiny(variant)
        for flag in ("attention_backend", "sdpa", "flash_attn", "flex_attn"):
            assert not getattr(model, f"_supports_{flag}")
        assert not model.is_backend_compatible()

    def test_a_mask_function_stands_behind_each_name(self, variant):
        """Without one the host drops padding and says nothing."""
        for name in ("naive", "chunked", "triton"):
            name = f"{variant}_{name}"
            assert name in ALL_ATTENTION_FUNCTIONS.valid_keys()
            mask = torch.ones(2, 3)
            assert AttentionMaskInterface()[name](attention_mask=mask) is mask

    def test_a_host_that_knows_no_cache_by_that_name(self, variant, monkeypatch):
        """The code in a checkpoint may meet an older one than the package installs beside."""

        @dataclass
        class Older:
            last_hidden_state: None = None
            past_key_values: None = None

        monkeypatch.setattr("trl_ext.models._decoder.BaseModelOutputWithPast", Older)
        with pytest.raises(ImportError, match=OLD):
            tiny(variant)

    def test_a_host_that_lacks_what_is_imported(self, variant, monkeypatch):
        monkeypatch.setitem(sys.modules, "huggingface_hub.dataclasses", None)
        with pytest.raises(ImportError, match=OLD):
            runpy.run_path(_configuration.__file__)

    def test_sequence_parallelism_of_deepspeed(self, variant, monkeypatch):
        """It puts its own function behind all names, and each process gets a part of the row."""
        model = tiny(variant)
        table = dict.fromkeys(ALL_ATTENTION_FUNCTIONS.keys(), lambda *_, **__: None)
        monkeypatch.setattr(ALL_ATTENTION_FUNCTIONS, "_local_mapping", table)
        for start in (lambda: model(IDS), lambda: tiny(variant)):
            with pytest.raises(ValueError, match=r"were replaced .* sequence parallelism"):
                start()

    def test_context_parallelism_of_the_trainer(self, variant):
        """The host's own words: it demands sdpa, which the model refuses."""
        split = SimpleNamespace(cp_enabled=True, cp_backend="torch")
        trainer = SimpleNamespace(accelerator=SimpleNamespace(parallelism_config=split))
        with pytest.raises(ValueError, match="Context parallelism is supported only with SDPA"):
            Trainer._prepare_context_parallel_inputs(trainer, tiny(variant), {"input_ids": IDS})

    @pytest.mark.parametrize("implementation", ["eager", "chunked"])
    def test_continuous_batching(self, variant, implementation):
        model = tiny(variant)
        if implementation != "eager":
            model.set_attn_implementation(f"{variant}_{implementation}")
        for start in (
            lambda: model.generate_batch([[3, 4, 5]], progress_bar=False),
            lambda: model.init_continuous_batching(),
            lambda: model.generate(IDS, cache_implementation="paged", max_new_tokens=2),
        ):
            with pytest.raises(ValueError, match=r"paged\|eager"):
                start()
        assert model(IDS).logits.isfinite().all()


class TestInputs:
    @pytest.mark.parametrize(
        ("mask", "said"),
        [
            (torch.ones(1, 1, 5, 5), r"shape \(1, 1, 5, 5\): pass \(1, 5\).*position_ids"),
            (torch.ones(1, 1, 5, 5).bool(), "A mask per pair of tokens is not supported"),
            (torch.ones(1, 6), r"shape \(1, 6\): pass \(1, 5\)"),
            (torch.ones(1, 4), r"shape \(1, 4\): pass \(1, 5\)"),
            (torch.ones(2, 5), r"shape \(2, 5\): pass \(1, 5\)"),
            (torch.ones(5), r"shape \(5,\): pass \(1, 5\)"),
            ({"full_attention": None}, r"attention_mask is a dict: pass \(1, 5\)"),
        ],
    )
    def test_masks_of_another_shape(self, main_model, mask, said):
        with pytest.raises(ValueError, match=said):
            main_model(IDS, attention_mask=mask)

    def test_a_cache_without_room(self, main_model):
        cache = StaticCache(config=main_model.config, max_cache_len=4)
        with pytest.raises(ValueError, match="has 5 columns, and the cache has room for 4 tokens"):
            main_model(IDS, attention_mask=torch.ones(1, 5), cache=cache)

    def test_a_mask_without_the_cached_tokens(self, main_model):
        cache = main_model(IDS).cache
        with pytest.raises(ValueError, match="has 1 columns, and there are 5 cached and 1 new"):
            main_model(IDS[:, :1], cache=cache, attention_mask=torch.ones(1, 1))

    def test_tokens_and_embeddings(self, main_model):
        for given in ({}, {"input_ids": IDS, "inputs_embeds": torch.zeros(1, 5, 32)}):
            with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
                main_model(**given)


CONFIGURATIONS = [
    ({"attention_dropout": 0.1}, "attention_dropout=0.1 is not defined.*Set it to 0"),
    ({"num_attention_heads": 5}, "num_attention_heads=5 does not divide hidden_size=32"),
    ({"num_key_value_heads": 3}, "num_key_value_heads=3 does not divide num_attention_heads=4"),
    ({"num_attention_heads": 5, "head_dim": 8}, "num_key_value_heads=2 does not divide"),
    *(
        ({name: size}, f"{name}={size} is no size: use a whole number from 1 on")
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
        for size in (0, -1)
    ),
    *(
        ({name: size}, f"{name}={size} is no size: use a whole number from 1 on")
        for name in ("num_attention_heads", "num_key_value_heads", "head_dim")
        for size in (0, -4)
    ),
    ({"rope_theta": 1e4}, "rope_theta=10000.0 has no effect.*Leave it out"),
    ({"rope_scaling": {"factor": 2}}, "rope_scaling={'factor': 2} has no effect"),
    ({"rope_parameters": {"rope_theta": 1.0}}, "rope_parameters=.* has no effect"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 has no effect"),
    ({"sliding_window": 4}, "sliding_window=4 has no effect"),
]
OF_TAPA = [
    *(
        ({"amplitude_fraction": x}, f"amplitude_fraction={x} of head_dim=8.*as 0.5 does")
        for x in (0, 0.0, 1, 1.0, -0.5, 0.3, 2.0, float("nan"), float("inf"))
    ),
    *(
        ({"phase_alpha": x}, f"phase_alpha={x} is no exponent.*use a positive number")
        for x in (0, 0.0, -1, -0.1, float("nan"), float("inf"))
    ),
    ({"phase": "cubic"}, "phase='cubic' is not a phase of the paper: use 'quadratic', or 'linear'"),
]
OF_STICKBREAKING = [
    ({"remainder": "stick"}, "remainder='stick' is not defined: use 'bias'.*'value'.*'none'"),
]


class TestConfigurations:
    @pytest.mark.parametrize(
        ("config", "fields", "said"),
        [
            *((c, *row) for c in (TapaConfig, StickBreakingConfig) for row in CONFIGURATIONS),
            *((TapaConfig, *row) for row in OF_TAPA),
            *((StickBreakingConfig, *row) for row in OF_STICKBREAKING),
        ],
        ids=str,
    )
    def test_fields_that_fit_no_model(self, config, fields, said):
        with pytest.raises(ValueError, match=said):
            config(**{**SIZES, **fields})

    @pytest.mark.parametrize("variant", BOTH)
    @pytest.mark.parametrize(
        "fields", [{"hidden_size": "32"}, {"num_hidden_layers": 2.5}, {"head_dim": "8"}], ids=str
    )
    def test_fields_of_a_wrong_type(self, variant, fields):
        """The host's own words, which name the field, the value and what was expected."""
        (name, value), *_ = fields.items()
        with pytest.raises(StrictDataclassFieldValidationError) as refused:
            config_of(variant, **fields)
        assert f"'{name}'" in str(refused.value) and str(value) in str(refused.value)
        assert "expected int" in str(refused.value)

    def test_symbols_of_a_wrong_type(self):
        for variant, fields in (
            ("tapa", {"phase_alpha": "0.1"}),
            ("tapa", {"phase": None}),
            ("stickbreaking", {"remainder": None}),
            ("stickbreaking", {"attend_current": "yes"}),
            ("stickbreaking", {"head_norm": 1}),
        ):
            name = next(iter(fields))
            with pytest.raises(StrictDataclassFieldValidationError, match=f"'{name}'"):
                config_of(variant, **fields)

    def test_whole_numbers_are_numbers(self):
        assert config_of("tapa", phase_alpha=1).phase_alpha == 1

    def test_sizes_that_follow_from_others(self):
        config = TapaConfig(hidden_size=512, num_attention_heads=8)
        assert (config.num_key_value_heads, config.head_dim) == (8, 64)
        assert config.intermediate_size == 1408  # 8/3 · 512 = 1365.3, in whole 64s
