"""Two steps of every YAML in `recipes/`, model and data shrunk by override."""

import json
import math
from pathlib import Path

import pytest
import yaml

from tests.sources import ROOT
from tests.tiny import tiny_llama, tiny_tokenizer
from trl_ext import cli
from trl_ext.cards import card_problems

YAMLS = sorted((ROOT / "recipes").rglob("*.yaml"))
GSM8K_ROWS = [
    {
        "question": f"Ann has {n} eggs and buys {n}. How many has she?",
        "answer": f"{n} + {n} = <<{n}+{n}={2 * n}>>{2 * n}\n#### {2 * n}",
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
    rows = "\n".join(json.dumps(row) for row in GSM8K_ROWS)
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


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.relative_to(ROOT).as_posix())
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_recipe_trains_evaluates_and_saves(path, lora, shrunk, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    options = {**shrunk, "output_dir": tmp_path / "out"}
    if lora:
        options |= {"use_peft": True, "lora_r": 2, "lora_target_modules": "all-linear"}
    given = yaml.safe_load(path.read_text(encoding="utf-8"))
    words = [f"--{name}={value}" for name, value in options.items()]
    words += ["--reward_funcs", *given["reward_funcs"], f"{__name__}:parity_reward"]
    method = path.parent.name.replace("_", "-")
    trainer = cli.main([method, "--config", str(path), *words])
    out = Path(trainer.args.output_dir)
    assert trainer.state.global_step == 2
    results = json.loads((out / "eval_results.json").read_text(encoding="utf-8"))
    assert 0 <= results["eval_pass@1"] <= results[f"eval_pass@{given['k']}"] <= 1
    norms = [row["grad_norm"] for row in trainer.state.log_history if "grad_norm" in row]
    assert len(norms) == 2 and math.isfinite(max(norms)) and max(norms) > 0
    assert (out / ("adapter_model.safetensors" if lora else "model.safetensors")).exists()
    assert card_problems((out / "README.md").read_text(encoding="utf-8")) == []


def test_there_is_a_recipe():
    assert YAMLS
