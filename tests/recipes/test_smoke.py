"""Two steps of every YAML of the command line, model and data shrunk by override."""

import json
import math
from pathlib import Path

import pytest
import yaml
from transformers import LlamaForSequenceClassification

from tests.sources import ROOT
from tests.tiny import tiny_llama, tiny_tokenizer
from trl_ext import cli
from trl_ext.cards import card_problems

METHODS = {
    "agro": "agro",
    "jepo": "jepo",
    "online_vs_offline": "online-dpo",
    "pass_at_k": "pass-at-k",
    "vineppo": "vine-ppo",
}
# A recipe about models with a command of its own, and one that needs a server.
TESTED_APART = {"long_context", "education_dialogue"}
YAMLS = [
    path
    for path in sorted((ROOT / "recipes").rglob("*.yaml"))
    if path.parent.name not in TESTED_APART
]
# Servers and batches are for large models; and a random model hardly ever ends its answer, so that
# with a score in place of every reward all pairs would be ties.
FOR_PAIRS = {
    "use_vllm": False,
    "missing_eos": "subtract",
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 2,
}
# A random model hardly ever comes to a marker: without one every completion has an answer to score.
FOR_ANSWERS = {
    "use_vllm": False,
    "marker": "",
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
}
# One group of a round, in two steps.
FOR_STEPS = {
    "use_vllm": False,
    "per_device_train_batch_size": 4,
    "steps_per_generation": 2,
    "per_device_eval_batch_size": 8,
    "num_rollouts": 2,
    "logging_steps": 1,
}
ROWS = [
    {
        "prompt": f"What is {n} + {n}?",
        "question": f"Ann has {n} eggs and buys {n}. How many has she?",
        "answer": f"{n} + {n} = <<{n}+{n}={2 * n}>>{2 * n}\n#### {2 * n}",
        "problem": f"{n} + {n}",
        "solution": f"Twice {n} is {2 * n}.",
        "question_type": "proof",
        "responses": [f"{n} and {i}" for i in range(8)],
        "scores": [float(i % 2) for i in range(8)],
    }
    for n in range(1, 9)
]


def parity_reward(completion_ids, **kwargs):
    """A random model solves nothing; this gives its groups a signal."""
    return [float(sum(ids) % 2) for ids in completion_ids]


@pytest.fixture(scope="module")
def shrunk(tmp_path_factory):
    """Options that keep the recipe's code path and leave two steps of work."""
    folder = tmp_path_factory.mktemp("shrunk")
    tokenizer = tiny_tokenizer()
    tiny_llama(len(tokenizer)).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = "\n".join(json.dumps(row) for row in ROWS)
    (folder / "train.jsonl").write_text(rows, encoding="utf-8")
    return {
        "model_name_or_path": folder / "model",
        "dtype": "float32",
        "dataset_name": folder / "train.jsonl",
        "dataset_train_split": "train[:6]",
        "dataset_test_split": "train[6:]",
        "max_steps": 2,
        "eval_steps": 2,
        "save_steps": 2,
        "max_completion_length": 4,
        "gradient_accumulation_steps": 1,
        "bf16": False,
        "use_cpu": True,
        "disable_tqdm": True,
    }


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory):
    """Stands for every reward model that a recipe names."""
    folder, tokenizer = tmp_path_factory.mktemp("reward"), tiny_tokenizer()
    policy = tiny_llama(len(tokenizer))
    policy.config.num_labels = 1
    model = LlamaForSequenceClassification(policy.config)
    model.model.load_state_dict(policy.model.state_dict())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.relative_to(ROOT).as_posix())
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_recipe_trains_evaluates_and_saves(path, lora, shrunk, reward_model, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    options = {**shrunk, "output_dir": tmp_path / "out"}
    if lora:
        options |= {"use_peft": True, "lora_r": 2, "lora_target_modules": "all-linear"}
    given = yaml.safe_load(path.read_text(encoding="utf-8"))
    if "bound" in given:
        options |= FOR_ANSWERS
    elif "data_source" in given:
        options |= {"use_vllm": False}
    elif "num_rollouts" in given:
        options |= FOR_STEPS
    elif "k" not in given:
        options |= FOR_PAIRS
    if "record_path" in given:
        options["record_path"] = tmp_path / "record"
    words = [f"--{name}={value}" for name, value in options.items()]
    if "reward_funcs" in given:
        rewards = [name if ":" in name else reward_model for name in given["reward_funcs"]]
        words += ["--reward_funcs", *rewards, f"{__name__}:parity_reward"]
    trainer = cli.main([METHODS[path.parent.name], "--config", str(path), *words])
    out = Path(trainer.args.output_dir)
    assert trainer.state.global_step == 2
    results = json.loads((out / "eval_results.json").read_text(encoding="utf-8"))
    assert math.isfinite(results["eval_loss"])
    if "bound" in given:
        assert results["eval_nll_L1"] >= results["eval_nll_L4"] - 1e-6 > 0
        assert ("eval_pass@1" in results) == ("eval_reward_funcs" in given)
    elif "eval_generations" in given:
        assert 0 <= results["eval_pass@1"] <= results[f"eval_pass@{given.get('k', 1)}"] <= 1
    norms = [row["grad_norm"] for row in trainer.state.log_history if "grad_norm" in row]
    assert len(norms) == 2 and math.isfinite(max(norms)) and max(norms) > 0
    assert (out / ("adapter_model.safetensors" if lora else "model.safetensors")).exists()
    assert card_problems((out / "README.md").read_text(encoding="utf-8")) == []


def test_there_is_a_recipe():
    assert YAMLS
