"""Preference games: advantages and losses against the exact game on tabular policies."""

import itertools
import math
from functools import partial

import pytest
import torch

from tests.objectives.fixtures import (
    A_NASH,
    A_OLD,
    A_POLICY,
    A_PREFERENCES,
    A_REF,
    A_RHO,
    C_KL_GRADIENT,
    C_LOGITS,
    C_REF_LOGITS,
    a_gradient,
    assert_golden,
    c_gradient,
    c_laws,
    c_logps,
    c_token_logps,
    f64,
    geometric_mixture,
    kl,
)
from trl_ext.objectives.nash import (
    dno_loss,
    mixed_reference,
    nash_md_advantage,
    nash_mp_advantage,
)
from trl_ext.objectives.pair_rules import win_rates
from trl_ext.objectives.pairs import ipo_loss, labelled, sigmoid_loss
from trl_ext.objectives.sequence_policy import leave_one_out_advantage, reinforce_loss

NAN = math.nan


def wins(logp):
    """P(y ≻ π) of each response of fixture A, `(5,)`."""
    return A_PREFERENCES @ logp.exp()


def differences(values):
    return values[:, None] - values[None, :]


def mirror_step(logp, opponent, beta, eta):
    """Closed form of Nash-MP's step from `logp`, against an opponent."""
    best_answer = wins(opponent) / beta + A_REF
    return ((eta * best_answer + logp) / (1 + eta)).log_softmax(0)


def nash_policy(beta):
    logp = A_REF
    for _ in range(200):
        half = mirror_step(logp, logp, beta, 2 * beta)
        logp = mirror_step(logp, half, beta, 2 * beta)
    return logp


# Nash-MD


def md_step(logp, eta, tau):
    mixed = ((1 - eta * tau) * logp + eta * tau * A_REF).log_softmax(0)
    return mixed, (mixed + eta * wins(mixed)).log_softmax(0)


def test_the_mixture_is_a_normalised_geometric_mean():
    mixture = geometric_mixture(A_POLICY, A_REF, 0.125)
    expected = f64(0.23133046, 0.35384085, 0.10927277, 0.10394348, 0.20161244)
    assert_golden(mixture.exp(), expected)
    product = A_POLICY.exp() ** 0.875 * A_REF.exp() ** 0.125
    torch.testing.assert_close(mixture.exp(), product / product.sum())


def test_the_ends_of_the_mixture_are_policy_and_reference():
    excluded = f64(0.5, 0.5, 0.0).log()
    policy = f64(0.2, 0.3, 0.5).log()
    for a, b in ((policy, excluded), (excluded, policy)):
        torch.testing.assert_close(geometric_mixture(a, b, 0.0), a)
        torch.testing.assert_close(geometric_mixture(a, b, 1.0), b)
        assert geometric_mixture(a, b, 0.3)[2] == -torch.inf
    rows = torch.stack([policy, policy])
    mixed = geometric_mixture(rows, rows.flip(1), f64([0.0], [1.0]))
    torch.testing.assert_close(mixed, torch.stack([policy, policy.flip(0)]))


def test_the_kl_to_the_mixture_is_a_share_of_the_kl_to_the_reference():
    to_reference = a_gradient(lambda logp: kl(logp, A_REF))
    expected = f64(-0.12742845, 0.31876164, -0.15718044, 0.02252192, -0.05667467)
    assert_golden(to_reference, expected)
    for c in (0.0, 0.125, 0.7, 1.0):
        mixture = geometric_mixture(A_POLICY, A_REF, c)
        to_mixture = a_gradient(lambda logp, mixture=mixture: kl(logp, mixture))
        torch.testing.assert_close(to_mixture, c * to_reference)


def test_nash_md_golden_bracket():
    against = wins(geometric_mixture(A_POLICY, A_REF, 0.125))
    bracket = nash_md_advantage(against[None], A_RHO[None], tau=0.008)
    expected = f64([0.01156143, -0.03358242, -0.08625964, 0.10729910, 0.02593054])
    assert_golden(bracket, expected)


def sequence_game():
    """`(9, 9)`, intransitive preferences between the sequences of fixture C."""
    generator = torch.Generator().manual_seed(0)
    above = torch.rand(9, 9, dtype=torch.float64, generator=generator).triu(1)
    return above + (1 - above).T.tril(-1) + torch.eye(9) / 2


def token_mixture(c):
    """Log-probability of each sequence under the mixture taken token by token, `(9,)`."""
    laws = (c_laws(x).log_softmax(-1) for x in (C_LOGITS, C_REF_LOGITS))
    mixed = geometric_mixture(*laws, c)
    logits = torch.zeros(4, 3, dtype=torch.float64)
    logits[0], logits[1:] = mixed[0, 0], mixed[::3, 1]
    return c_logps(logits)


@pytest.mark.parametrize("c", [0.0, 0.125, 1.0])
@pytest.mark.parametrize("tau", [0.0, 0.3, 1.0])
def test_over_all_pairs_nash_md_ascends_its_game_exactly(c, tau):
    game, ref, opponent = sequence_game(), c_logps(C_REF_LOGITS), token_mixture(c).exp()
    y, other = torch.tensor(list(itertools.product(range(9), repeat=2))).T
    log_ratio = (c_logps(C_LOGITS) - ref)[y]
    advantage = nash_md_advantage(game[y, other][:, None], log_ratio[:, None], tau)
    chance = c_logps(C_LOGITS).exp()[y] * opponent[other]

    def loss(logits):
        return chance @ reinforce_loss(c_logps(logits)[y][:, None], advantage)[:, 0]

    def value(logits):
        logp = c_logps(logits)
        return logp.exp() @ game @ opponent - tau * kl(logp, ref)

    torch.testing.assert_close(c_gradient(loss), -c_gradient(value), rtol=0, atol=1e-14)


def test_the_log_ratio_of_one_token_only_is_not_the_kl():
    """The form that TRL dropped, and how far off it was."""
    log_ratio = c_token_logps(C_LOGITS) - c_token_logps(C_REF_LOGITS)
    law = c_logps(C_LOGITS).exp()
    token_by_token = c_gradient(lambda x: law @ (log_ratio * c_token_logps(x)).sum(1))
    assert_golden(token_by_token[0], f64(0.07804514, -0.07388474, -0.00416040))
    whole = nash_md_advantage(torch.full((1, 9), 0.5).double(), log_ratio.sum(1)[None], tau=1.0)
    exact = c_gradient(lambda x: -law @ (whole[0] * c_logps(x)))
    assert_golden(exact, C_KL_GRADIENT)
    assert_golden((token_by_token - exact).norm() / exact.norm(), 0.48388971)
    cosine = (token_by_token * exact).sum() / token_by_token.norm() / exact.norm()
    assert_golden(cosine, 0.87956475)


@pytest.mark.parametrize("beta", A_NASH)
def test_no_expected_gradient_is_left_at_the_nash_policy(beta):
    nash = nash_policy(beta)
    torch.testing.assert_close(nash.exp(), A_NASH[beta], rtol=0, atol=2e-8)
    bracket = nash_md_advantage(wins(nash)[None], (nash - A_REF)[None], beta)[0]
    assert (bracket - nash.exp() @ bracket).abs().max() < 1e-12
    started = nash_mp_advantage(wins(nash)[None], (nash - A_REF)[None], f64([0.0] * 5), beta, 0.6)
    assert torch.equal(started[0], bracket)


def test_the_tabular_steps_of_nash_md():
    mixed, after = md_step(A_POLICY, 0.05, 0.3)
    assert_golden(mixed.exp(), f64(0.21788182, 0.38875635, 0.09019309, 0.10690630, 0.19626245))
    assert_golden(after.exp(), f64(0.21810490, 0.38820929, 0.08970593, 0.10755431, 0.19642557))
    nash = nash_policy(0.3)
    assert_golden(kl(nash, after), 0.28551220)
    assert_golden((1 - 0.05 * 0.3) * kl(nash, A_POLICY) + 2 * 0.05**2, 0.29453236)
    logp = A_REF
    for _ in range(20_000):
        _, logp = md_step(logp, 0.05, 0.3)
    assert kl(nash, logp).item() == pytest.approx(3.59e-7, abs=1e-9)


# Nash mirror prox


def test_the_steps_of_nash_mp_golden_values():
    half = mirror_step(A_REF, A_REF, 0.3, 0.6)
    full = mirror_step(A_REF, half, 0.3, 0.6)
    assert_golden(half.exp(), f64(0.25031300, 0.12955759, 0.35213664, 0.06139315, 0.20659961))
    assert_golden(full.exp(), f64(0.25036390, 0.13050102, 0.35066195, 0.06297377, 0.20549936))
    nash = nash_policy(0.3)
    assert_golden(kl(nash, A_REF), 0.02013509)
    assert_golden(kl(nash, full), 0.00775718)
    assert_golden(kl(nash, A_REF) / 1.6, 0.01258443)
    logp, ratios = A_REF, []
    for step in range(1, 25):
        logp = mirror_step(logp, mirror_step(logp, logp, 0.3, 0.6), 0.3, 0.6)
        ratios.append(kl(nash, logp) / (1.6**-step * kl(nash, A_REF)))
    assert_golden(max(ratios), 0.61641075)


def exploitability(logp, beta):
    """J(BR, π) − 1/2 with J(p, q) = P(p ≻ q) − β KL(p‖ref) + β KL(q‖ref)."""
    answer = (A_REF + wins(logp) / beta).log_softmax(0)
    payoff = answer.exp() @ wins(logp)
    return payoff - beta * kl(answer, A_REF) + beta * kl(logp, A_REF) - 0.5


def test_nobody_exploits_the_nash_policy():
    assert_golden(exploitability(A_REF, 0.3), 0.00637491)
    half = mirror_step(A_REF, A_REF, 0.3, 0.6)
    assert_golden(exploitability(mirror_step(A_REF, half, 0.3, 0.6), 0.3), 0.00248949)
    assert_golden(exploitability(nash_policy(0.3), 0.3), 0.0)


def test_nash_mp_golden_bracket():
    half = mirror_step(A_REF, A_REF, 0.3, 0.6)
    to_target = (A_POLICY - A_OLD)[None]
    bracket = nash_mp_advantage(wins(half)[None], A_RHO[None], to_target, beta=0.3, eta=0.6)
    expected = f64([-0.19631361, -0.39754115, 0.79321216, 0.30952868, -0.42429164])
    assert_golden(bracket, expected)


def test_the_step_of_nash_mp_is_where_its_bracket_is_flat():
    opponent = mirror_step(A_OLD, A_OLD, 0.3, 0.6)
    stepped = mirror_step(A_OLD, opponent, 0.3, 0.6)
    bracket = nash_mp_advantage(
        wins(opponent)[None], (stepped - A_REF)[None], (stepped - A_OLD)[None], 0.3, 0.6
    )[0]
    assert (bracket - bracket.mean()).abs().max() < 1e-12


def test_an_infinite_step_of_nash_mp_forgets_its_target():
    args = (wins(A_REF)[None], A_RHO[None])
    actual = nash_mp_advantage(*args, (A_POLICY - A_OLD)[None], beta=0.3, eta=math.inf)
    assert torch.equal(actual, nash_md_advantage(*args, tau=0.3))


# INPO

TAU, ETA = 0.1, 0.3


def inpo_differences(logp, tau=TAU, old=A_OLD):
    """h(y, y′) of every pair, `(5, 5)`."""
    return differences(logp - mixed_reference(A_REF, old, tau, ETA))


def binary_inpo(logp, tau=TAU, old=A_OLD):
    loss = labelled(partial(ipo_loss, beta=ETA), inpo_differences(logp, tau, old), A_PREFERENCES)
    return old.exp() @ loss @ old.exp()


def win_rate_inpo(logp):
    gap = inpo_differences(logp) - differences(wins(A_OLD)) / ETA
    return A_OLD.exp() @ gap.square() @ A_OLD.exp()


def test_inpo_golden_pair():
    h = inpo_differences(A_POLICY)[1, 3].view(1, 1)
    assert_golden(h, f64([0.93333333]))
    assert_golden(ipo_loss(h, ETA), f64([0.53777778]))
    written_out = (differences(A_POLICY) - TAU / ETA * differences(A_REF)) - (
        ETA - TAU
    ) / ETA * differences(A_OLD)
    torch.testing.assert_close(inpo_differences(A_POLICY), written_out)


def test_labels_of_pairs_do_what_win_rates_do():
    assert_golden(win_rate_inpo(A_POLICY), 0.76704861)
    assert_golden(binary_inpo(A_POLICY), 3.50340995)
    gradient = a_gradient(binary_inpo)
    torch.testing.assert_close(gradient, a_gradient(win_rate_inpo))
    assert_golden(gradient, f64(0.04868082, 0.83719514, -0.60443124, -0.54454932, 0.26310460))


def test_the_next_iterate_of_inpo_is_its_optimum():
    optimum = (wins(A_OLD) / ETA + mixed_reference(A_REF, A_OLD, TAU, ETA)).log_softmax(0)
    expected = f64(0.23301453, 0.24144805, 0.22290664, 0.21062680, 0.09200398)
    assert_golden(optimum.exp(), expected)
    assert win_rate_inpo(optimum) < 1e-25
    assert a_gradient(binary_inpo, optimum).abs().max() < 1e-12


@pytest.mark.parametrize("tau", [0.0, 0.1, 0.3])
def test_the_first_iteration_of_inpo_is_ipo(tau):
    plain = labelled(partial(ipo_loss, beta=ETA), differences(A_RHO), A_PREFERENCES)
    expected = A_REF.exp() @ plain @ A_REF.exp()
    torch.testing.assert_close(binary_inpo(A_POLICY, tau, old=A_REF), expected)


def test_the_ends_of_the_mixed_reference():
    assert torch.equal(mixed_reference(A_REF, A_OLD, 0.3, 0.3), A_REF)
    assert torch.equal(mixed_reference(A_REF, A_OLD, 0.0, 0.3), A_OLD)


# SPO


def groups_of_three():
    return torch.tensor(list(itertools.product(range(5), repeat=3)))


def judged(groups):
    return A_PREFERENCES[groups[:, :, None], groups[:, None, :]]


def test_spo_golden_of_leave_one_out_is_ours_scaled():
    """RLOO on win rates has G/(G−1) times the advantage above 1/2, which alone is unbiased."""
    rates = win_rates(A_PREFERENCES[None, :3, :3])
    assert_golden(leave_one_out_advantage(rates), f64([0.075, 0.075, -0.150]))
    rates = win_rates(judged(groups_of_three()))
    ours = nash_md_advantage(rates, torch.zeros_like(rates), 0.0)
    torch.testing.assert_close(leave_one_out_advantage(rates), 1.5 * ours)


def test_over_all_groups_win_rates_above_a_half_are_self_play():
    groups = groups_of_three()
    chance, rates = A_POLICY[groups].sum(1).exp(), win_rates(judged(groups))
    advantage = nash_md_advantage(rates, torch.zeros_like(rates), 0.0)
    actual = a_gradient(lambda logp: chance @ reinforce_loss(logp[groups], advantage).mean(1))
    law = A_POLICY.exp()
    self_play = a_gradient(lambda logp: -(law * wins(A_POLICY)) @ logp)
    torch.testing.assert_close(actual, self_play)


# DNO


def all_groups_dno(logp, eta=0.2):
    """Expectation over pairs of samples of π_old, a group of two at a time."""
    groups = torch.tensor(list(itertools.product(range(5), repeat=2)))
    loss = dno_loss(wins(A_OLD)[groups], (logp - A_OLD)[groups], eta)
    return A_OLD[groups].sum(1).exp() @ loss


def test_dno_rests_at_its_optimum():
    optimum = (A_OLD + wins(A_OLD) / 0.2).log_softmax(0)
    expected = f64(0.18177696, 0.28603401, 0.14638773, 0.33071632, 0.05508498)
    assert_golden(optimum.exp(), expected)
    assert a_gradient(all_groups_dno, optimum).abs().max() < 1e-15
    assert_golden(all_groups_dno(optimum), 0.69268171)
    assert_golden(all_groups_dno(A_POLICY), 0.69773949)
    expected = f64(0.00100966, 0.00320106, -0.00129037, -0.00498652, 0.00206618)
    assert_golden(a_gradient(all_groups_dno), expected)


def test_dno_is_the_mean_over_ordered_pairs():
    win, log_ratio = wins(A_OLD)[None], (A_POLICY - A_OLD)[None]
    terms = []
    for i, j in itertools.permutations(range(5), 2):
        label = torch.sigmoid(win[0, i] - win[0, j])
        margin = 0.2 * (log_ratio[0, i] - log_ratio[0, j])
        terms.append(-label * margin.sigmoid().log() - (1 - label) * (-margin).sigmoid().log())
    torch.testing.assert_close(dno_loss(win, log_ratio, 0.2), torch.stack(terms).mean()[None])


def test_dno_with_hard_labels_is_dpo_against_the_last_iterate():
    margin = (0.2 * ((A_POLICY - A_OLD)[1] - (A_POLICY - A_OLD)[3])).view(1, 1)
    assert_golden(sigmoid_loss(margin), f64([0.58918502]))


def test_dno_leaves_out_what_was_not_judged():
    win, log_ratio = f64([0.9, NAN, 0.2, 0.4], [NAN, 0.3, NAN, NAN]), torch.randn(2, 4).double()
    leaf = log_ratio.clone().requires_grad_()
    loss = dno_loss(win, leaf, 0.5)
    kept = [0, 2, 3]
    torch.testing.assert_close(loss[:1], dno_loss(win[:1, kept], log_ratio[:1, kept], 0.5))
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    assert loss[1] == 0 and (gradient[0, kept] != 0).all()
    assert gradient[0, 1] == 0 and (gradient[1] == 0).all()


def test_order_of_the_group_does_not_matter_to_dno():
    win, log_ratio = torch.rand(2, 3, 5, generator=torch.Generator().manual_seed(0)).double()
    order = [3, 1, 4, 0, 2]
    torch.testing.assert_close(
        dno_loss(win[:, order], log_ratio[:, order], 0.5), dno_loss(win, log_ratio, 0.5)
    )


# All of them


def test_advantages_are_held_fixed_and_finite():
    win, log_ratio = f64([0.7, NAN]), f64([0.2, -0.1]).requires_grad_()
    for advantage in (
        nash_md_advantage(win, log_ratio, 0.1),
        nash_mp_advantage(win, log_ratio, log_ratio, 0.1, 0.2),
    ):
        assert not advantage.requires_grad and advantage[0, 1] == 0 and advantage[0, 0] != 0
    win = f64([0.7, 0.3]).requires_grad_()
    dno_loss(win, log_ratio, 0.1).sum().backward()
    assert win.grad is None and log_ratio.grad.isfinite().all()


@pytest.mark.parametrize(
    "call",
    [
        lambda x, y: nash_md_advantage(x, y, 0.1),
        lambda x, y: nash_md_advantage(y, y, 0.1),
        lambda x, y: nash_md_advantage(x, x, -0.1),
        lambda x, y: nash_mp_advantage(x, x, y, 0.1, 0.2),
        lambda x, y: nash_mp_advantage(x, x, x, 0.1, 0.0),
        lambda x, y: mixed_reference(x, y, 0.1, 0.2),
        lambda x, y: mixed_reference(x, x, 0.3, 0.2),
        lambda x, y: dno_loss(x, y, 0.1),
        lambda x, y: geometric_mixture(x, y, 0.1),
        lambda x, y: geometric_mixture(x, x, 1.1),
    ],
)
def test_refuses_what_it_cannot_mean(call):
    with pytest.raises(AssertionError):
        call(torch.zeros(2, 3), torch.zeros(3))
