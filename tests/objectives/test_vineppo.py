"""VinePPO in float64: every trajectory of a binary tree of three steps, with every rollout."""

import itertools
import math

import pytest
import torch

from tests.objectives.fixtures import f64
from trl_ext.objectives.vineppo import monte_carlo_values, step_advantages, whitened

# Logits of both actions in each of the seven states: root, after 0, 1, 00, 01, 10, 11.
LOGITS = f64(
    *([0.3, -0.2], [0.1, 0.4], [-0.5, 0.2], [0.6, -0.1], [0.0, 0.3], [-0.4, 0.2], [0.5, 0.1])
)
STATES = ["", "0", "1", "00", "01", "10", "11"]
TRAJECTORIES = ["".join(actions) for actions in itertools.product("01", repeat=3)]
REWARD = {y: float(y in ("000", "011", "110", "111")) for y in TRAJECTORIES}
GRADIENT = f64(
    *(-0.012655, 0.012655, 0.014265, -0.014265, -0.083706, 0.083706, 0.05873, -0.05873),
    *(-0.08741, 0.08741, 0.0, 0.0, 0.0, 0.0),
)
NAN = math.nan


def logp(actions, prefix="", logits=LOGITS):
    """log π(actions | prefix)."""
    law = logits.log_softmax(1)
    steps = range(len(prefix), len(prefix + actions))
    whole = prefix + actions
    return sum((law[STATES.index(whole[:h]), int(whole[h])] for h in steps), f64(0.0).squeeze())


def value(prefix):
    rest = ["".join(actions) for actions in itertools.product("01", repeat=3 - len(prefix))]
    return sum(float(logp(y, prefix).exp()) * REWARD[prefix + y] for y in rest)


def scores(trajectory):
    """∇log π of each action, `(3, 14)`."""
    rows = []
    for h in range(3):
        logits = LOGITS.clone().requires_grad_()
        logp(trajectory[h], trajectory[:h], logits).backward()
        rows.append(logits.grad.flatten())
    return torch.stack(rows)


SCORES = {y: scores(y) for y in TRAJECTORIES}


def every_step(_):
    return [0, 1, 2]


def estimates(credit, starts=every_step, K=1):
    """What one update does, over each trajectory and the rewards of K rollouts from each step.

    Args:
        credit: (values of the step starts, reward) to one advantage per step.
        starts: trajectory to the positions at which its steps start.

    Yields:
        Probability and estimate, `(14,)`.
    """
    for y in TRAJECTORIES:
        where = starts(y)
        values = [value(y[:start]) for start in where]
        step = torch.tensor([sum(start <= h for start in where) - 1 for h in range(3)])
        for flat in itertools.product((0.0, 1.0), repeat=K * len(where)):
            rewards = f64(*flat).view(len(where), K)
            chance = float(logp(y).exp())
            for v, row in zip(values, rewards.tolist(), strict=True):
                chance *= math.prod(v if r else 1 - v for r in row)
            advantage = credit(monte_carlo_values(rewards), REWARD[y])
            yield chance, advantage[step] @ SCORES[y]


def ours(values, reward):
    return step_advantages(values[None], f64(reward), torch.tensor([len(values)]))[0]


def expectation(*arguments, **options):
    return sum(chance * estimate for chance, estimate in estimates(*arguments, **options))


def golden(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)


def test_golden_values():
    """V1"""
    assert value("") == pytest.approx(0.634668, abs=1e-6)
    assert value("0") == pytest.approx(0.614337, abs=1e-6)
    assert value("1") == pytest.approx(0.668188, abs=1e-6)
    logits = LOGITS.clone().requires_grad_()
    sum(logp(y, "", logits).exp() * REWARD[y] for y in TRAJECTORIES).backward()
    golden(logits.grad.flatten(), GRADIENT)


@pytest.mark.parametrize("K", [1, 2])
def test_it_is_unbiased_from_one_rollout_on(K):
    golden(expectation(ours, K=K), GRADIENT)


@pytest.mark.parametrize("where", [[0], [0, 1], [0, 2]])
def test_merged_steps_are_unbiased_too(where):
    golden(expectation(ours, lambda _: where), GRADIENT)


def test_a_step_may_begin_behind_a_token_that_says_so():
    golden(expectation(ours, lambda y: [0, *(h for h in (1, 2) if y[h - 1] == "1")]), GRADIENT)


def test_a_step_must_not_look_at_its_own_first_token():
    ahead = expectation(ours, lambda y: [0, *(h for h in (1, 2) if y[h] == "1")])
    assert (ahead - GRADIENT).norm() > 0.01


def test_the_own_reward_among_the_rollouts_shrinks_the_gradient():
    """To K/(K+1): of a trajectory that is one step, to one half with K = 1."""
    for K in (1, 2):

        def mixed(values, reward, K=K):
            return ours((K * values + reward) / (K + 1), reward)

        golden(expectation(mixed, lambda _: [0], K=K), GRADIENT * K / (K + 1))


def test_the_authors_cap_forgets_the_later_steps():
    def capped(values, reward):
        return ours(torch.cat([values[:2], f64(reward)]), reward)

    error = (expectation(capped) - GRADIENT).abs()
    assert float(error.max()) == pytest.approx(0.087, abs=5e-4)
    assert error[:6].max() < 1e-6, "the steps in front of the cap are unharmed"


def test_golden_variances():
    def reinforce(values, reward):
        return torch.full_like(values, reward)

    def noise(**options):
        return sum(
            chance * (estimate - GRADIENT).square().sum()
            for chance, estimate in estimates(**options)
        )

    assert float(noise(credit=reinforce)) == pytest.approx(0.749, abs=5e-4)
    assert float(noise(credit=ours)) == pytest.approx(0.571, abs=5e-4)
    exact = 0.0
    for y in TRAJECTORIES:
        advantage = ours(f64(*(value(y[:h]) for h in range(3))), REWARD[y])
        exact += logp(y).exp() * (advantage @ SCORES[y] - GRADIENT).square().sum()
    assert float(exact) == pytest.approx(0.106, abs=5e-4)


def test_advantages_telescope():
    """V2"""
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(6, 5, dtype=torch.float64, generator=generator)
    rewards = torch.rand(6, dtype=torch.float64, generator=generator)
    steps = torch.tensor([5, 1, 3, 0, 2, 4])
    advantages = step_advantages(values, rewards, steps)
    expected = torch.where(steps > 0, rewards - values[:, 0], 0.0)
    torch.testing.assert_close(advantages.sum(1), expected)
    for row, count in enumerate(steps.tolist()):
        assert not advantages[row, count:].any()


def test_with_exact_values_no_state_has_an_advantage_on_average():
    """V3"""
    advantage = {y: ours(f64(*(value(y[:h]) for h in range(3))), REWARD[y]) for y in TRAJECTORIES}
    for prefix in STATES:
        through = [y for y in TRAJECTORIES if y.startswith(prefix)]
        total = sum(logp(y).exp() * advantage[y][len(prefix)] for y in through)
        assert float(total) == pytest.approx(0.0, abs=1e-15)


def test_what_stands_behind_the_last_step_is_not_read():
    values = f64([0.5, NAN, NAN], [0.25, 0.5, 7.0])
    actual = step_advantages(values, f64(1.0, 0.0), torch.tensor([1, 2]))
    assert torch.equal(actual, f64([0.5, 0.0, 0.0], [0.25, -0.5, 0.0]))


def test_equal_values_and_reward_teach_exactly_nothing():
    values = torch.full((3, 4), 0.1)
    actual = step_advantages(values, torch.full((3,), 0.1), torch.tensor([4, 2, 1]))
    assert torch.equal(actual, torch.zeros(3, 4))


def test_a_missing_value_makes_one_step_of_two():
    """Against the same row without the boundary."""
    missing = step_advantages(f64([0.5, NAN, NAN, 0.25]), f64(1.0), torch.tensor([4]))
    merged = step_advantages(f64([0.5, 0.25]), f64(1.0), torch.tensor([2]))
    assert torch.equal(missing, merged[:, [0, 0, 0, 1]])
    last = step_advantages(f64([0.5, NAN]), f64(1.0), torch.tensor([2]))
    assert torch.equal(last, f64([0.5, 0.5]))


def test_steps_without_any_value_before_them_get_nothing():
    actual = step_advantages(f64([NAN, 0.25], [NAN, NAN]), f64(1.0, 1.0), torch.tensor([2, 2]))
    assert torch.equal(actual, f64([0.0, 0.75], [0.0, 0.0]))


def test_an_unscorable_trajectory_gets_nothing():
    actual = step_advantages(f64([0.5, 0.25], [0.5, 0.25]), f64(NAN, 1.0), torch.tensor([2, 2]))
    assert torch.equal(actual, f64([0.0, 0.0], [-0.25, 0.75]))


def test_no_gradient_reaches_values_or_rewards():
    values, rewards = f64([0.5, 0.2]).requires_grad_(), f64(1.0).requires_grad_()
    assert not step_advantages(values, rewards, torch.tensor([2])).requires_grad


def test_values_are_means_of_the_scorable():
    rewards = f64([1.0, 0.0, NAN], [0.5, 0.25, 0.75], [NAN, NAN, NAN])
    torch.testing.assert_close(monte_carlo_values(rewards), f64(0.5, 0.5, NAN), equal_nan=True)


def test_whitening_counts_the_masked_tokens_only():
    generator = torch.Generator().manual_seed(0)
    advantage = 3 + 2 * torch.randn(4, 9, dtype=torch.float64, generator=generator)
    mask = torch.rand(4, 9, generator=generator) < 0.6
    white = whitened(advantage.masked_fill(~mask, NAN), mask)
    values = advantage[mask]
    torch.testing.assert_close(white[mask], (values - values.mean()) / (values.std() + 1e-4))
    assert not white[~mask].any()


def test_nothing_to_whiten_is_zero():
    for value, T in itertools.product((0.1, 0.7, -3.3), range(2, 12)):
        equal = torch.full((2, T), value)
        assert torch.equal(whitened(equal, torch.ones(2, T)), torch.zeros(2, T))
    assert torch.equal(whitened(equal, torch.zeros(2, T)), torch.zeros(2, T))
