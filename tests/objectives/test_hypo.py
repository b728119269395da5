"""HyPO's KL of unlabelled samples: over every group, its gradient is that of the KL."""

import itertools

import pytest
import torch

from tests.objectives.fixtures import (
    C_KL_GRADIENT,
    C_LOGITS,
    C_REF_LOGITS,
    assert_golden,
    c_gradient,
    c_logps,
    f64,
    kl,
)
from trl_ext.objectives.kl import leave_one_out_kl_loss

REF = c_logps(C_REF_LOGITS)


@pytest.mark.parametrize("k", [2, 3])
def test_over_all_groups_it_is_the_gradient_of_the_kl(k):
    groups = torch.tensor(list(itertools.product(range(9), repeat=k)))
    chance = c_logps(C_LOGITS)[groups].sum(1).exp()

    def expected(logits):
        return chance @ leave_one_out_kl_loss(c_logps(logits)[groups], REF[groups])

    actual = c_gradient(expected)
    exact = c_gradient(lambda logits: kl(c_logps(logits), REF))
    torch.testing.assert_close(actual, exact, rtol=0, atol=1e-14)
    assert_golden(actual, C_KL_GRADIENT)


def test_golden_value_of_two_samples():
    samples = torch.tensor([[1, 6]])  # (0, 1) and (2, 0)
    loss = leave_one_out_kl_loss(c_logps(C_LOGITS)[samples], REF[samples])
    assert_golden(loss, f64(-1.30850555))


def test_at_the_reference_the_gradient_is_exactly_0():
    logp = -torch.rand(4, 3, dtype=torch.float64)
    leaf = logp.clone().requires_grad_()
    leave_one_out_kl_loss(leaf, logp).sum().backward()
    assert (leaf.grad == 0).all()


def test_order_of_the_group_does_not_matter():
    logp, ref = -torch.rand(2, 4, dtype=torch.float64), -torch.rand(2, 4, dtype=torch.float64)
    order = [2, 0, 3, 1]
    actual = leave_one_out_kl_loss(logp[:, order], ref[:, order])
    torch.testing.assert_close(actual, leave_one_out_kl_loss(logp, ref))


def test_log_ratios_and_reference_are_held_fixed():
    logp, ref = f64([-1.0, -2.0]).requires_grad_(), f64([-1.5, -0.5]).requires_grad_()
    leave_one_out_kl_loss(logp, ref).sum().backward()
    assert ref.grad is None
    # κ = (0.5, −1.5): centred (2, −2), halved
    assert logp.grad.tolist() == [[1.0, -1.0]]


@pytest.mark.parametrize("shapes", [((3,), (3,)), ((2, 3), (2, 1)), ((2, 1), (2, 1))])
def test_refuses_other_shapes(shapes):
    with pytest.raises(AssertionError):
        leave_one_out_kl_loss(*(torch.zeros(shape) for shape in shapes))
