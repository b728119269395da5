"""A run resumed at any step equals the uninterrupted one to the bit: parameters, optimizer, random
state, order of the prompts and logged rows."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import trl

import trl_ext.trainers._seam as seam
import trl_ext.trainers.background as background
from tests.runs import ALGORITHMS, OF_GROUPS, OURS, Inline, build, by_letters, logged, parameters
from tests.tiny import tiny_prompts
from trl_ext import NashTrainer, OnlineDPOTrainer
from trl_ext.data import load_record
from trl_ext.rollouts import OneStepAhead

N = 6
WINDOWS = {
    "steps_per_generation": {"steps_per_generation": 4},
    "num_iterations": {"num_iterations": 2},
    "stream": {"train_rows": 6, "streamed": True},
    "epochs": {"max_steps": -1, "num_train_epochs": 3, "train_rows": 4, "num_iterations": 1},
}


def start(trainer, folder, train_rows=16, streamed=False, dataset=None, **options):
    saving = {"max_steps": N, "save_steps": 1, "save_strategy": "steps", "logging_steps": 2}
    prompts = tiny_prompts(train_rows) if dataset is None else dataset
    arguments = {"train_dataset": prompts.to_iterable_dataset() if streamed else prompts}
    return build(trainer, folder, arguments=arguments, **(saving | options))


def whole_state(run):
    optimizer = [
        value.flatten()
        for state in run.optimizer.state_dict()["state"].values()
        for value in state.values()
    ]
    return torch.cat([parameters(run), *optimizer]), torch.random.get_rng_state(), logged(run)


def differences(trainer, folder, at=None, **options):
    """Per step k of the resume: largest difference of the state, and whether the rest is equal."""
    full = start(trainer, folder, **options)
    full.train()
    expected, rng, rows = whole_state(full)
    found = {}
    for k in at or range(1, full.state.max_steps):
        again = start(trainer, folder, **{**options, "save_strategy": "no"})
        again.train(resume_from_checkpoint=str(Path(folder) / f"checkpoint-{k}"))
        actual, rng_again, rows_again = whole_state(again)
        same = torch.equal(rng, rng_again) and rows[:-1] == rows_again[:-1]
        found[k] = ((actual - expected).abs().max().item(), same)
    return found


# Streams and epochs are the sampler's affair, whoever trains: those over tokens stand for all.
EACH_WINDOW = [(t, w) for t in OURS for w in list(WINDOWS)[: 2 if t in OF_GROUPS else None]]


@pytest.mark.parametrize(
    ("trainer", "window"), EACH_WINDOW, ids=lambda v: getattr(v, "__name__", v)
)
def test_resume_at_every_step_is_exact(trainer, window, tmp_path):
    found = differences(trainer, tmp_path, **WINDOWS[window])
    assert all(value == (0.0, True) for value in found.values()), found


@pytest.fixture
def inline(monkeypatch):
    monkeypatch.setattr(background, "ProcessSampler", Inline)


@pytest.mark.parametrize("case", ALGORITHMS)
def test_every_algorithm_resumes_exactly(case, tmp_path):
    """Anchors, opponents and half steps too; a round is two steps long."""
    trainer, options = ALGORITHMS[case]
    options = dict(steps_per_generation=2, **options)
    found = differences(trainer, tmp_path, at=(1, 3), **options)
    assert all(value == (0.0, True) for value in found.values()), found


@pytest.mark.parametrize("trainer", OURS, ids=lambda t: t.__name__)
def test_resume_one_step_ahead_is_exact(trainer, inline, tmp_path):
    """The round being sampled is in the checkpoint, with its prompts."""
    options = dict(schedule="one_step", steps_per_generation=2)
    found = differences(trainer, tmp_path, at=(1, 2, 3), **options)
    assert all(value == (0.0, True) for value in found.values()), found


@pytest.mark.parametrize("case", ["nash_mp", "inpo", "proximal_rloo"])
def test_algorithms_resume_one_step_ahead(case, inline, tmp_path):
    trainer, options = ALGORITHMS[case]
    found = differences(trainer, tmp_path, at=(1, 3), schedule="one_step", **options)
    assert all(value == (0.0, True) for value in found.values()), found


def test_resume_with_a_real_process_is_exact(tmp_path):
    options = dict(schedule="one_step", steps_per_generation=2, judge=by_letters)
    found = differences(NashTrainer, tmp_path, at=(3,), **options)
    assert found == {3: (0.0, True)}


@pytest.mark.parametrize("epochs", [1, 2])
def test_resume_of_a_replay_is_exact(epochs, tmp_path):
    record = dict(record_path=str(tmp_path / "record"), steps_per_generation=2, save_strategy="no")
    start(OnlineDPOTrainer, tmp_path / "online", **record).train()
    options = dict(
        pair_source="replay",
        dataset=load_record(tmp_path / "record").select(range(12 // epochs)),
        shuffle_dataset=epochs == 2,
        num_generations=2,
        per_device_train_batch_size=4,
        steps_per_generation=2,
    )
    found = differences(OnlineDPOTrainer, tmp_path / "replay", **options)
    assert all(value == (0.0, True) for value in found.values()), found


@pytest.mark.parametrize("schedule", ["sync", "one_step"])
@pytest.mark.parametrize("k", [1, 3])
def test_the_record_of_a_resumed_run_is_that_of_the_whole(k, schedule, inline, tmp_path):
    """Rounds that the interrupted run had written ahead of its checkpoint are written again."""
    options = dict(steps_per_generation=2, schedule=schedule)
    whole, cut = tmp_path / "whole-record", tmp_path / "cut-record"
    start(OnlineDPOTrainer, tmp_path, record_path=str(whole), **options).train()
    shutil.copytree(whole, cut)
    for file in cut.iterdir():
        if file.name >= f"round-{k // 2 + 1:06d}":
            file.write_bytes(b"of a run that was cut off")
    again = start(OnlineDPOTrainer, tmp_path, record_path=str(cut), **options)
    again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{k}"))
    names = sorted(file.name for file in whole.iterdir())
    assert names == sorted(file.name for file in cut.iterdir()) and len(names) == 3
    assert load_record(whole).to_list() == load_record(cut).to_list()


@pytest.mark.parametrize("lost", ["round ahead", "opponent", "target"])
def test_mutation_what_groups_add_to_the_state_is_needed(lost, inline, tmp_path, monkeypatch):
    options = dict(ALGORITHMS["nash_mp"][1], proximal_steps=2)
    if lost == "round ahead":
        options["schedule"] = "one_step"
        monkeypatch.setattr(OneStepAhead, "load", lambda self, state: None)
    else:
        honest = seam.load_policy

        def forgetful(folder, model, name):
            if name != lost:
                honest(folder, model, name)

        monkeypatch.setattr(seam, "load_policy", forgetful)
    found = differences(NashTrainer, tmp_path, at=(3,), **options)
    print(lost, found)
    assert found[3][0] > 1e-4


@pytest.mark.parametrize("trainer", OF_GROUPS, ids=lambda t: t.__name__)
def test_a_checkpoint_of_another_schedule_resumes(trainer, inline, tmp_path):
    """From one step ahead to sync and back: the round ahead is dropped, or sampled anew."""
    start(trainer, tmp_path, schedule="one_step").train()
    sync = tmp_path / "sync"
    for checkpoint, schedule in (
        (tmp_path / "checkpoint-3", "sync"),
        (sync / "checkpoint-4", "one_step"),
    ):
        again = start(trainer, sync, schedule=schedule)
        again.train(resume_from_checkpoint=str(checkpoint))
        assert again.state.global_step == N and torch.isfinite(parameters(again)).all()


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
