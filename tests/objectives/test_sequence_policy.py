"""Policy gradients on whole completions against autograd of their objectives."""

import itertools
import math

import pytest
import torch

from tests.objectives.fixtures import (
    A_OLD,
    A_POLICY,
    A_REF,
    A_REWARDS,
    A_RHO,
    a_gradient,
    assert_golden,
    f64,
)
from trl_ext.objectives.pairs import ipo_loss
from trl_ext.objectives.sequence_policy import (
    effective_sample_size,
    importance_weighted_loss,
    leave_one_out_advantage,
    proximal_loss,
    reinforce_loss,
)

NAN = math.nan
REWARDS = f64([1.0, 0.0, 0.5])
LOG_RATIOS = f64([0.1, -0.3, 0.5])
ADVANTAGES = f64([0.75, -0.75, 0.0])
OLD = f64([-3.0, -2.0, -4.0])


def gradient(loss, *tensors):
    leaves = [x.clone().requires_grad_() for x in tensors]
    return torch.autograd.grad(loss(*leaves).sum(), leaves, allow_unused=True)


def test_golden_values():
    assert_golden(leave_one_out_advantage(REWARDS), ADVANTAGES)
    loss = proximal_loss(OLD + LOG_RATIOS, OLD, ADVANTAGES, 0.2)
    assert_golden(loss, f64([-0.82887819, 0.60000000, 0.0]))
    assert_golden(loss.mean(), -0.07629273)
    assert_golden(effective_sample_size(LOG_RATIOS), 2.72095603)


def test_on_policy_all_three_are_reinforce():
    (expected,) = gradient(lambda logp: reinforce_loss(logp, ADVANTAGES), OLD)
    torch.testing.assert_close(expected, -ADVANTAGES)
    for loss in (
        lambda logp: importance_weighted_loss(logp, OLD, ADVANTAGES),
        lambda logp: proximal_loss(logp, OLD, ADVANTAGES, 0.2),
    ):
        assert torch.equal(gradient(loss, OLD)[0], expected)


def test_the_clip_holds_what_went_far_enough_and_only_that():
    # A > 0 too likely, A < 0 too unlikely; then both on the way back, and inside the range.
    log_ratio = f64([0.5, -0.5, -0.5, 0.5, 0.1, -0.1])
    advantage = f64([1.0, -1.0, 1.0, -1.0, 1.0, -1.0])
    zero = torch.zeros(1, 6, dtype=torch.float64)
    (clipped,) = gradient(lambda logp: proximal_loss(logp, zero, advantage, 0.2), log_ratio)
    (free,) = gradient(lambda logp: importance_weighted_loss(logp, zero, advantage), log_ratio)
    assert clipped[0, :2].tolist() == [0.0, 0.0]
    assert torch.equal(clipped[0, 2:], free[0, 2:])


def test_the_clip_is_pessimistic():
    generator = torch.Generator().manual_seed(0)
    logp, old, advantage = torch.randn(3, 1, 200, generator=generator)
    clipped = proximal_loss(logp, old, advantage, 0.2)
    free = importance_weighted_loss(logp, old, advantage)
    assert (clipped >= free).all() and (clipped > free).any()


def test_stop_gradients_stop():
    for loss in (
        lambda logp, old, a: importance_weighted_loss(logp, old, a),
        lambda logp, old, a: proximal_loss(logp, old, a, 0.2),
        lambda logp, old, a: reinforce_loss(logp, a),
    ):
        moved, *fixed = gradient(loss, OLD + LOG_RATIOS, OLD, ADVANTAGES)
        assert moved is not None and fixed == [None, None]
    rewards = REWARDS.clone().requires_grad_()
    assert not leave_one_out_advantage(rewards).requires_grad
    assert not effective_sample_size(rewards).requires_grad


@pytest.mark.parametrize("sampler", [A_POLICY, A_OLD], ids=["on-policy", "off-policy"])
def test_over_all_samples_the_weighted_loss_ascends_the_reward(sampler):
    rewards = A_REWARDS.expand(1, 5)

    def loss(logp):
        return sampler.exp() @ importance_weighted_loss(logp[None], sampler[None], rewards)[0]

    exact = a_gradient(lambda logp: logp.exp() @ A_REWARDS)
    torch.testing.assert_close(a_gradient(loss), -exact)


@pytest.mark.parametrize("M", [2, 3])
def test_over_all_groups_leave_one_out_ascends_the_reward(M):
    groups = torch.tensor(list(itertools.product(range(5), repeat=M)))
    chance, advantage = A_POLICY[groups].sum(1).exp(), leave_one_out_advantage(A_REWARDS[groups])
    actual = a_gradient(lambda logp: chance @ reinforce_loss(logp[groups], advantage).mean(1))
    torch.testing.assert_close(actual, -a_gradient(lambda logp: logp.exp() @ A_REWARDS))


def test_with_the_kl_in_the_reward_a_pair_is_the_gradient_of_ipo():
    """r = ±1/4; twice RLOO's ascent of a pair is that of CoPG, −(β/2) ∇IPO."""
    beta, pair = 0.4, [0, 2]

    def rloo(logp, rewards):
        penalised = rewards - beta * A_RHO[pair]
        return reinforce_loss(logp[None, pair], leave_one_out_advantage(penalised[None])).mean()

    def ipo(logp):
        rho = (logp - A_REF)[pair]
        return ipo_loss((rho[0] - rho[1]).view(1, 1), beta).sum()

    actual = a_gradient(lambda logp: rloo(logp, f64(0.25, -0.25)))
    torch.testing.assert_close(actual, beta / 4 * a_gradient(ipo))
    contrastive = -2 * a_gradient(lambda logp: rloo(logp, A_REWARDS[pair]))
    assert_golden(contrastive, f64(-0.18, 0.0, 0.18, 0.0, 0.0))


@pytest.mark.parametrize("value", [0.3, 1 / 3, NAN])
def test_a_silent_group_has_exactly_no_advantage(value):
    advantage = leave_one_out_advantage(torch.full((2, 3), value))
    assert torch.equal(advantage, torch.zeros(2, 3))


def test_unscorable_completions_were_never_drawn():
    advantage = leave_one_out_advantage(f64([1.0, NAN, 0.0], [NAN, 2.0, NAN]))
    torch.testing.assert_close(advantage, f64([1.5, 0.0, -1.5], [0.0, 0.0, 0.0]))


def test_effective_sample_size_counts_samples():
    assert effective_sample_size(torch.full((2, 3), -4.7)).item() == pytest.approx(6.0)
    weights = f64(0.2, 1.0, 3.0)
    expected = weights.sum() ** 2 / weights.square().sum()
    torch.testing.assert_close(effective_sample_size(weights.log()), expected)
    torch.testing.assert_close(effective_sample_size(weights.log() + 900), expected)
    assert effective_sample_size(f64(0.0, -800.0, -800.0)).item() == 1.0


@pytest.mark.parametrize(
    "call",
    [
        lambda x, y: leave_one_out_advantage(y),
        lambda x, y: leave_one_out_advantage(x[:, :1]),
        lambda x, y: reinforce_loss(x, y),
        lambda x, y: importance_weighted_loss(x, x, y),
        lambda x, y: proximal_loss(x, y, x, 0.2),
        lambda x, y: proximal_loss(x, x, x, 0.0),
        lambda x, y: effective_sample_size(x[:0]),
    ],
)
def test_refuses_what_it_cannot_mean(call):
    with pytest.raises(AssertionError):
        call(torch.zeros(2, 3), torch.zeros(3))
