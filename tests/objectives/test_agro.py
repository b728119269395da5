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
from trl_ext.objectives.sequence_policy import leave_one_out_advantage, reinforce_loss

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
    golden(returns(OPTIMUM), *[0.506590] * 4)  # V*, of every completion alike
    golden(BETA * (REF + REWARDS / BETA).logsumexp(0)[None], 0.506590)


@pytest.mark.parametrize("G", [2, 3])
@pytest.mark.parametrize("law", [MU, LOGITS.log_softmax(0)], ids=["off-policy", "on-policy"])
def test_the_expected_gradient_is_the_covariance(law, G):
    torch.testing.assert_close(-expected_gradient(frozen, law, G), covariance(law))


def test_on_policy_it_is_the_gradient_of_the_regularised_objective():
    def objective(logp):
        return logp.exp() @ (REWARDS - BETA * (logp - REF))

    actual = -expected_gradient(frozen, LOGITS.log_softmax(0), 3)
    torch.testing.assert_close(actual, gradient(objective))


def test_each_loss_is_rloo_with_the_kl_in_the_reward():
    generator = torch.Generator().manual_seed(0)
    rewards, logp, ref = torch.randn(3, 4, 5, dtype=torch.float64, generator=generator)
    rewards[1, 3] = math.nan
    logp.requires_grad_()
    advantage = leave_one_out_advantage(rewards - BETA * (logp - ref))
    expected = reinforce_loss(logp, advantage)
    actual = agro_loss(regularised_reward(rewards, logp, ref, BETA), logp)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-15)
    slopes = [torch.autograd.grad(loss.sum(), logp)[0] for loss in (actual, expected)]
    torch.testing.assert_close(*slopes, rtol=0, atol=1e-15)


@pytest.mark.parametrize("G", [2, 3, 4])
def test_full_is_the_gradient_of_the_variance(G):
    actual = expected_gradient(full, LOGITS.log_softmax(0), G)
    expected = gradient(lambda logp: variance(logp) / (2 * BETA))
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("G", [2, 3, 5])
def test_full_credits_a_sample_with_what_it_adds_to_the_spread(G):
    """U of all minus U of the others, which keeps the estimate's noise low."""

    def half_variance(values):
        return values.var() / 2 if len(values) > 1 else values.new_zeros(())

    R, logp = torch.randn(2, 1, G, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    others = [R[0, [j for j in range(G) if j != i]] for i in range(G)]
    added = torch.stack([half_variance(R[0]) - half_variance(rest) for rest in others])
    centred = R[0] - torch.stack([rest.mean() for rest in others])
    expected = (G * added / BETA - centred) * logp[0]
    torch.testing.assert_close(agro_full_loss(R, logp, BETA)[0], expected)


@pytest.mark.parametrize("loss", [agro_loss, lambda R, x: agro_full_loss(R, x, BETA)])
def test_returns_are_held_fixed(loss):
    R, logp = torch.randn(2, 2, 4, dtype=torch.float64).requires_grad_().unbind()
    slopes = torch.autograd.grad(loss(R, logp).sum(), [R, logp], allow_unused=True)
    assert slopes[0] is None and slopes[1].abs().min() > 0


@pytest.mark.parametrize("loss", [frozen, full])
def test_at_the_optimum_every_group_has_gradient_zero(loss):
    for index in (torch.tensor(group) for group in itertools.product(range(4), repeat=3)):
        g = gradient(lambda logp, i=index: loss(i, logp[i][None]).mean(), OPTIMUM)
        assert g.abs().max() < 1e-15


def test_a_mean_with_the_sample_in_it_shortens_the_gradient():
    def centred(index, logp_PM):
        R = regularised_reward(REWARDS[index][None], logp_PM, REF[index][None], BETA)
        return -(R - R.mean()) * logp_PM

    for G in (2, 3):
        actual = expected_gradient(centred, MU, G)
        torch.testing.assert_close(-actual, (G - 1) / G * covariance(MU))


def policy_gradient(law, logits, *, centred=True):
    """Off policy, of −E r + β KL with k2: E_law (r − b − β log π/ref) ∇log π, b = E_law r or 0."""
    p, logp = law.exp(), logits.log_softmax(0)
    baseline = p @ REWARDS if centred else 0.0
    weight = p * (REWARDS - baseline - BETA * (logp - REF))
    return weight @ (torch.eye(4, dtype=torch.float64) - logits.softmax(0))


@pytest.mark.parametrize(("centred", "norm", "away"), [(True, 0.198, 0.065), (False, 0.310, 0.133)])
def test_a_regularised_policy_gradient_has_another_fixed_point_off_policy(centred, norm, away):
    """The spec's toy: what AGRO differs from is the baseline, of the KL or of the whole return."""
    ascent = policy_gradient(MU, OPTIMUM, centred=centred)
    assert ascent.norm().item() == pytest.approx(norm, abs=5e-4)
    on_policy = policy_gradient(OPTIMUM, OPTIMUM, centred=centred)
    assert on_policy.norm() < 1e-12
    logits = REF.clone()
    for _ in range(3000):
        logits = logits + policy_gradient(MU, logits, centred=centred)
    assert kl(OPTIMUM, logits.log_softmax(0)).item() == pytest.approx(away, abs=5e-4)


def test_descent_on_foreign_samples_reaches_the_optimum():
    logits = REF.clone()
    for _ in range(3000):
        logits = logits + 2.0 * covariance(MU, logits)
    assert kl(logits.log_softmax(0), OPTIMUM) < 1e-12


def test_dro_with_the_best_value_is_agro():
    """DRO: ½ E_μ(R − V)². With V = E_μ R held fixed, its gradient is that of ½ Var_μ(R)."""
    V = MU.exp() @ returns(LOGITS.log_softmax(0))

    def dro(logp):
        return MU.exp() @ (REWARDS - BETA * (logp - REF) - V).square() / 2

    torch.testing.assert_close(gradient(dro), -BETA * covariance(MU))


def test_copg_is_half_the_squared_difference_of_pairs():
    """Also the form of the released models, 1/(M−1) Σ_{i>j} (Rᵢ − Rⱼ)² = M times the variance."""
    rewards, logp = torch.randn(2, 1, 5, dtype=torch.float64)
    R = regularised_reward(rewards, logp, torch.zeros_like(logp), BETA)[0]
    pairs = [(R[i] - R[j]).square() for i, j in itertools.combinations(range(5), 2)]
    loss = copg_loss(rewards, logp, torch.zeros_like(logp), BETA).mean()
    torch.testing.assert_close(loss, torch.stack(pairs).mean() / (4 * BETA))
    torch.testing.assert_close(sum(pairs) / 4, 5 * R.var())


def test_copg_has_the_same_gradient():
    generator = torch.Generator().manual_seed(0)
    rewards, logp, ref = torch.randn(3, 2, 5, dtype=torch.float64, generator=generator)
    rewards[1, 3] = math.nan
    gradients = []
    for loss in (
        lambda x: copg_loss(rewards, x, ref, BETA).mean(1).sum(),
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
        losses = (
            agro_loss(R, logp),
            agro_full_loss(R, logp, BETA),
            copg_loss(R, logp, logp, BETA),
        )
        for loss in losses:
            assert torch.equal(loss, torch.zeros_like(loss))


@pytest.mark.parametrize(
    "loss",
    [
        agro_loss,
        lambda R, x: agro_full_loss(R, x, BETA),
        lambda R, x: copg_loss(R, x, torch.zeros_like(x), BETA),
    ],
    ids=["agro", "full", "copg"],
)
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


def test_topr_of_positives_or_of_fresh_samples_is_reinforce():
    """The weight is the smaller of the ratio and 1, for negatives: unbiased where π = μ."""
    policy = LOGITS.log_softmax(0)
    for law, rewards in ((policy, REWARDS), (MU, REWARDS.abs())):

        def loss(logp, law=law, rewards=rewards):
            return (law.exp() * topr_loss(rewards[None], logp[None], law[None])[0]).sum()

        def reinforce(logp, law=law, rewards=rewards):
            return -(law.exp() * rewards) @ logp

        torch.testing.assert_close(gradient(loss), gradient(reinforce))


def test_topr_is_bounded_where_reinforce_is_not():
    """A negative that the policy has left pulls no more; without the taper its pull stays whole."""
    gone = f64(-40.0, 0.0, 0.0, 0.0)
    negative = f64([-1.0, 0.0, 0.0, 0.0])
    old = torch.full((1, 4), math.log(0.25), dtype=torch.float64)
    assert gradient(lambda x: topr_loss(negative, x[None], old).sum(), gone).norm() < 1e-15
    assert gradient(lambda x: (-negative * x).sum(), gone).norm() > 1
