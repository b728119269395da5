"""What is written is what is read, whole or not at all, and never a pickle."""

import json
import math

import pytest
import torch

from trl_ext.runtime.exact_state import (
    load_exact_state,
    load_policy,
    save_exact_state,
    save_policy,
)

CPU = torch.device("cpu")


def test_round_trip_keeps_dtypes_shapes_views_and_floats(tmp_path):
    whole = torch.arange(12).view(4, 3)
    window = [
        {"ids": whole[:2], "n": torch.tensor(7), "num_images": [1, 2], "logp": torch.rand(2, 3)},
        {"ids": whole[2:], "n": torch.tensor(7), "num_images": None, "logp": torch.rand(2, 3)},
    ]
    values = {"loss": 0.1 + 0.2, "nan": math.nan, "metrics": {"kl": [1e-300, 1 / 3]}}
    save_exact_state(str(tmp_path), 1, window, values)
    window_again, values_again = load_exact_state(str(tmp_path), 1, CPU)
    for batch, again in zip(window, window_again, strict=True):
        assert batch.keys() == again.keys()
        for key, value in batch.items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, again[key]) and value.dtype == again[key].dtype
            else:
                assert value == again[key]
    assert math.isnan(values_again.pop("nan"))
    assert values_again == {k: v for k, v in values.items() if k != "nan"}


def test_no_window_is_not_an_empty_one(tmp_path):
    save_exact_state(str(tmp_path), 0, None, {})
    assert load_exact_state(str(tmp_path), 0, CPU) == (None, {})


def test_missing_state_is_said_aloud(tmp_path, caplog):
    save_exact_state(str(tmp_path), 0, None, {})
    assert load_exact_state(str(tmp_path), 1, CPU) is None
    assert "no trl_ext state for process 1" in caplog.text


def test_a_write_that_fails_leaves_the_old_state(tmp_path):
    save_exact_state(str(tmp_path), 0, None, {"step": 1})
    with pytest.raises(TypeError):
        save_exact_state(str(tmp_path), 0, None, {("no", "key"): 2})
    assert load_exact_state(str(tmp_path), 0, CPU)[1] == {"step": 1}
    assert json.loads((tmp_path / "trl_ext_state_0.json").read_text())["values"] == {"step": 1}


def test_reference_round_trip_with_tied_weights(tmp_path):
    model, other = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)), None
    model[1].weight = model[0].weight
    save_policy(str(tmp_path), model)
    other = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    other[1].weight = other[0].weight
    load_policy(str(tmp_path), other)
    assert torch.equal(model[1].weight, other[1].weight)
    with pytest.raises(FileNotFoundError, match="sync_ref_model"):
        load_policy(str(tmp_path / "elsewhere"), other)
