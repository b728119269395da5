"""AGRO in float64: every group of samples of a categorical policy, golden values, fixed points."""

import itertools
import math

import pytest
import torch

from tests.objectives.fixtures import f64, kl
from trl_ext.objectives.agro import (
    agro_full_loss,
    agro_loss,
    copg_loss,
    regularised_reward,
    topr_loss,
)

LOGITS = f64(0.4, -0.1, 0.3, -0.6)
REF = f64(0.1, 0.5, -0.4, 0.0).log_softmax(0)
REWARDS = f64(1.0, 0.0, 0.5, -0.3)
MU = f64(-0.2, 0.7, 0.1, 0.3).log_softmax(0)
BETA = 0.5
OPTIMUM = (REF + REWARDS / BETA).log_softmax(0)


def golden(actual, *expected):
    torch.testing.assert_close(actual, f64(*expected), rtol=0, atol=1e-6)


def returns(logp):
    return regularised_reward(REWARDS[None], logp[None], REF[None], BETA)[0]


def gradient(function, logits=LOGITS):
    """∇ function(log π) in the logits."""
    logits = logits.clone().requires_grad_()
    function(logits.log_softmax(0)).backward()
    return logits.grad


def expected_gradient(loss, law, G, logits=LOGITS):
    """Mean gradient of the loss over every group of G samples of `law`."""

    def expectation(logp):
        total = 0.0
        for group in itertools.product(range(4), repeat=G):
            index = torch.tensor(group)
            probability = law.detach()[index].sum().exp()
            total = total + probability * loss(index, logp[index][None]).mean()
        return total

    return gradient(expectation, logits)


def frozen(index, logp_PM):
    R_PM = regularised_reward(REWARDS[index][None], logp_PM, REF[index][None], BETA)
    return agro_loss(R_PM, logp_PM)


def full(index, logp_PM):
    R_PM = regularised_reward(REWARDS[index][None], logp_PM, REF[index][None], BETA)
    return agro_full_loss(R_PM, logp_PM, BETA)


def covariance(law, logits=LOGITS):
    """Cov_law(R, ∇log π) in the logits, for which ∇log π(y) = e_y − π."""
    p, R = law.exp(), returns(logits.log_softmax(0))
    score = torch.eye(4, dtype=torch.float64) - logits.softmax(0)
    return (p * (R - p @ R)) @ score


def variance(logp):
    p = logp.exp()
    R = REWARDS - BETA * (logp - REF)
    return (p * (R - p @ R).square()).sum()


def test_golden_values():
    policy = LOGITS.log_softmax(0)
    R = returns(policy)
    golden(R, 0.835218, 0.285218, 0.135218, -0.014782)
    golden(covariance(MU), 0.08869, 0.008674, -0.026592, -0.070773)
    golden(covariance(policy), 0.154363, -0.022235, -0.08031, -0.051817)
    golden(gradient(lambda logp: variance(logp) / 2), -0.062413, 0.000443, 0.032741, 0.029229)
    half_variance = (MU.exp() * (R - MU.exp() @ R).square()).sum() / 2
    torch.testing.assert_close(half_variance.item(), 0.0370001, rtol=0, atol=1e-6)
    golden(OPTIMUM.exp(), 0.670137, 0.135298, 0.149528, 0.045037)


@pytest.mark.parametrize("G", [2, 3])
@pytest.mark.parametrize("law", [MU, LOGITS.log_softmax(0)], ids=["off-policy", "on-policy"])
def test_the_expected_gradient_is_the_covariance(law, G):
    torch.testing.assert_close(-expected_gradient(frozen, law, G), covariance(law))


def test_on_policy_it_is_the_gradient_of_the_regularised_objective():
    def objective(logp):
        return logp.exp() @ (REWARDS - BETA * (logp - REF))

    actual = -expected_gradient(frozen, LOGITS.log_softmax(0), 3)
    torch.testing.assert_close(actual, gradient(objective))


@pytest.mark.parametrize("G", [2, 3, 4])
def test_full_is_the_gradient_of_the_variance(G):
    actual = expected_gradient(full, LOGITS.log_softmax(0), G)
    expected = gradient(lambda logp: variance(logp) / (2 * BETA))
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("loss", [frozen, full])
def test_at_the_optimum_every_group_has_gradient_zero(loss):
    for index in (torch.tensor(group) for group in itertools.product(range(4), repeat=3)):
        g = gradient(lambda logp, i=index: loss(i, logp[i][None]).mean(), OPTIMUM)
        assert g.abs().max() < 1e-15


def test_the_baseline_is_part_of_the_gradient_off_policy():
    def without(index, logp_PM):
        R = regularised_reward(REWARDS[index][None], logp_PM, REF[index][None], BETA)
        return -R * logp_PM

    assert expected_gradient(without, MU, 2, OPTIMUM).norm() > 0.3
    assert expected_gradient(without, OPTIMUM, 2, OPTIMUM).norm() < 1e-12


def test_descent_on_foreign_samples_reaches_the_optimum():
    logits = REF.clone()
    for _ in range(3000):
        logits = logits + 2.0 * covariance(MU, logits)
    assert kl(logits.log_softmax(0), OPTIMUM) < 1e-12


def test_copg_has_the_same_gradient():
    generator = torch.Generator().manual_seed(0)
    rewards, logp, ref = torch.randn(3, 2, 5, dtype=torch.float64, generator=generator)
    gradients = []
    for loss in (
        lambda x: copg_loss(rewards, x, ref, BETA).sum(),
        lambda x: agro_loss(regularised_reward(rewards, x, ref, BETA), x).mean(1).sum(),
    ):
        x = logp.clone().requires_grad_()
        loss(x).backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients)


def test_equal_returns_and_unscorable_groups_teach_nothing():
    logp = torch.randn(2, 3, dtype=torch.float64)
    equal = torch.full((2, 3), 0.7, dtype=torch.float64)
    alone = f64([math.nan, 1.0, math.nan], [math.nan] * 3)
    for R in (equal, alone):
        for loss in (agro_loss(R, logp), agro_full_loss(R, logp, BETA)):
            assert torch.equal(loss, torch.zeros_like(loss))


@pytest.mark.parametrize("loss", [agro_loss, lambda R, x: agro_full_loss(R, x, BETA)])
def test_an_unscorable_completion_was_never_drawn(loss):
    R, logp = torch.randn(2, 1, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    R[0, 2] = math.nan
    kept = [0, 1, 3]
    actual, expected = loss(R, logp), loss(R[:, kept], logp[:, kept])
    assert actual[0, 2] == 0
    torch.testing.assert_close(actual.mean(), expected.mean())


def test_topr_lets_only_negatives_fade():
    logp = f64([-1.0, -5.0, -1.0, -5.0, -2.0]).requires_grad_()
    old = f64([-3.0, -3.0, -3.0, -3.0, -2.0])
    topr_loss(f64([1.0, 1.0, -1.0, -1.0, math.nan]), logp, old).sum().backward()
    torch.testing.assert_close(logp.grad, f64([-1.0, -1.0, 1.0, math.exp(-2.0), 0.0]))
