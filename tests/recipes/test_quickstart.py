"""The main job on a small scale: two runs of one seed write the same model, card and figure."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from trl_ext.cards import card_problems

RECIPE = Path(__file__).parents[2] / "recipes" / "quickstart.py"
SMALL = {
    "train-size": 300,
    "held-out-size": 8,
    "warm-start-steps": 3,
    "steps": 2,
    "eval-steps": 1,
    "samples": 16,
}


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory):
    folders = [tmp_path_factory.mktemp(name) for name in ("first", "second")]
    options = [word for name, value in SMALL.items() for word in (f"--{name}", str(value))]
    runs = [
        subprocess.Popen(
            [sys.executable, str(RECIPE), *options, "--output-dir", str(folder)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for folder in folders
    ]
    said = [run.communicate(timeout=240)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], said[0][-3000:]
    return folders, said


def test_it_shows_a_table_and_answers_three_puzzles(two_runs):
    _, said = two_runs
    for expected in ("8 held-out puzzles", "pass@16", "GRPO", "majority", "3 keys to"):
        assert expected in said[0]


def test_it_writes_a_model_that_plain_transformers_loads_and_a_sound_card(two_runs):
    (folder, _), _ = two_runs
    model = AutoModelForCausalLM.from_pretrained(folder / "pass-at-k")
    assert 0.5e6 < model.num_parameters() < 2e6
    card = (folder / "pass-at-k" / "README.md").read_text()
    assert card_problems(card) == [] and "quickstart.png" in card
    for figure in (folder / "quickstart.png", folder / "pass-at-k" / "quickstart.png"):
        assert figure.read_bytes().startswith(b"\x89PNG")


def test_it_is_deterministic(two_runs):
    folders, _ = two_runs
    weights = [(folder / "pass-at-k" / "model.safetensors").read_bytes() for folder in folders]
    assert weights[0] == weights[1]
