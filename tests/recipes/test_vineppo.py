"""The study of VinePPO on a small scale: it runs and reports; and its arithmetic and its task."""

import json
import math
import random

import pytest
from datasets import Dataset
from transformers import AutoModelForCausalLM

from tests.recipes.runs import modules_of, quick_run
from trl_ext.cards import card_problems
from trl_ext.data.calculator import KEYS
from trl_ext.rollouts.steps import step_starts
from trl_ext.studies import word_tokenizer, words_of

PLAIN, VINE = ("grpo", "dr-grpo", "rloo"), ("vine-1", "vine-3", "vine-9")


@pytest.fixture(scope="module")
def recipe():
    with modules_of("vineppo") as modules:
        yield modules


# A whole run


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vineppo")
    return folder, quick_run("vineppo", folder, "--processes", "1")


@pytest.fixture(scope="module")
def rows(quick):
    return json.loads((quick[0] / "vineppo.json").read_text(encoding="utf-8"))


def test_every_method_is_measured_from_one_start(rows):
    assert {row["method"] for row in rows} == {"start", *PLAIN, *VINE}
    assert [row["step"] for row in rows if row["method"] == "start"] == [0]
    for method in (*PLAIN, *VINE):
        found = [row for row in rows if row["method"] == method]
        assert [row["step"] for row in found] == [1, 2, 3] if method == "grpo" else [1, 2]
        seconds = [row["seconds"] for row in found]
        assert 0 < seconds[0] < seconds[-1]
        shares = {row["branching"] for row in found}
        assert shares == {0.0} if method in PLAIN else 0 < min(shares) <= max(shares) < 1
    assert all(0 <= row["accuracy"] <= 1 for row in rows)


def test_it_shows_a_table_differences_and_figures(quick):
    folder, said = quick
    for method in ("GRPO", "Dr. GRPO", "RLOO", *(f"VinePPO, K = {K}" for K in (1, 3, 9))):
        assert f"\n  {method} " in said
    for expected in ("after 2 steps", "branching", "K = 9 − RLOO", "after equal time"):
        assert expected in said
    assert (folder / "vineppo.png").read_bytes().startswith(b"\x89PNG")


def test_values_at_the_start_stand_in_the_completions_table(recipe, quick):
    report, study = recipe.report, recipe.study
    table = report.completions_of(quick[0], 0)
    assert len(table) == study.PROMPTS * study.SAMPLES
    assert {"prompt", "completion", "values", "lost_at_step", "lost_step"} <= set(table[0])
    # A step per token; V in front of each, then the reward.
    assert 2 <= max(len(row["values"]) for row in table) <= study.QUICK.world.most_tokens + 1
    assert report.completions_of(quick[0], 1) == []


@pytest.mark.parametrize("method", ["vine-1", "vine-9"])
def test_policies_are_saved_with_a_sound_card(quick, method):
    home = quick[0] / "seed-0" / method
    assert AutoModelForCausalLM.from_pretrained(home).num_parameters() > 1e5
    card = (home / "README.md").read_text(encoding="utf-8")
    assert card_problems(card) == [] and "accuracy" in card and "2410.01679" in card


def test_a_world_is_made_once_and_its_start_kept(recipe, quick):
    world, study = recipe.world, recipe.study
    record = quick[0] / "seed-0" / "start" / "world.json"
    before = record.stat().st_mtime_ns
    again = world.make_world(quick[0], 0, study.QUICK.world)
    assert record.stat().st_mtime_ns == before
    assert world.load_start(again).config.vocab_size == len(again.tokenizer)


# What is reported


def point(method, step, seconds, accuracy, *, seed=0, rate=1e-3):
    named = {"seed": seed, "method": method, "rate": 0.0 if method == "start" else rate}
    return {**named, "step": step, "seconds": seconds, "accuracy": accuracy, "branching": 0.0}


CURVES = [
    *(point("start", 0, 0.0, 0.1, seed=seed) for seed in (0, 1)),
    # GRPO takes a second per step, VinePPO ten; they last 40 s and 20 s.
    *(point("grpo", *p) for p in ((1, 1.0, 0.2), (2, 2.0, 0.3), (40, 40.0, 0.68))),
    *(point("vine-9", *p) for p in ((1, 10.0, 0.4), (2, 20.0, 0.5))),
    *(point("grpo", *p, seed=1) for p in ((1, 1.0, 0.1), (2, 2.0, 0.1), (40, 40.0, 0.29))),
    *(point("vine-9", *p, seed=1) for p in ((1, 10.0, 0.3), (2, 20.0, 0.3))),
]


def test_runs_are_compared_after_the_steps_and_the_time_that_all_lasted(recipe):
    report = recipe.report
    assert report.shared_step(CURVES) == 2
    assert report.equal_times(CURVES) == {0: 20.0, 1: 20.0}
    curve = report.curves_of(CURVES, "grpo")[0]
    assert [row["method"] for row in curve] == ["start", "grpo", "grpo", "grpo"]
    # Between 2 s and 40 s, 0.3 and 0.68: 0.01 in each second, and a step.
    assert report.at(curve, "seconds", 20.0) == pytest.approx(0.48)
    assert report.at(curve, "seconds", 20.0, "step") == pytest.approx(20.0)
    assert report.at(curve, "seconds", 0.5) == pytest.approx(0.15)  # from the start's 0.1
    assert math.isnan(report.at(curve, "seconds", 41.0))


def test_an_accuracy_is_reached_where_the_curve_first_crosses_it(recipe):
    report = recipe.report
    curve = report.curves_of(CURVES, "grpo")[0]
    assert report.reached(curve, 0.25, "step") == pytest.approx(1.5)
    assert report.reached(curve, 0.05, "step") == 0  # it starts above
    assert math.isnan(report.reached(curve, 0.7, "seconds"))
    dip = [point("grpo", s, s, a) for s, a in ((0, 0.2), (1, 0.4), (2, 0.1), (3, 0.5))]
    assert report.reached(dip, 0.3, "step") == pytest.approx(0.5)


def test_differences_are_those_of_each_seed_with_itself(recipe):
    report = recipe.report
    both = [
        *CURVES,
        *(
            {**row, "method": name}
            for row in CURVES
            for name in ("rloo", "dr-grpo")
            if row["method"] == "grpo"
        ),
    ]
    both += [
        {**row, "method": name}
        for row in CURVES
        for name in ("vine-1", "vine-3")
        if row["method"] == "vine-9"
    ]
    said = report.claims(both)
    # After 2 steps 0.5 − 0.3 and 0.3 − 0.1; after 20 s 0.5 − 0.48 and 0.3 − 0.19.
    assert said[0] == (
        "VinePPO, K = 9 − GRPO, accuracy: +0.200 ± 0.000 after 2 steps, "
        "+0.065 ± 0.045 after equal time"
    )
    assert said[3].startswith("VinePPO, K = 9 − VinePPO, K = 3, accuracy: +0.000 ± 0.000")
    # Seed 0 comes to 0.5 after 22 steps and 22 s, eleven times 2 and 1.1 times 20; seed 1 never.
    assert said[5] == (
        "GRPO comes to what VinePPO, K = 9 has after 2 steps in 11.00 (1 of 2 never) times the "
        "steps, 1.10 (1 of 2 never) times the CPU time"
    )


def test_a_sweep_shows_every_rate_and_draws_the_best_after_shared_steps(recipe, tmp_path):
    report = recipe.report
    # Higher in the end, but lower after the steps that all take: not the best.
    slow = [point("grpo", *p, rate=1e-4) for p in ((1, 1.0, 0.1), (2, 2.0, 0.2), (40, 40.0, 0.9))]
    rows = [*(row for row in CURVES if row["seed"] == 0), *slow]
    assert report.swept(rows) and not report.swept(CURVES)
    best = report.best_rates(rows)
    assert {(row["method"], row["rate"]) for row in best} == {
        *(("start", 0.0), ("grpo", 1e-3), ("vine-9", 1e-3))
    }
    table = report.table_of(rows)
    assert list(table.columns[0].cells) == ["GRPO", "GRPO", "VinePPO, K = 9"]
    assert list(table.columns[1].cells) == ["0.0001", "0.001", "0.001"]
    assert list(table.columns[2].cells) == ["0.200", "0.300", "0.500"]
    assert report.draw(best, tmp_path / "vineppo.png").exists()


def test_means_are_over_seeds_that_have_a_value(recipe):
    over_seeds = recipe.report.over_seeds
    assert over_seeds([1.0, 3.0]) == "2.000 ± 1.000"
    assert over_seeds([0.5], "+.2f") == "+0.50"
    assert over_seeds([1.0, 3.0, math.nan]) == "2.000 ± 1.000 (1 of 3 never)"
    assert over_seeds([math.nan]) == "–"


def test_it_draws_wrong_completions_that_one_step_cost_most(recipe, tmp_path):
    report = recipe.report
    table = [
        {"values": [0.2, 0.9, 0.0], "lost_at_step": 1.0, "completion": "most"},
        {"values": [0.2, 0.7, 0.0], "lost_at_step": 1.0, "completion": "less, at the same step"},
        {"values": [0.5, 0.1, 0.0], "lost_at_step": 0.0, "completion": "at the first step"},
        {"values": [0.5, 0.1, 1.0], "lost_at_step": 0.0, "completion": "right in the end"},
        {"values": [0.0, 0.0, 0.0], "lost_at_step": None, "completion": "never had a chance"},
    ]
    found = report.lost_solutions(table)
    assert [row["completion"] for row in found] == ["at the first step", "most"]
    assert report.lost_solutions(table[3:]) == []
    told = [{**row, "prompt": "+7 *3 from 10\n", "lost_step": "17"} for row in found]
    path = report.draw_losses(told, tmp_path / "lost_steps.png")
    assert path.read_bytes().startswith(b"\x89PNG")


# The task


def test_a_pupil_without_doubts_is_right_and_one_in_doubt_writes_either(recipe):
    world = recipe.world
    sure = world.make_data(world.Size(train=50, held_out=5, doubts=0.0), 0)["train"]
    assert world.correct(sure["completion"], sure["answer"]) == [1.0] * 50
    versions = world.draw_versions(1.0, random.Random(0))
    assert len(versions) == 400 and all(len(set(both)) == 2 for both in versions.values())
    assert all(both[0] == KEYS[key](shown) for (key, shown), both in versions.items())
    written = [world.written("+7 from 10\n", versions, random.Random(i)) for i in range(200)]
    right = sum(text == "17 is 17" for text in written)
    assert 70 < right < 130 and len(set(written)) == 2


def test_after_a_wrong_display_the_right_keys_never_lead_back():
    for press in KEYS.values():
        assert len({press(shown) for shown in range(100)}) == 100


def test_each_word_is_a_step(recipe):
    world = recipe.world
    data = world.make_data(world.Size(train=50, held_out=5), 0)
    tokenizer = word_tokenizer(words_of(data))
    ids = [*tokenizer(data["train"]["completion"][0]).input_ids, tokenizer.eos_token_id]
    assert len(ids) == world.Size().most_tokens
    assert step_starts(tokenizer, ids, world.each_word) == list(range(len(ids)))


# Real data


def test_prompts_of_real_data_have_the_form_of_the_sft_policies(recipe, monkeypatch):
    prompts, asked = recipe.prompts, []

    def load(*names, split):
        asked.append((*names, split))
        return Dataset.from_dict({"question": ["1 + 1?"], "problem": ["2 + 2?"], "answer": ["4"]})

    monkeypatch.setattr(prompts, "load_dataset", load)
    assert prompts.gsm8k("train")[0]["prompt"] == "[MATH_TASK] Problem:\n1 + 1?\n\nSolution:"
    row = prompts.math("test[:200]")[0]
    assert row["prompt"] == "[MATH_TASK] Problem:\n2 + 2?\n\nSolution:" and row["answer"] == "4"
    assert asked[0] == ("openai/gsm8k", "main", "train") and asked[1][-1] == "test[:200]"
