"""Pair rules: who meets whom, who won, and what a tie is worth."""

import itertools
import math

import pytest
import torch

from tests.objectives.fixtures import A_OLD, A_PREFERENCES, assert_golden, f64
from trl_ext.objectives.pair_rules import (
    all_pairs,
    best_worst,
    consistent,
    debiased,
    first_two,
    missing_eos,
    win_rates,
)

NAN = math.nan
RULES = [best_worst, first_two, all_pairs]
TRUNCATED = torch.tensor([[True, False, True]])


def random_preferences(P, G, seed=0):
    above = torch.rand(P, G, G, generator=torch.Generator().manual_seed(seed)).double().triu(1)
    return above + (1 - above).transpose(1, 2).tril(-1) + torch.eye(G) / 2


def winners(pairs):
    """Weight of each (chosen, rejected) of each prompt that has one."""
    rows = zip(pairs.chosen_PN, pairs.rejected_PN, pairs.weight_PN, strict=True)
    return [
        {
            (winner, loser): share
            for winner, loser, share in zip(*(x.tolist() for x in row), strict=True)
            if share > 0
        }
        for row in rows
    ]


def test_best_meets_worst():
    scores = f64([0.2, 1.0, -1.0, 0.5], [1.0, NAN, 3.0, NAN], [0.0, 1.0, 1.0, 0.0])
    assert winners(best_worst(scores)) == [{(1, 2): 1.0}, {(2, 0): 1.0}, {(1, 0): 1.0}]


def test_the_first_two_meet():
    scores = f64([0.2, 1.0, -9.0], [1.0, 0.5, 9.0], [NAN, 1.0, 2.0], [1.0, 1.0, 0.0])
    assert winners(first_two(scores)) == [{(1, 0): 1.0}, {(0, 1): 1.0}, {}, {}]


def test_all_meet_and_share_a_weight_of_1():
    scores = f64([3.0, 1.0, 2.0], [1.0, 1.0, 2.0], [NAN, 1.0, 2.0], [NAN, NAN, 2.0])
    third = f64(1 / 3).item()
    assert winners(all_pairs(scores)) == [
        {(0, 1): third, (0, 2): third, (2, 1): third},
        {(2, 0): 0.5, (2, 1): 0.5},
        {(2, 1): 1.0},
        {},
    ]


@pytest.mark.parametrize("rule", RULES)
def test_two_samples_make_one_pair_under_every_rule(rule):
    scores = torch.randn(50, 2, generator=torch.Generator().manual_seed(0))
    pairs = rule(scores)
    # What TRL's Online DPO does away from ties: the first wins if its score is at least as large.
    first_wins = scores[:, :1] >= scores[:, 1:]
    assert torch.equal(pairs.chosen_PN, (~first_wins).long())
    assert torch.equal(pairs.rejected_PN, first_wins.long())
    assert (pairs.weight_PN == 1).all() and (pairs.label_PN == 1).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [0.3, 0.0, -7.7, NAN])
@pytest.mark.parametrize("rule", RULES)
def test_a_silent_group_weighs_exactly_0(rule, value, dtype):
    pairs = rule(torch.full((2, 4), value, dtype=dtype))
    assert torch.equal(pairs.weight_PN, torch.zeros_like(pairs.weight_PN))
    assert (pairs.chosen_PN != pairs.rejected_PN).all() and (pairs.label_PN == 0.5).all()
    assert pairs.weight_PN.dtype == dtype
    assert pairs.chosen_PN[:, 0].tolist() == [0, 0] and pairs.rejected_PN[:, 0].tolist() == [1, 1]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("scorable", list(itertools.product([True, False], repeat=3)))
def test_no_pair_holds_an_unscorable_completion(rule, scorable):
    scores = f64([-3.0, -1.0, -2.0]).masked_fill(~torch.tensor([scorable]), NAN)
    pairs = rule(scores)
    for position in (pairs.chosen_PN, pairs.rejected_PN):
        assert ((pairs.weight_PN == 0) | ~scores.gather(1, position).isnan()).all()
    assert pairs.weight_PN.isfinite().all() and pairs.label_PN.isfinite().all()
    at_hand = scorable[:2] if rule is first_two else scorable
    assert pairs.weight_PN.sum().item() == pytest.approx(1.0 if sum(at_hand) >= 2 else 0.0)


@pytest.mark.parametrize("rule", [best_worst, all_pairs])
def test_permuting_a_group_permutes_its_pairs(rule):
    scores = f64([0.2, NAN, -1.0, 0.5, 0.9])
    expected = winners(rule(scores))[0]
    for order in itertools.permutations(range(5)):
        moved = winners(rule(scores[:, list(order)]))[0]
        assert {(order[i], order[j]): share for (i, j), share in moved.items()} == expected


def test_preferences_decide_the_pair_and_scores_only_pick_it():
    scores = f64([0.9, 0.5, 0.1])
    table = f64([0.5, 0.6, 0.3], [0.4, 0.5, 0.8], [0.7, 0.2, 0.5]).unsqueeze(0)
    pairs = best_worst(scores, preferences_PGG=table)
    assert winners(pairs) == [{(2, 0): 1.0}] and pairs.label_PN.tolist() == [[0.7]]
    pairs = first_two(-scores, preferences_PGG=table)
    assert winners(pairs) == [{(0, 1): 1.0}] and pairs.label_PN.tolist() == [[0.6]]
    pairs = all_pairs(scores * NAN, preferences_PGG=table)
    assert winners(pairs)[0].keys() == {(0, 1), (2, 0), (1, 2)}
    assert pairs.label_PN.tolist() == [[0.6, 0.7, 0.8]]


def test_undecided_and_missing_preferences_are_ties():
    table = random_preferences(1, 3)
    table[0, 0, 1] = table[0, 1, 0] = 0.5
    table[0, 0, 2] = table[0, 2, 0] = NAN
    pairs = all_pairs(torch.zeros(1, 3).double(), preferences_PGG=table)
    assert pairs.weight_PN.tolist() == [[0.0, 0.0, 1.0]]
    assert pairs.label_PN[0, :2].tolist() == [0.5, 0.5] and pairs.label_PN[0, 2] > 0.5


def test_equal_win_rates_leave_best_and_worst_undefined():
    circle = f64([0.5, 0.75, 0.25], [0.25, 0.5, 0.75], [0.75, 0.25, 0.5]).unsqueeze(0)
    rates = win_rates(circle)
    assert rates.tolist() == [[0.5, 0.5, 0.5]]
    pairs = best_worst(rates, preferences_PGG=circle)
    assert pairs.weight_PN.item() == 0 and pairs.label_PN.item() == 0.5
    assert (pairs.chosen_PN.item(), pairs.rejected_PN.item()) == (0, 1)


def test_hard_preferences_are_scores():
    scores = f64([0.2, 1.0, -1.0, 0.5])
    table = (0.5 + (scores[:, :, None] - scores[:, None, :]).sign() / 2).double()
    for rule in RULES:
        by_score, by_judge = rule(scores), rule(win_rates(table), preferences_PGG=table)
        for name in ("chosen_PN", "rejected_PN", "weight_PN", "label_PN"):
            assert torch.equal(getattr(by_score, name), getattr(by_judge, name))


def test_win_rates_sum_to_half_the_group():
    rates = win_rates(random_preferences(20, 5))
    torch.testing.assert_close(rates.sum(1), torch.full((20,), 2.5, dtype=torch.float64))
    assert_golden(win_rates(A_PREFERENCES[None, :3, :3]), f64([0.55, 0.55, 0.40]))


def test_win_rates_estimate_the_win_rate_against_the_policy():
    groups = torch.tensor([(2, i, j) for i in range(5) for j in range(5)])
    chance = A_OLD[groups[:, 1:]].sum(1).exp()
    rates = win_rates(A_PREFERENCES[groups[:, :, None], groups[:, None, :]])
    assert_golden(chance @ rates[:, 0], 0.44650033)


def test_win_rates_skip_what_was_not_judged():
    table = random_preferences(1, 3)
    table[0, 0, 1] = table[0, 1, 0] = NAN
    rates = win_rates(table)
    assert rates[0, :2].tolist() == table[0, :2, 2].tolist()
    assert rates[0, 2] == table[0, 2, :2].mean()
    table[0, 0, 2] = table[0, 2, 0] = NAN
    assert win_rates(table).isnan().tolist() == [[True, False, False]]


def test_debiasing_removes_the_taste_for_a_position():
    both = f64([0.3, 0.9, 1 / 3])
    assert torch.equal(debiased(both, both), torch.full_like(both, 0.5))
    unbiased, taste = f64([0.3, 0.8, 0.5]), 0.15
    torch.testing.assert_close(debiased(unbiased + taste, 1 - unbiased + taste), unbiased)
    first, second = torch.rand(2, 1, 99, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(debiased(first, second) + debiased(second, first), torch.ones(1, 99))
    assert torch.equal((debiased(first, second) - 0.5).sign(), (first - second).sign())
    assert debiased(f64([NAN, 0.5]), f64([0.5, NAN])).isnan().all()


def test_consistent_orders_name_one_winner():
    first = f64([0.7, 0.7, 0.2, 0.2, 0.5, 0.5, NAN, 0.5, NAN])
    second = f64([0.4, 0.6, 0.9, 0.3, 0.5, 0.4, 0.5, NAN, NAN])
    expected = [[True, False, True, False, True, False, False, False, False]]
    assert consistent(first, second).tolist() == expected


def test_missing_eos():
    rewards = f64([1.0, 2.0, NAN])
    assert missing_eos(rewards, TRUNCATED, "none", 5.0)[0, :2].tolist() == [1.0, 2.0]
    assert missing_eos(rewards, TRUNCATED, "subtract", 5.0)[0, :2].tolist() == [-4.0, 2.0]
    assert missing_eos(rewards, TRUNCATED, "replace", -1.0)[0, :2].tolist() == [-1.0, 2.0]
    for rule in ("none", "subtract", "replace"):
        assert missing_eos(rewards, TRUNCATED, rule, 1.0).isnan().tolist() == [[False, False, True]]
    assert rewards[0, :2].tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    "call",
    [
        lambda: best_worst(torch.zeros(3)),
        lambda: first_two(torch.zeros(3, 1)),
        lambda: all_pairs(torch.zeros(3, 2, dtype=torch.long)),
        lambda: all_pairs(torch.zeros(3, 2), preferences_PGG=torch.zeros(3, 2)),
        lambda: win_rates(torch.zeros(3, 2)),
        lambda: win_rates(torch.zeros(3, 1, 1)),
        lambda: debiased(torch.zeros(2, 1), torch.zeros(2, 2)),
        lambda: missing_eos(torch.zeros(1, 3), TRUNCATED, "drop", 0.0),
        lambda: missing_eos(torch.zeros(1, 3), TRUNCATED.long(), "none", 0.0),
    ],
)
def test_refuses_what_it_cannot_mean(call):
    with pytest.raises(AssertionError):
        call()
