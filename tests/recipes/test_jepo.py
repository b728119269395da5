"""The study of JEPO on a small scale: it runs and reports; and its task must be thought out."""

import json
import math

import pytest
from transformers import AutoModelForCausalLM, LlamaForCausalLM, set_seed

from tests.recipes.runs import modules_of, quick_run
from trl_ext.cards import card_problems
from trl_ext.studies import fit, word_llama, word_tokenizer, words_of

METHODS = {
    "numbers": ("sft", "single", "multi-2", "multi-4", "multi-8", "verifree", "grpo"),
    "words": ("sft", "single", "multi-4", "no-sft-4"),
}


@pytest.fixture(scope="module")
def recipe():
    with modules_of("jepo") as modules:
        yield modules


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    folder = tmp_path_factory.mktemp("jepo")
    return folder, quick_run("jepo", folder, "--processes", "1")


@pytest.fixture(scope="module")
def rows(quick):
    return json.loads((quick[0] / "jepo.json").read_text(encoding="utf-8"))


def test_every_method_is_measured_from_one_start(rows):
    for task, methods in METHODS.items():
        found = [row for row in rows if row["task"] == task]
        assert {row["method"] for row in found} == {"start", *methods}
        assert [row["step"] for row in found if row["method"] == "start"] == [0]
        assert all([r["step"] for r in found if r["method"] == m] == [1, 2] for m in methods)
    for row in rows:
        assert ("accuracy" in row) == (row["task"] == "numbers")
        assert row["nll_L1"] > 0 or math.isnan(row["nll_L1"])


def test_it_shows_tables_claims_and_a_figure(quick):
    folder, said = quick
    for expected in ("Answers in numbers", "Answers in words", "multi-8", "nll_L4"):
        assert expected in said
    for claim in ("the task needs its thought", "reaches the verifier", "more samples are tighter"):
        assert claim in said
    assert (folder / "jepo.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("method", ["multi-8", "grpo", "verifree"])
def test_policies_are_saved_with_a_sound_card(quick, method):
    home = quick[0] / "numbers-0" / method
    assert AutoModelForCausalLM.from_pretrained(home).num_parameters() > 1e5
    card = (home / "README.md").read_text(encoding="utf-8")
    assert card_problems(card) == [] and "accuracy" in card


def test_a_sweep_shows_every_rate_and_draws_the_best(recipe, tmp_path):
    report = recipe.report
    rows = [
        {
            **{"task": "numbers", "seed": seed, "method": method, "rate": rate, "step": step},
            **{"accuracy": accuracy, "marked_rate": 1.0, "mean_length": 7.0},
            **{f"nll_L{n}": 5.0 - n / 8 for n in (1, 2, 4, 8)},
        }
        for seed in (0, 1)
        for method, rate, step, accuracy in (
            ("start", 0.0, 0, 0.3),
            ("grpo", 1e-3, 9, 0.5),
            ("grpo", 3e-3, 9, 0.7),
        )
    ]
    assert report.swept(rows)
    assert {row["rate"] for row in report.best_rates(rows)} == {0.0, 3e-3}
    assert report.over_seeds([1.0, 3.0, math.nan]) == "2.000 ± 1.000"
    assert [row["accuracy"] for row in report.ends_of(rows, "numbers", "grpo", 1e-3)] == [0.5, 0.5]


def test_the_verifier_reads_what_stands_behind_the_marker(recipe):
    correct = recipe.world.correct
    texts = ["17 51 is 51", "17 51 is 52", "51", "17 is 51 is 51", ""]
    assert correct(texts, ["51"] * 5) == [1.0, 0.0, 0.0, 0.0, 0.0]


@pytest.mark.slow
def test_the_task_must_be_thought_out(recipe, tmp_path):
    """From scratch, with as many steps: right answers with right thoughts, and right answers alone.
    The first is learned, of the second not one in ten."""
    world, study = recipe.world, recipe.study
    from trl_ext.data import calculator_runs

    data = calculator_runs(8000, 128, slips=0.0)
    made = world.World("numbers", data, word_tokenizer(words_of(data)), "")
    accuracy = {}
    for name, rows in (
        ("thoughts", data["train"].select_columns(["prompt", "completion"])),
        ("answers", study.answers_alone(data["train"])),
    ):
        set_seed(0)
        model = LlamaForCausalLM(word_llama(made.tokenizer))
        trainer = world.supervised(made, model, rows, tmp_path / name, 0, 300, 3e-3)
        fit(trainer)
        accuracy[name] = world.measure(made, model)["accuracy"]
    assert accuracy["thoughts"] > 0.8 and accuracy["answers"] < 0.1
