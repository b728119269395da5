"""The guard stops on what is not finite, and on nothing else."""

from types import SimpleNamespace

import pytest
import torch

from trl_ext.runtime.guards import NonFiniteGuard


def before_step(model, fp16=False):
    args, state = SimpleNamespace(fp16=fp16), SimpleNamespace(global_step=6)
    NonFiniteGuard().on_pre_optimizer_step(args, state, None, model=model)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_names_the_parameter_and_the_step(value):
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    model[1].weight.grad[0, 1] = value
    with pytest.raises(FloatingPointError, match=r"'1\.weight' is not finite in optimizer step 7"):
        before_step(model)
    before_step(model, fp16=True)  # the gradient scaler skips such a step by itself


def test_large_and_missing_gradients_pass():
    model = torch.nn.Linear(2, 2)
    before_step(model)
    model.weight.grad = torch.full((2, 2), 1e30)
    before_step(model)
