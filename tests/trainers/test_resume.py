"""A run resumed at any step equals the uninterrupted one to the bit: parameters, optimizer, random
state, order of the prompts and logged rows."""

import json
from pathlib import Path

import pytest
import torch
import trl

import trl_ext.trainers._seam as seam
from tests.runs import OURS, build, logged, parameters
from tests.tiny import tiny_prompts

N = 6
WINDOWS = {
    "steps_per_generation": {"steps_per_generation": 4},
    "num_iterations": {"num_iterations": 2},
    "stream": {"train_rows": 6, "streamed": True},
    "epochs": {"max_steps": -1, "num_train_epochs": 3, "train_rows": 4, "num_iterations": 1},
}


def start(trainer, folder, train_rows=16, streamed=False, **options):
    saving = {"max_steps": N, "save_steps": 1, "save_strategy": "steps", "logging_steps": 2}
    prompts = tiny_prompts(train_rows)
    arguments = {"train_dataset": prompts.to_iterable_dataset() if streamed else prompts}
    return build(trainer, folder, arguments=arguments, **(saving | options))


def whole_state(run):
    optimizer = [
        value.flatten()
        for state in run.optimizer.state_dict()["state"].values()
        for value in state.values()
    ]
    return torch.cat([parameters(run), *optimizer]), torch.random.get_rng_state(), logged(run)


def differences(trainer, folder, **options):
    """Per step k of the resume: largest difference of the state, and whether the rest is equal."""
    full = start(trainer, folder, **options)
    full.train()
    expected, rng, rows = whole_state(full)
    found = {}
    for k in range(1, full.state.max_steps):
        again = start(trainer, folder, **{**options, "save_strategy": "no"})
        again.train(resume_from_checkpoint=str(Path(folder) / f"checkpoint-{k}"))
        actual, rng_again, rows_again = whole_state(again)
        same = torch.equal(rng, rng_again) and rows[:-1] == rows_again[:-1]
        found[k] = ((actual - expected).abs().max().item(), same)
    return found


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("trainer", OURS, ids=lambda t: t.__name__)
def test_resume_at_every_step_is_exact(trainer, window, tmp_path):
    found = differences(trainer, tmp_path, **WINDOWS[window])
    assert all(value == (0.0, True) for value in found.values()), found


def test_trl_is_not_exact_inside_a_window(tmp_path):
    found = differences(trl.GRPOTrainer, tmp_path, **WINDOWS["steps_per_generation"])
    assert found[4][0] == 0.0, "on the edge of a window the host is exact"
    assert found[2][0] > 1e-2


HOOKS = {"epochs": "_load_optimizer_and_scheduler", "stream": "_init_training_state"}


@pytest.mark.parametrize("lost", ["window", "step", "metrics", "epochs", "stream"])
def test_mutation_each_part_of_the_state_is_needed(lost, tmp_path, monkeypatch):
    load, restored = seam.load_exact_state, []

    def forgetful(folder, rank, device):
        window, values = load(folder, rank, device)
        restored.append(lost)
        if lost == "step":
            values["step"] = 0
        if lost == "metrics":
            values["metrics"] = {}
        return None if lost == "window" else window, values

    monkeypatch.setattr(seam, "load_exact_state", forgetful)
    options = WINDOWS[lost if lost in HOOKS else "steps_per_generation"]
    if lost in HOOKS:
        name = HOOKS[lost]
        monkeypatch.setattr(seam.ResumableTrainer, name, getattr(trl.GRPOTrainer, name))
    found = differences(OURS[0], tmp_path, **options)
    print(lost, found)
    assert restored and any(value != (0.0, True) for value in found.values())


def test_completions_table_is_whole_after_a_resume(tmp_path):
    import pandas as pd

    options = dict(steps_per_generation=4, log_completions=True, num_completions_to_print=0)
    start(OURS[1], tmp_path, **options).train()
    file = tmp_path / "completions" / "completions_00004.parquet"
    expected = pd.read_parquet(file)
    file.unlink()
    again = start(OURS[1], tmp_path, **{**options, "save_strategy": "no"})
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    pd.testing.assert_frame_equal(pd.read_parquet(file), expected)


def test_synchronised_reference_is_restored(tmp_path):
    options = dict(sync_ref_model=True, ref_model_sync_steps=2, beta=0.5, steps_per_generation=1)
    found = differences(OURS[0], tmp_path, **options)
    assert all(value == (0.0, True) for value in found.values()), found


def test_checkpoint_of_another_trainer_resumes_and_says_what_is_missing(tmp_path, caplog):
    start(trl.GRPOTrainer, tmp_path).train()
    again = start(OURS[0], tmp_path, beta=0.0)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert again.state.global_step == N
    assert "holds no trl_ext state" in caplog.text


def test_own_state_is_json_and_safetensors(tmp_path):
    start(OURS[0], tmp_path, steps_per_generation=4).train()
    own = {p.name for p in (tmp_path / "checkpoint-2").glob("trl_ext_*")}
    names = {"trl_ext_manifest.json", "trl_ext_state_0.json", "trl_ext_window_0.safetensors"}
    assert own == names
    assert json.loads((tmp_path / "checkpoint-2" / "trl_ext_state_0.json").read_text())
