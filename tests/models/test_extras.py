"""PEFT, bitsandbytes and Liger on both models; the last two where they are installed."""

import copy
import importlib.util
import sys
from importlib.machinery import SourceFileLoader
from types import SimpleNamespace

import peft
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GPTQConfig,
    PreTrainedModel,
    QuantoConfig,
    Trainer,
    TrainingArguments,
)
from transformers.integrations.liger import apply_liger_kernel as host_applies_liger

from tests.models.variants import BOTH, CLASSIFIER, gradients, largest, tiny, tokens
from trl_ext.models._late import when_imported
from trl_ext.models._liger import apply_liger_kernel
from trl_ext.models._quantization import leave_exact

# Late entries


@pytest.fixture
def late_module(tmp_path, monkeypatch):
    """The name of a module that can be imported, and is not."""
    (tmp_path / "late_package").mkdir()
    (tmp_path / "late_package" / "__init__.py").touch()
    (tmp_path / "late_package" / "table.py").write_text("TABLE = {}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    yield "late_package.table"
    for name in ("late_package", "late_package.table"):
        sys.modules.pop(name, None)


def test_all_actions_follow_the_import_and_none_forces_it(late_module):
    seen = []
    for word in ("one", "two"):
        when_imported(late_module, lambda module, word=word: seen.append((word, module.TABLE)))
    assert importlib.util.find_spec(late_module)  # looking is not importing
    assert late_module not in sys.modules and seen == []
    module = importlib.import_module(late_module)
    assert sorted(word for word, _ in seen) == ["one", "two"]
    assert all(table is module.TABLE for _, table in seen)
    assert module.__spec__.loader is module.__loader__
    assert isinstance(module.__loader__, SourceFileLoader)


def test_an_import_that_has_been_is_acted_on_at_once(late_module):
    module, seen = importlib.import_module(late_module), []
    when_imported(late_module, seen.append)
    assert seen == [module]


# PEFT


def adapted(name, method):
    """In float64: the phase makes much of what a merge rounds."""
    model = peft.get_peft_model(tiny(name).double(), method)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn_like(parameter))
    return model


METHODS = {
    "default": lambda: peft.LoraConfig(),
    "all-linear": lambda: peft.LoraConfig(target_modules="all-linear"),
    "ia3": lambda: peft.IA3Config(),
}
TARGETS = {
    "default": {"q_proj", "v_proj"},
    "all-linear": {
        *("q_proj", "k_proj", "v_proj", "o_proj"),
        *("gate_proj", "up_proj", "down_proj"),
    },
    "ia3": {"k_proj", "v_proj", "down_proj"},
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", BOTH)
def test_adapters_find_llamas_targets_and_merge(name, method, tmp_path):
    ids, plain = tokens(2, 12), tiny(name).double()
    model = adapted(name, METHODS[method]())
    assert {target.split(".")[-1] for target in model.targeted_module_names} == TARGETS[method]
    logits = model(ids).logits
    assert largest(logits, plain(ids).logits) > 0.1
    with model.disable_adapter():
        assert torch.equal(model(ids).logits, plain(ids).logits)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(tiny(name).double(), tmp_path)
    assert torch.equal(again(ids).logits, logits)
    merged = model.merge_and_unload()
    assert type(merged) is type(plain)
    assert largest(merged(ids).logits, logits) < 1e-9


def test_lora_reaches_the_remainder_bias_by_name():
    model = adapted("stickbreaking", peft.LoraConfig(target_parameters=["remainder_bias"]))
    ids = tokens(2, 12)
    logits = model(ids).logits
    loss = model(ids, labels=ids).loss
    loss.backward()
    learning = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    for part in ("q_proj.lora_A", "v_proj.lora_B", "self_attn.lora_A", "self_attn.lora_B"):
        assert any(part in name for name in learning), part
    merged = model.merge_and_unload()
    assert largest(merged(ids).logits, logits) < 1e-9
    before = tiny("stickbreaking").model.layers[0].self_attn.remainder_bias
    assert largest(merged.model.layers[0].self_attn.remainder_bias, before) > 0.1


# Quantization


def test_exceptions_are_added_and_the_callers_object_is_not_touched():
    given = BitsAndBytesConfig(llm_int8_skip_modules=["o_proj"])
    before = copy.deepcopy(given.to_dict())
    exact = leave_exact(given, ["q_proj"])
    assert exact.llm_int8_skip_modules == ["o_proj", "q_proj"]
    assert given.to_dict() == before
    # The host's default, which a list would replace: the heads stay exact.
    default = leave_exact(BitsAndBytesConfig(), ["q_proj"]).llm_int8_skip_modules
    assert set(default) == {"lm_head", "score", "q_proj"}
    assert leave_exact(BitsAndBytesConfig(llm_int8_skip_modules=[]), ["q_proj"]).to_dict()[
        "llm_int8_skip_modules"
    ] == ["q_proj"]


def test_other_quantizations_and_dictionaries_are_understood():
    quanto = leave_exact(QuantoConfig(weights="int8"), ["q_proj"])
    assert set(quanto.modules_to_not_convert) == {"lm_head", "score", "q_proj"}
    exact = leave_exact({"quant_method": "quanto", "weights": "int4"}, ["q_proj"])
    assert exact.weights == "int4" and "q_proj" in exact.modules_to_not_convert
    without_list = SimpleNamespace(bits=4)
    assert leave_exact(without_list, ["q_proj"]) == without_list


def test_a_quantization_by_examples_that_takes_all_is_refused():
    config = GPTQConfig(bits=4, dataset=["a"])
    with pytest.raises(ValueError, match="GPTQConfig would quantize q_proj too"):
        leave_exact(config, ["q_proj"])
    config.modules_in_block_to_quantize = [["mlp.up_proj"]]
    assert leave_exact(config, ["q_proj"]).to_dict() == config.to_dict()


FORMATS = {
    "nf4": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_compute_dtype": torch.float32,
    },
    "int8": {"load_in_8bit": True},
}
PHASE = ("q_proj", "k_proj")
OTHERS = ("v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(params=FORMATS)
def quantization(request):
    pytest.importorskip("bitsandbytes")
    return lambda **fields: BitsAndBytesConfig(**FORMATS[request.param], **fields)


def quantized_modules(model):
    linear = [n for n, m in model.named_modules() if type(m).__module__.startswith("bitsandbytes")]
    return {name.split(".")[-1] for name in linear}


@pytest.mark.parametrize("classes", [None, CLASSIFIER])
def test_quantized_tapa_keeps_its_phase(quantization, classes, tmp_path):
    plain = tiny("tapa", **({"classes": classes} if classes else {}))
    plain.save_pretrained(tmp_path)
    model = type(plain).from_pretrained(tmp_path, quantization_config=quantization())
    assert quantized_modules(model) == set(OTHERS)
    for layer, exact in zip(model.model.layers, plain.model.layers, strict=True):
        for name in PHASE:
            weight = getattr(layer.self_attn, name).weight
            assert torch.equal(weight, getattr(exact.self_attn, name).weight)


def test_a_list_of_ones_own_does_not_quantize_the_phase(quantization, tmp_path):
    tiny("tapa").save_pretrained(tmp_path)
    own = quantization(llm_int8_skip_modules=["lm_head", "mlp"])
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=own)
    assert quantized_modules(model) == {"v_proj", "o_proj", *OTHERS[2:]} - {"mlp"}


def test_stickbreaking_is_quantized_as_llama(quantization, tmp_path):
    tiny("stickbreaking").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=quantization())
    assert quantized_modules(model) == {*PHASE, *OTHERS}
    assert torch.isfinite(model(tokens(2, 12)).logits).all()


def test_a_quantized_checkpoint_comes_back(quantization, tmp_path):
    tiny("tapa").save_pretrained(tmp_path / "plain")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", quantization_config=quantization()
    )
    model.save_pretrained(tmp_path / "quantized")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized")
    assert quantized_modules(again) == set(OTHERS)
    ids = tokens(2, 12)
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_exact_phases_are_worth_it(tmp_path):
    """NF4 in q and k as well doubles what all other projections together do to an attention."""
    pytest.importorskip("bitsandbytes")
    plain = tiny("tapa", hidden_size=256, num_hidden_layers=1, num_attention_heads=2)
    plain.save_pretrained(tmp_path)
    # The larger the input, the larger the phase.
    x = 1.5 * torch.randn(2, 128, 256, generator=torch.Generator().manual_seed(0))

    def output(model):
        visible = {"attention_mask": None, "document_ids": None, "query_offset": None}
        return model.model.layers[0].self_attn(x, visible)[0]

    def error(loads):
        config = BitsAndBytesConfig(**FORMATS["nf4"])
        found = output(loads(type(plain), tmp_path, quantization_config=config))
        exact = output(plain)
        return ((found - exact).norm() / exact.norm()).item()

    hosts = error(PreTrainedModel.from_pretrained.__func__)
    ours = error(type(plain).from_pretrained.__func__)
    assert ours < 0.5 * hosts, (ours, hosts)


def test_qlora_trains(quantization, tmp_path):
    tiny("tapa").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=quantization())
    model = peft.get_peft_model(peft.prepare_model_for_kbit_training(model), peft.LoraConfig())
    ids = tokens(2, 12)
    model(ids, labels=ids).loss.backward()
    learning = [n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()]
    assert {name.split(".")[-4] for name in learning} == {"q_proj", "v_proj"}


# Liger


@pytest.fixture
def liger(monkeypatch):
    """Liger in Triton's interpreter, of whose gaps it needs two filled: floats and libdevice."""
    pytest.importorskip("liger_kernel")
    language = pytest.importorskip("triton.language")
    if torch.cuda.is_available():
        pytest.skip("runs kernels in the interpreter, which is for machines without a GPU")
    import numpy as np
    from liger_kernel.ops import rms_norm
    from liger_kernel.transformers import monkey_patch
    from triton.runtime import interpreter

    convert = interpreter._implicit_cvt

    def convert_floats_too(argument):
        if not isinstance(argument, float):
            return convert(argument)
        handle = interpreter.TensorHandle(np.array([argument], np.float32), language.float32)
        return language.tensor(handle, language.float32)

    monkeypatch.setattr(interpreter, "_implicit_cvt", convert_floats_too)
    monkeypatch.setattr(rms_norm, "rsqrt", lambda x: language.rsqrt(x))
    return monkey_patch


PARTS = ("rms_norm", "swiglu", "fused_linear_cross_entropy")


@pytest.mark.parametrize("parts", [PARTS, *[(part,) for part in PARTS]], ids="+".join)
@pytest.mark.parametrize("name", BOTH)
def test_liger_computes_the_same(liger, name, parts):
    plain, model, ids = tiny(name).train(), tiny(name).train(), tokens(2, 12)
    host_applies_liger(model, {part: part in parts for part in PARTS})
    names = [module._get_name() for module in model.modules()]
    norms = 1 + 2 * len(model.model.layers)
    assert names.count("LigerRMSNorm") == ("rms_norm" in parts) * norms
    assert names.count("LigerSwiGLUMLP") == ("swiglu" in parts) * len(model.model.layers)
    output, expected = model(ids, labels=ids), plain(ids, labels=ids)
    assert (output.logits is None) == ("fused_linear_cross_entropy" in parts)
    assert largest(output.loss, expected.loss) < 1e-5
    ours, theirs = gradients(model, output.loss), gradients(plain, expected.loss)
    assert largest(ours, theirs) < 1e-5 * theirs.abs().max()
    model.eval(), plain.eval()
    assert largest(model(ids).logits, plain(ids).logits) < 1e-4
    lengths = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(ids, **lengths), plain.generate(ids, **lengths))


def test_the_trainers_switch_reaches_liger(liger, tmp_path):
    model = tiny("tapa")
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=1, use_liger_kernel=True, report_to=[], use_cpu=True
    )
    rows = [{"input_ids": row, "labels": row} for row in tokens(2, 6)]
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    assert model.model.norm._get_name() == "LigerRMSNorm"
    plain = tiny("tapa")
    plain.load_state_dict(model.state_dict())
    expected = Trainer(plain, TrainingArguments(str(tmp_path), report_to=[], use_cpu=True))
    found = trainer.evaluate()["eval_loss"]
    assert found == pytest.approx(expected.evaluate(rows)["eval_loss"], rel=1e-5)


def test_liger_leaves_a_classifiers_forward(liger):
    model, ids = tiny("tapa", classes=CLASSIFIER), tokens(2, 12)
    before = model(ids).logits
    host_applies_liger(model, None)
    assert model.model.norm._get_name() == "LigerRMSNorm"
    assert largest(model(ids).logits, before) < 1e-4


def test_what_liger_cannot_do_here_is_refused():
    nothing = SimpleNamespace()
    with pytest.raises(ValueError, match="model=None"):
        apply_liger_kernel(nothing)
    with pytest.raises(ValueError, match="cross_entropy=True"):
        apply_liger_kernel(nothing, model=tiny("tapa"), cross_entropy=True)
    with pytest.raises(ValueError, match="hidden_act='gelu'"):
        apply_liger_kernel(nothing, model=tiny("tapa", hidden_act="gelu"))
