"""The card says what is true, says nothing private, and reads back through huggingface_hub."""

import dataclasses
from itertools import pairwise
from types import SimpleNamespace

import pytest
from huggingface_hub import ModelCard
from trl import GRPOConfig

from trl_ext.cards import (
    CardContent,
    Paper,
    Result,
    card_problems,
    framework_versions,
    hub_dataset_id,
    hub_id,
    hyperparameters_of,
    model_card,
    write_model_card,
)

CANARY = "hf_" + "canary0123456789" * 2
PAPER = Paper("Optimizing for k samples", "2503.19595", "@article{tang2025,\n  title={{K}}\n}")
FULL = CardContent(
    title="qwen-pass-at-k",
    method="pass-at-k",
    method_name="pass@k policy gradients",
    summary="Answers grade-school problems.",
    paper=PAPER,
    model_id="someone/qwen-pass-at-k",
    base_model="Qwen/Qwen2.5-0.5B-Instruct",
    datasets=("openai/gsm8k",),
    license="apache-2.0",
    hyperparameters={"learning_rate": 3e-5, "note": "a|b"},
    training={"Hardware": "2 CPU cores", "Time": "40 s"},
    versions=framework_versions(),
    results=(
        Result("openai/gsm8k", "pass@1", 0.41, 0.01, 1319, config="main", split="test"),
        Result("openai/gsm8k", "pass@16", 0.7, 0.02, 1319, config="main", split="test"),
        Result("generated products", "maj@8", 0.5),
    ),
    figures=(("pass_at_k.png", "pass@k against k"),),
    intended_use="Study of test-time search.",
    limitations="None of this was measured on other data.",
)


def test_the_full_card_reads_back_with_its_metadata():
    card = model_card(FULL)
    data = ModelCard(str(card)).data.to_dict()
    assert data["license"] == "apache-2.0" and "licence" not in data
    assert data["base_model"] == "Qwen/Qwen2.5-0.5B-Instruct"
    assert data["datasets"] == ["openai/gsm8k"]
    assert data["tags"] == ["trl", "trl_ext", "pass-at-k"]
    assert data["metrics"] == ["pass@1", "pass@16", "maj@8"]
    assert card_problems(str(card)) == []


def test_the_model_index_holds_every_result_once():
    results = ModelCard(str(model_card(FULL))).data.eval_results
    assert results is not None
    read = [(r.dataset_type, r.dataset_split, r.metric_type, r.metric_value) for r in results]
    assert read == [(r.dataset, r.split, r.metric, r.value) for r in FULL.results]


def test_the_body_has_the_interval_the_paper_and_the_figure():
    body = model_card(FULL).text
    # 0.41 ± 1.96 · 0.01
    row = "| openai/gsm8k (test) | pass@1 | 0.410 | 0.010 | 0.390 to 0.430 | 1319 |"
    assert row in body
    assert "| generated products | maj@8 | 0.500 |  |  |  |" in body
    assert "https://huggingface.co/papers/2503.19595" in body and PAPER.citation in body
    assert "![pass@k against k](pass_at_k.png)" in body
    assert "| `note` | a\\|b |" in body


@pytest.mark.parametrize("left_out", [f.name for f in dataclasses.fields(CardContent)][2:])
def test_a_field_left_out_leaves_a_valid_card(left_out):
    bare = getattr(CardContent("tiny", "pass-at-k"), left_out)
    text = str(model_card(dataclasses.replace(FULL, **{left_out: bare})))
    assert card_problems(text) == []
    assert "\n\n\n" not in text
    lines = text.splitlines()
    assert all(before == "" for before, line in pairwise(lines) if line.startswith("#"))


def test_the_barest_card_is_valid_and_has_no_empty_section():
    text = str(model_card(CardContent("tiny", "grpo")))
    assert card_problems(text) == []
    headings = [line for line in text.splitlines() if line.startswith("#")]
    assert headings == ["# tiny", "## How to use", "## Citation"]
    assert "base_model" not in text and "datasets" not in text and "license:" not in text


def test_a_missing_licence_is_said_aloud(monkeypatch):
    said = []
    monkeypatch.setattr("trl_ext.cards.card.logger.warning_once", said.append)
    model_card(CardContent("tiny", "grpo"))
    assert len(said) == 1 and "licence" in said[0]
    model_card(CardContent("tiny", "grpo", license="mit"))
    assert len(said) == 1


@pytest.mark.parametrize(
    "fields",
    [
        {"base_model": "./out/model"},
        {"base_model": "/data/models/llama"},
        {"base_model": "None/ of these"},
        {"datasets": ("/data/train.jsonl",)},
        {"figures": (("plots/curve.png", "curve"),)},
        {"summary": "Trained in /data/someone/runs."},
        {"training": {"Log": "~/runs/log.txt"}},
        {"hyperparameters": {"dataset_name": None}},
        {"limitations": f"Pushed with {CANARY}."},
    ],
)
def test_private_or_empty_values_are_refused(fields):
    with pytest.raises(ValueError, match=r"Pass|Leave|Save|not fit"):
        model_card(dataclasses.replace(FULL, **fields))


def test_an_existing_folder_is_no_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert hub_id("someone/model") == "someone/model"
    (tmp_path / "someone" / "model").mkdir(parents=True)
    assert hub_id("someone/model") is None
    assert hub_id(None) is None and hub_id("") is None and hub_id("../model") is None


def test_hyperparameters_name_changes_and_hide_places(tmp_path):
    args = GRPOConfig(
        output_dir=str(tmp_path / "secret_place"),
        hub_token=CANARY,
        run_name="diary",
        use_cpu=True,
        bf16=False,
        learning_rate=3e-5,
        adam_beta2=0.98,
        model_init_kwargs={"cache_dir": str(tmp_path)},
    )
    options = hyperparameters_of(args)
    assert options["learning_rate"] == 3e-5 and options["adam_beta2"] == 0.98
    assert options["beta"] == args.beta and "weight_decay" not in options
    text = str(model_card(CardContent("tiny", "grpo", hyperparameters=options)))
    assert not [word for word in (CANARY, str(tmp_path), "secret_place", "diary") if word in text]


def test_dataset_id_comes_from_the_download_record():
    url = "hf://datasets/openai/gsm8k@cc7b047b6e5bb11b4f1af84efc572db110a51b3c/main/train.parquet"
    downloaded = SimpleNamespace(info=SimpleNamespace(download_checksums={url: {}}))
    made_here = SimpleNamespace(info=SimpleNamespace(download_checksums=None))
    assert hub_dataset_id(downloaded) == "openai/gsm8k"
    assert hub_dataset_id(made_here) is None and hub_dataset_id(None) is None


def test_write_puts_readme_into_the_folder(tmp_path):
    path = write_model_card(FULL, tmp_path / "model")
    assert path == tmp_path / "model" / "README.md"
    assert card_problems(path.read_text(encoding="utf-8")) == []


def test_the_check_finds_the_faults_of_a_card_by_hand():
    data = "licence: license\nbase_model: None\ntags:\n- trl"
    text = f"---\n{data}\n---\n\n# x\n\n[None](https://hf.co/None)\n"
    found = " ".join(card_problems(text))
    for part in ("`library_name`", "`language`", "`trl_ext`", "`licence`", "base_model", "None"):
        assert part in found


@pytest.mark.parametrize(("chat", "question"), [(True, '[{"role": "user"'), (False, '"What is')])
def test_usage_asks_as_the_model_was_trained_to_be_asked(chat, question):
    text = str(model_card(dataclasses.replace(FULL, usage="", chat=chat)))
    assert f"question = {question}" in text
