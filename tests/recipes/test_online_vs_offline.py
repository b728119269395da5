"""Both studies on a small scale: they run, report, and replay an online run to the bit."""

import json

import pytest
from transformers import AutoModelForCausalLM

from tests.recipes.runs import quick_run
from trl_ext.cards import card_problems

SOURCES = ("online", "offline", "ordered", "blocks", "shuffled", "driven")


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    folder = tmp_path_factory.mktemp("online_vs_offline")
    return folder, quick_run("online_vs_offline", folder, "--processes", "2")


@pytest.fixture(scope="module")
def rows(quick):
    return json.loads((quick[0] / "sources.json").read_text(encoding="utf-8"))


def test_every_source_is_measured_from_one_start(rows):
    assert {row["source"] for row in rows} == {"start", *SOURCES}
    (start,) = (row for row in rows if row["source"] == "start")
    assert (start["kl"], start["accuracy"], start["chosen_log_ratio"]) == (0, 0.5, 0)
    assert all(row["kl"] > 0 for row in rows if row["source"] != "start")


def test_the_ordered_replay_is_the_online_run_and_the_shuffled_is_not(rows):
    last = {row["source"]: row for row in rows}
    assert last["ordered"]["equals_online"] is True
    figures = [{**last[s], "source": "", "equals_online": ""} for s in ("online", "ordered")]
    assert figures[0] == figures[1]
    assert last["shuffled"]["kl"] != last["online"]["kl"]


def test_it_shows_tables_and_figures(quick):
    folder, said = quick
    for expected in ("shuffled", "parameters to the bit", "Proximal RLOO", "one_step"):
        assert expected in said
    figures = list(folder.glob("*.png"))
    assert folder / "sources.png" in figures and len(figures) > 1
    assert all(figure.read_bytes().startswith(b"\x89PNG") for figure in figures)


@pytest.mark.parametrize("source", SOURCES)
def test_each_policy_is_saved_with_a_sound_card(quick, source):
    home = quick[0] / "sources-0" / source
    assert AutoModelForCausalLM.from_pretrained(home).num_parameters() > 1e5
    card = (home / "README.md").read_text(encoding="utf-8")
    assert card_problems(card) == [] and "win_rate" in card
