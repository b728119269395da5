"""What our constructor mends or refuses, and guards that stop a run before it harms itself."""

import re
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from tests.runs import OURS, TOKENIZER, build, by_letters, parameters, vowels
from tests.tiny import tiny_llama, tiny_prompts
from trl_ext import GRPOTrainer, NashTrainer, OnlineDPOTrainer, PassAtKTrainer
from trl_ext.cards import card_problems


def test_without_args_a_config_of_the_own_class_is_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = tiny_llama(len(TOKENIZER))
    model.config._name_or_path = "someone/tiny"
    run = PassAtKTrainer(model, vowels, None, tiny_prompts(4), processing_class=TOKENIZER)
    assert isinstance(run.args, PassAtKTrainer.config_class)
    assert run.args.output_dir == "tiny-Pass@k"


def test_frozen_model_is_refused(tmp_path):
    model = tiny_llama(len(TOKENIZER)).requires_grad_(False)
    with pytest.raises(ValueError, match=r"no parameter requires a gradient.*is_trainable"):
        build(GRPOTrainer, tmp_path, model=model)


@pytest.mark.parametrize(
    ("options", "refused"),
    [
        ({"kl_gradient": "sequence_vocab"}, True),
        ({"kl_baseline": "leave_one_out"}, True),
        ({"kl_gradient": "sequence_vocab", "beta": 0.0}, False),
        ({"kl_gradient": "sequence"}, False),
        ({"kl_gradient": "token"}, False),
    ],
)
def test_a_second_forward_pass_without_images_is_refused(options, refused, tmp_path):
    run = build(GRPOTrainer, tmp_path, **{"beta": 0.1, **options})
    run._refuse_unsupported()
    run._is_vlm = True
    expected = pytest.raises(ValueError, match="vision-language") if refused else nullcontext()
    with expected:
        run._refuse_unsupported()


@pytest.mark.parametrize("value", [float("inf"), -float("inf")])
def test_infinite_reward_names_function_and_row(value, tmp_path):
    def broken(completions, **_):
        return [0.0, value] + [0.0] * (len(completions) - 2)

    run = build(GRPOTrainer, tmp_path, arguments={"reward_funcs": [vowels, broken]})
    with pytest.raises(ValueError, match=r"'broken' returned -?inf for row 1 .*finite, or None"):
        run.train()


@pytest.mark.parametrize("trainer", OURS, ids=lambda t: t.__name__)
def test_nan_gradient_stops_before_the_step(trainer, tmp_path, monkeypatch):
    step = {"now": 0}
    host = trainer.compute_loss

    def poisoned(self, *args, **kwargs):
        step["now"] += 1
        return host(self, *args, **kwargs) * (float("nan") if step["now"] == 2 else 1.0)

    monkeypatch.setattr(trainer, "compute_loss", poisoned)
    run = build(trainer, tmp_path, max_steps=4)
    with pytest.raises(FloatingPointError, match="optimizer step 2; the parameters were left"):
        run.train()
    assert torch.isfinite(parameters(run)).all()


def test_card_names_the_method_and_passes_the_check(tmp_path):
    run = build(PassAtKTrainer, tmp_path, save_strategy="steps", save_steps=1, max_steps=1)
    run.train()
    text = (tmp_path / "README.md").read_text()
    assert card_problems(text) == []
    assert "Pass@k" in text and "GRPO" not in text.replace("grpo", "")
    assert "2503.19595" in text and str(tmp_path) not in text
    assert f"# {tmp_path.name}\n" in text
    assert re.search(r"\| `k` \| 2 \|", text) and "`estimator`" in text


@pytest.mark.parametrize(
    ("trainer", "says"),
    [
        (OnlineDPOTrainer, ["Online DPO", "2402.04792", "| `pair_rule` | best_worst |"]),
        (NashTrainer, ["Nash learning", "2312.00886", "| `judge` | tests.runs:by_letters |"]),
    ],
    ids=["online_dpo", "nash"],
)
def test_card_of_a_recorded_run_shows_no_folder(trainer, says, tmp_path):
    options = dict(save_strategy="steps", save_steps=1, max_steps=1, judge=by_letters)
    run = build(trainer, tmp_path, record_path=str(tmp_path / "record"), **options)
    run.train()
    text = (tmp_path / "README.md").read_text()
    assert card_problems(text) == []
    assert all(part in text for part in says) and str(tmp_path) not in text


def test_no_file_of_a_run_holds_the_token(tmp_path):
    token = "hf_CANARYCANARYCANARYCANARY"
    run = build(GRPOTrainer, tmp_path, hub_token=token, save_strategy="steps", save_steps=1)
    run.train()
    run.save_model(str(tmp_path / "final"))
    files = [p for p in Path(tmp_path).rglob("*") if p.is_file()]
    assert any(p.name == "training_args.bin" for p in files)
    assert [p for p in files if token.encode() in p.read_bytes()] == []
