"""MTPO in float64: the golden game, and every group of conversations of a tree of two turns."""

import itertools
import math
from functools import partial

import pytest
import torch

from tests.objectives.fixtures import f64, geometric_mixture, kl
from trl_ext.objectives.mtpo import (
    mirror_step,
    turn_advantages,
    turn_kl_loss,
    turn_policy_loss,
    win_credit,
)
from trl_ext.objectives.pair_rules import win_rates
from trl_ext.objectives.segments import runs
from trl_ext.objectives.sequence_policy import leave_one_out_advantage

P = f64([0.5, 0.9, 0.2], [0.1, 0.5, 0.8], [0.8, 0.2, 0.5])
MU = f64(0.5, 0.3, 0.2).log()
ALPHA = 0.2
NAN = math.nan


def golden(actual, *expected):
    torch.testing.assert_close(actual.reshape(-1), f64(*expected), rtol=0, atol=1e-6)


def equilibrium():
    logp = MU
    for _ in range(300):
        logp = mirror_step(logp, MU, P @ logp.exp(), ALPHA, eta=0.5)
    return logp


NASH = equilibrium()


# The tabular game


def test_golden_equilibrium():
    """M1"""
    golden(NASH.exp(), 0.480727, 0.196270, 0.323003)
    worth = P @ NASH.exp() - ALPHA * (NASH - MU)
    golden(worth, *[0.489469] * 3)


def test_the_equilibrium_is_its_own_best_answer():
    answer = mirror_step(MU, MU, P @ NASH.exp(), ALPHA, 1 / ALPHA)
    torch.testing.assert_close(answer, NASH, rtol=0, atol=1e-9)


def test_golden_steps():
    """M2"""
    policy, eta = f64(0.2, 0.5, 0.3).log(), 0.3
    golden(
        mirror_step(policy, MU, P @ policy.exp(), ALPHA, eta).exp(), 0.220655, 0.491403, 0.287942
    )
    mixture = mirror_step(policy, MU, 0.0, ALPHA, eta)
    golden(mixture.exp(), 0.213653, 0.490301, 0.296046)
    torch.testing.assert_close(mixture, geometric_mixture(policy, MU, ALPHA * eta))
    step = mirror_step(policy, MU, P @ mixture.exp(), ALPHA, eta)
    golden(step.exp(), 0.220598, 0.490694, 0.288707)
    again = mirror_step(mixture, mixture, P @ mixture.exp(), ALPHA, eta)
    torch.testing.assert_close(step, again)


def test_a_step_climbs_to_the_maximum_of_its_objective():
    """max ⟨π, ηQ⟩ − αη KL(π‖μ) − (1−αη) KL(π‖π_t), by gradient ascent."""
    policy, eta = f64(0.2, 0.5, 0.3).log(), 0.3
    q = P @ policy.exp()

    def objective(logits):
        logp = logits.log_softmax(0)
        share = ALPHA * eta
        return eta * logp.exp() @ q - share * kl(logp, MU) - (1 - share) * kl(logp, policy)

    logits = policy.clone()
    for _ in range(300):
        logits = logits + 5 * torch.autograd.functional.jacobian(objective, logits)
    expected = mirror_step(policy, MU, q, ALPHA, eta)
    torch.testing.assert_close(logits.log_softmax(0), expected, rtol=0, atol=1e-8)


def test_a_constant_in_q_changes_nothing():
    policy = f64(0.2, 0.5, 0.3).log()
    q = P @ policy.exp()
    torch.testing.assert_close(
        mirror_step(policy, MU, q, ALPHA, 0.3), mirror_step(policy, MU, q - 7, ALPHA, 0.3)
    )


def test_the_guarantee_holds():
    """M3: KL(π*‖π_t) ≤ 32 H Q²/(α² (t+1))."""
    most_q = max(4 * ALPHA * math.log(1 / 0.2), 1.0)
    logp = MU
    for t in range(101):
        assert kl(NASH, logp) <= 32 * most_q**2 / (ALPHA**2 * (t + 1))
        if t == 0:
            assert float(kl(NASH, logp)) == pytest.approx(5e-2, abs=2e-2)
        if t == 100:
            assert float(kl(NASH, logp)) == pytest.approx(2.8e-8, rel=0.1)
        logp = mirror_step(logp, MU, P @ logp.exp(), ALPHA, 2 / (ALPHA * (t + 2)))


# Groups of samples


def test_win_rates_leave_nothing_to_a_baseline():
    """M4: they sum to G/2, so that their credit sums to 0."""
    generator = torch.Generator().manual_seed(0)
    for G in (2, 3, 8):
        half = torch.rand(20, G, G, dtype=torch.float64, generator=generator)
        wins = win_rates((half + 1 - half.mT) / 2)
        torch.testing.assert_close(wins.sum(1), torch.full((20,), G / 2, dtype=torch.float64))
        assert win_credit(wins).sum(1).abs().max() < 1e-14
    assert torch.equal(win_credit(f64([0.8, 0.2])), f64([0.8, 0.2]) - 0.5)


Z = f64(0.2, 0.5, -0.3)
GAME_GRADIENT = f64(0.040958, -0.033675, -0.007284)


def expected_score(credit, G):
    groups = torch.tensor(list(itertools.product(range(3), repeat=G)))
    logp = Z.log_softmax(0)
    score = torch.eye(3, dtype=torch.float64) - logp.exp()
    preferences = P[groups[:, :, None], groups[:, None, :]]
    weights = credit(win_rates(preferences))
    return logp[groups].sum(1).exp() @ (weights[..., None] * score[groups]).mean(1)


def test_both_players_differentiated_learn_nothing():
    """M5"""

    def game(logits, opponent):
        return logits.softmax(0) @ P @ opponent.softmax(0)

    stopped = torch.autograd.functional.jacobian(lambda z: game(z, Z), Z)
    torch.testing.assert_close(stopped, GAME_GRADIENT, rtol=0, atol=1e-6)
    both = torch.autograd.functional.jacobian(lambda z: game(z, z), Z)
    assert both.abs().max() < 1e-15


@pytest.mark.parametrize("G", [2, 3, 4])
def test_a_half_is_the_exact_baseline(G):
    """M5: and leaving one out counts it G/(G−1) times."""
    torch.testing.assert_close(expected_score(win_credit, G), GAME_GRADIENT, rtol=0, atol=1e-6)
    torch.testing.assert_close(
        expected_score(leave_one_out_advantage, G), GAME_GRADIENT * G / (G - 1), rtol=0, atol=1e-6
    )


# Two turns: the agent says a, the environment answers e, and unless it says goodbye (e = 1) the
# agent says b. Logits of the agent in three states: at first, after (0, 0) and after (1, 0).

TREE = f64([0.4, -0.3], [0.1, 0.6], [-0.2, 0.5])
TREE_MU = f64([0.0, 0.3], [0.5, -0.4], [0.2, 0.1])
GOODBYE = f64(0.3, 0.6)  # P(e = 1 | a)
CONVERSATIONS = [(a, 0, b) for a in (0, 1) for b in (0, 1)] + [(0, 1), (1, 1)]
_half = torch.rand(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
TREE_P = (_half + 1 - _half.T) / 2
BETA = 0.7


def turn_logps(logits):
    """Log-probability of each turn of each conversation, `(6, 2)`; 0 where there is no turn."""
    law = logits.log_softmax(1)
    first = torch.stack([law[0, c[0]] for c in CONVERSATIONS])
    second = torch.stack(
        [law[1 + c[0], c[2]] if len(c) == 3 else 0 * law[0, 0] for c in CONVERSATIONS]
    )
    return torch.stack([first, second], dim=1)


def tree_law(logits):
    """Probability of each conversation, `(6,)`."""
    environment = torch.stack([GOODBYE[c[0]] if c[1] else 1 - GOODBYE[c[0]] for c in CONVERSATIONS])
    return turn_logps(logits).sum(1).exp() * environment


def trajectory_kl(logits):
    """KL_p: the expected sum of the KLs at the states that are visited."""
    logp, reference = logits.log_softmax(1), TREE_MU.log_softmax(1)
    by_state = (logp.exp() * (logp - reference)).sum(1)
    return by_state[0] + logp[0].exp() * (1 - GOODBYE) @ by_state[1:]


def tree_jacobian(function):
    return torch.autograd.functional.jacobian(function, TREE).flatten()


TURN_SCORES = torch.autograd.functional.jacobian(turn_logps, TREE).view(6, 2, 6)
LOG_RATIO = turn_logps(TREE) - turn_logps(TREE_MU)


def objective(logits, opponent=TREE):
    win = tree_law(logits) @ TREE_P @ tree_law(opponent).detach()
    return win - BETA * trajectory_kl(logits)


def tree_estimates(advantages, G):
    groups = torch.tensor(list(itertools.product(range(6), repeat=G)))
    credit = win_credit(win_rates(TREE_P[groups[:, :, None], groups[:, None, :]]))
    weights = advantages(credit, LOG_RATIO[groups])
    probability = tree_law(TREE)[groups].prod(1)
    return probability, torch.einsum("ngh,nghp->np", weights, TURN_SCORES[groups]) / G


def expected_update(advantages, G):
    probability, estimate = tree_estimates(advantages, G)
    return probability @ estimate


OURS = partial(turn_advantages, alpha=BETA)


def test_the_kl_of_conversations_is_a_sum_over_visited_states():
    """Lemma 3.1"""
    log_ratio = turn_logps(TREE).sum(1) - turn_logps(TREE_MU).sum(1)
    torch.testing.assert_close(tree_law(TREE) @ log_ratio, trajectory_kl(TREE))


@pytest.mark.parametrize("G", [2, 3])
def test_turns_get_the_gradient_of_the_regularised_game(G):
    torch.testing.assert_close(expected_update(OURS, G), tree_jacobian(objective))


def test_without_the_own_turn_the_state_s_kl_is_left_to_the_loss():
    """α ∇KL(π‖μ)[x] at each visited state makes up for what `include_own=False` leaves out."""
    logp, reference = TREE.log_softmax(1), TREE_MU.log_softmax(1)
    visits = torch.cat([f64(1.0), logp[0].exp() * (1 - GOODBYE)])

    def at_the_turns(logits):
        logp = logits.log_softmax(1)
        return visits @ (logp.exp() * (logp - reference)).sum(1)

    actual = expected_update(partial(OURS, include_own=False), 2) - BETA * tree_jacobian(
        at_the_turns
    )
    torch.testing.assert_close(actual, tree_jacobian(objective))


def test_without_what_is_to_come_it_is_another_gradient():
    def own_turn_only(credit, log_ratio):
        return credit[..., None] - BETA * log_ratio

    assert (expected_update(own_turn_only, 2) - tree_jacobian(objective)).norm() > 0.01


@pytest.mark.parametrize(("distance", "helps"), [(0.0, False), (3.0, True)])
def test_the_others_kl_helps_far_from_the_reference(distance, helps):
    """It is exact anywhere; a larger KL, here by a constant, is what it takes away."""
    exact, noise = tree_jacobian(objective), []
    for baseline in (True, False):

        def advantages(credit, log_ratio, baseline=baseline):
            return turn_advantages(credit, log_ratio + distance, BETA, baseline=baseline)

        probability, estimate = tree_estimates(advantages, 3)
        torch.testing.assert_close(probability @ estimate, exact)
        noise.append(probability @ (estimate - exact).square().sum(1))
    assert (noise[0] < noise[1]) == helps


def tree_q(logits):
    """Q against itself in each state, `(3, 2)`: the win rate, minus the KL of the turns to come."""
    win = TREE_P @ tree_law(logits)
    logp, reference = logits.log_softmax(1), TREE_MU.log_softmax(1)
    second = torch.stack([win[:2], win[2:4]])
    value = (logp[1:].exp() * (second - BETA * (logp[1:] - reference[1:]))).sum(1)
    first = GOODBYE * win[4:] + (1 - GOODBYE) * value
    return torch.cat([first[None], second])


def test_the_steps_reach_the_equilibrium_of_the_tree():
    """Where the policy is the best answer to itself, and the gradient of the game 0."""
    logits = TREE_MU
    for _ in range(200):
        logits = mirror_step(logits, TREE_MU.log_softmax(1), tree_q(logits), BETA, eta=0.5)
    answer = mirror_step(logits, TREE_MU.log_softmax(1), tree_q(logits), BETA, eta=1 / BETA)
    torch.testing.assert_close(answer, logits)
    slope = torch.autograd.functional.jacobian(partial(objective, opponent=logits), logits)
    assert slope.abs().max() < 1e-12


def test_a_group_of_like_conversations_learns_only_from_the_judge():
    log_ratio = torch.full((2, 3, 4), 0.3)
    credit = torch.tensor([[0.5, -0.5, 0.0], [0.0, 0.0, 0.0]])
    assert torch.equal(turn_advantages(credit, log_ratio, 0.1), credit[..., None].expand(2, 3, 4))


def test_one_turn_is_nash_md_with_a_baseline():
    generator = torch.Generator().manual_seed(1)
    credit, ratio = torch.randn(2, 5, 4, dtype=torch.float64, generator=generator)
    expected = credit - 0.3 * leave_one_out_advantage(ratio)
    torch.testing.assert_close(turn_advantages(credit, ratio[..., None], 0.3)[..., 0], expected)


def test_an_unjudged_conversation_is_as_if_never_drawn():
    credit, ratio = f64([0.5, NAN, -0.5]), torch.randn(1, 3, 2, dtype=torch.float64)
    for baseline in (True, False):
        actual = turn_advantages(credit, ratio, 0.5, baseline=baseline)
        assert torch.equal(actual[0, 1], torch.zeros(2, dtype=torch.float64))
        others = turn_advantages(credit[:, [0, 2]], ratio[:, [0, 2]], 0.5, baseline=baseline)
        torch.testing.assert_close(actual[:, [0, 2]], others, rtol=0, atol=1e-15)


def test_a_group_without_any_judgement_gets_nothing():
    silent = turn_advantages(f64([NAN, NAN]), torch.randn(1, 2, 3, dtype=torch.float64), 0.5)
    assert torch.equal(silent, torch.zeros(1, 2, 3, dtype=torch.float64))


def test_only_the_kl_to_come_is_of_who_sampled():
    generator = torch.Generator().manual_seed(2)
    credit, own, sampled = torch.randn(3, 2, 3, 4, dtype=torch.float64, generator=generator)
    actual = turn_advantages(credit[..., 0], own, 0.5, sampled_log_ratio_PGH=sampled)
    later = turn_advantages(credit[..., 0], sampled, 0.5, include_own=False)
    torch.testing.assert_close(actual, later - 0.5 * leave_one_out_advantage_of_turns(own))
    same = turn_advantages(credit[..., 0], own, 0.5, sampled_log_ratio_PGH=own)
    assert torch.equal(same, turn_advantages(credit[..., 0], own, 0.5))


def leave_one_out_advantage_of_turns(values_PGH):
    turns = [leave_one_out_advantage(values_PG) for values_PG in values_PGH.unbind(2)]
    return torch.stack(turns, dim=2)


# The loss of turns


def turn_samples(seed=4):
    generator = torch.Generator().manual_seed(seed)
    return 0.1 * torch.randn(4, 2, 3, 4, dtype=torch.float64, generator=generator)


def test_fresh_turns_have_reinforces_gradient():
    logp, _, _, advantage = turn_samples()
    logp.requires_grad_()
    loss = turn_policy_loss(logp, logp.detach(), logp.detach(), advantage, 0.2)
    (gradient,) = torch.autograd.grad(loss.sum(), logp)
    assert torch.equal(gradient, -advantage)


def test_turns_of_another_are_reweighted_exactly_inside_the_clip():
    logp, old, sampled, advantage = turn_samples()
    logp.requires_grad_()
    loss = turn_policy_loss(logp, old, sampled, advantage, 0.9)
    (gradient,) = torch.autograd.grad(loss.sum(), logp)
    expected = -(logp - sampled).exp() * advantage
    torch.testing.assert_close(gradient, expected.detach())


def test_each_turn_is_clipped_by_itself_and_only_against_the_policy_of_the_round():
    logp, old, sampled = f64([[0.5, 0.0]]), f64([[0.0, 0.0]]), f64([[0.0, -3.0]])
    logp = logp[None].requires_grad_()
    loss = turn_policy_loss(logp, old[None], sampled[None], torch.ones_like(logp), 0.2)
    (gradient,) = torch.autograd.grad(loss.sum(), logp)
    golden(gradient, 0.0, -math.exp(3))


def test_a_turn_s_kl_forgets_the_turns_before():
    """Two tokens, somebody else's, two tokens: the second turn's ratio begins anew."""
    logp, sampled, kl_of_laws = (0.1 * f64(range(1 + i, 6 + i)).view(1, 5) for i in (0, 3, 6))
    turns = runs(torch.tensor([[1, 1, 0, 1, 1]]))
    loss = turn_kl_loss(kl_of_laws, logp, 2 * sampled, turns)
    first, _, _, second, _ = (logp - 2 * sampled).exp()[0].tolist()
    torch.testing.assert_close(loss, kl_of_laws * f64([1.0, first, 0.0, 1.0, second]))
    nothing = turn_kl_loss(kl_of_laws, logp, sampled, torch.full((1, 5), -1))
    assert torch.equal(nothing, torch.zeros(1, 5, dtype=torch.float64))


def test_no_gradient_reaches_the_advantage():
    credit, ratio = f64([0.1, -0.1]).requires_grad_(), torch.ones(1, 2, 2, requires_grad=True)
    assert not turn_advantages(win_credit(credit), ratio.double(), 0.5).requires_grad
