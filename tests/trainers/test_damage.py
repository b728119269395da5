"""A damaged checkpoint is never resumed from: the run falls back, says so, and ends the same."""

import shutil

import pytest
import torch
import trl

from tests.runs import build, parameters
from trl_ext import PassAtKTrainer

SETTINGS = dict(max_steps=6, save_steps=2, save_strategy="steps", steps_per_generation=2)


def remove(name):
    return lambda folder: (folder / name).unlink()


def cut(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def flip(folder):
    data = bytearray((folder / "optimizer.pt").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "optimizer.pt").write_bytes(data)


def killed_while_saving(folder):
    (folder / "trl_ext_manifest.json").unlink()
    (folder / "optimizer.pt").unlink()


DAMAGE = {
    "optimizer missing": remove("optimizer.pt"),
    "scheduler missing": remove("scheduler.pt"),
    "random state missing": remove("rng_state.pth"),
    "trainer state missing": remove("trainer_state.json"),
    "own state missing": remove("trl_ext_window_0.safetensors"),
    "weights cut": cut,
    "one bit flipped": flip,
    "killed while saving": killed_while_saving,
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    run = build(PassAtKTrainer, folder, **SETTINGS)
    run.train()
    shutil.rmtree(folder / "checkpoint-6")
    return folder, parameters(run)


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("by_path", [False, True])
def test_falls_back_and_ends_as_the_uninterrupted_run(kind, by_path, finished, tmp_path, caplog):
    folder, expected = finished
    shutil.copytree(folder, tmp_path / "run")
    DAMAGE[kind](tmp_path / "run" / "checkpoint-4")
    again = build(PassAtKTrainer, tmp_path / "run", **SETTINGS)
    wanted = str(tmp_path / "run" / "checkpoint-4") if by_path else True
    again.train(resume_from_checkpoint=wanted)
    assert "checkpoint-4 is damaged" in caplog.text
    assert torch.equal(parameters(again), expected)


def test_the_host_resumes_from_a_damaged_checkpoint_in_silence(finished, tmp_path):
    """Put back: without the check a lost optimizer is a fresh one."""
    folder, expected = finished
    shutil.copytree(folder, tmp_path / "run")
    DAMAGE["optimizer missing"](tmp_path / "run" / "checkpoint-4")
    again = build(PassAtKTrainer, tmp_path / "run", **SETTINGS)
    trl.GRPOTrainer.train(again, resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    assert (parameters(again) - expected).abs().max() > 1e-3


def test_nothing_whole_is_an_error_and_a_whole_one_is_used(finished, tmp_path):
    folder, expected = finished
    shutil.copytree(folder, tmp_path / "run")
    again = build(PassAtKTrainer, tmp_path / "run", **SETTINGS)
    again.train(resume_from_checkpoint=True)
    assert torch.equal(parameters(again), expected)
    for checkpoint in (tmp_path / "run").glob("checkpoint-*"):
        cut(checkpoint)
    with pytest.raises(ValueError, match=r"no checkpoint beside .* is whole"):
        build(PassAtKTrainer, tmp_path / "run", **SETTINGS).train(resume_from_checkpoint=True)
