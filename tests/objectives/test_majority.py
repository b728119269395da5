import itertools
import math
from statistics import fmean

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.objectives.enumeration import (
    REWARDS,
    brute_force_credit,
    expected_gradient,
    objective_gradient,
    subsets,
    table,
)
from trl_ext.objectives.baselines import leave_one_out
from trl_ext.objectives.majority import majority_at_k, majority_credit

RULES = ["null", "exclude"]
# Rewards that differ between voters of one answer, and rewards that follow the answer.
samples = st.one_of(
    st.lists(st.tuples(st.floats(-2, 2), st.integers(-1, 2)), min_size=2, max_size=6),
    st.lists(st.sampled_from([(1.0, 0), (0.3, 1), (0.0, 2), (0.7, -1)]), min_size=2, max_size=6),
)
exhaustive = settings(max_examples=60, deadline=None, derandomize=True)


def vote(rewards, labels, unparsable):
    """f(I) by its definition, over Python lists."""
    ballots = [(0.0 if a == -1 else r, a) for r, a in zip(rewards, labels, strict=True)]
    if unparsable == "exclude":
        ballots = [(r, a) for r, a in ballots if a != -1]
    if not ballots:
        return 0.0
    answers = [a for _, a in ballots]
    tied = {a for a in answers if answers.count(a) == max(map(answers.count, answers))}
    return fmean(fmean(r for r, a in ballots if a == answer) for answer in tied)


def group(values):
    rewards, labels = zip(*values, strict=True)
    return table(list(rewards)), torch.tensor([labels]), rewards, labels


def random_group(G, answers, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(-1, answers, (1, G), generator=generator)
    return torch.rand(1, G, dtype=torch.float64, generator=generator), labels


@exhaustive
@given(samples, st.sampled_from(RULES))
def test_equals_the_enumeration_of_subsets(values, rule):
    r, a, rewards, labels = group(values)
    n = len(values)

    def worth(subset):
        return vote([rewards[j] for j in subset], [labels[j] for j in subset], rule)

    def gain(subset, i):
        return worth(subset) - worth([j for j in subset if j != i])

    for k in range(1, n + 1):
        expected = sum(map(worth, subsets(n, k))) / math.comb(n, k)
        torch.testing.assert_close(majority_at_k(r, a, k, rule), table([expected])[0])
        if k > 1:
            expected = table(brute_force_credit(gain, n, k))
            torch.testing.assert_close(majority_credit(r, a, k, rule), expected)


@pytest.mark.parametrize("G", [2, 5, 64])
def test_a_vote_of_two_is_leave_one_out(G):
    r, a = random_group(G, 4)
    scored = r.masked_fill(a == -1, 0.0)
    torch.testing.assert_close(majority_credit(r, a, 2), scored - leave_one_out(scored))


@pytest.mark.parametrize("rule", RULES)
def test_a_vote_of_one_is_worth_the_mean_reward(rule):
    r, a = random_group(9, 3)
    mean = r.masked_fill(a == -1, 0.0).mean(1)
    torch.testing.assert_close(majority_at_k(r, a, 1, rule), mean)


@pytest.mark.parametrize("k", [2, 7, 32, 64])
def test_if_all_answers_differ_it_is_leave_one_out(k):
    r, _ = random_group(64, 4)
    labels = torch.randperm(64)[None]
    torch.testing.assert_close(majority_credit(r, labels, k), r - leave_one_out(r))


@pytest.mark.parametrize("k", [1, 5, 32, 63, 64])
def test_two_answers_follow_the_hypergeometric_law(k):
    n, c = 64, 29
    ways = [math.comb(c, u) * math.comb(n - c, k - u) for u in range(k + 1)]
    wins = sum(w for u, w in enumerate(ways) if 2 * u > k)
    ties = ways[k // 2] if k % 2 == 0 else 0
    labels = torch.tensor([[1] * c + [0] * (n - c)])
    expected = table([(wins + ties / 2) / math.comb(n, k)])[0]
    torch.testing.assert_close(majority_at_k(labels.double(), labels, k), expected)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("G", "k", "answers"), [(9, 4, 3), (64, 32, 3), (64, 32, 20), (150, 75, 2)]
)
def test_credit_follows_from_values_of_smaller_groups(G, k, answers, rule):
    # Split the k-subsets by whether i is in: C(G,k) V = Σ_{I∋i} f(I) + C(G−1,k) V_{k}(others)
    r, a = random_group(G, answers)
    rows = [torch.arange(G) != i for i in range(G)]
    others = torch.cat([r[:, row] for row in rows]), torch.cat([a[:, row] for row in rows])
    credit = G * majority_at_k(r, a, k, rule) - k * majority_at_k(*others, k - 1, rule)
    credit = credit - (G - k) * majority_at_k(*others, k, rule)
    torch.testing.assert_close(majority_credit(r, a, k, rule)[0], credit, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("answers", [[0, 1, 2, 3], [0, 1, 1, -1], [-1, 0, -1, 1]])
@pytest.mark.parametrize(("n", "k"), [(2, 2), (3, 3), (4, 2), (4, 3), (4, 4), (5, 2)])
def test_expected_gradient_is_that_of_the_objective(n, k, answers, rule):
    labels = torch.tensor(answers)

    def worth(y):
        votes = zip(REWARDS[y].tolist(), labels[y].tolist(), strict=True)
        return torch.tensor([vote(*ballot, rule) for ballot in votes], dtype=torch.float64)

    gradient = expected_gradient(lambda y: majority_credit(REWARDS[y], labels[y], k, rule), n)
    torch.testing.assert_close(gradient, objective_gradient(worth, k), rtol=0, atol=1e-13)


def test_the_two_rules_for_unparsable_answers_differ():
    # all three vote: null has two of three votes; without them the one answer wins
    r, a = table([1.0, 1.0, 1.0]), torch.tensor([[-1, 0, -1]])
    assert majority_at_k(r, a, 3, "null").item() == 0.0
    assert majority_at_k(r, a, 3, "exclude").item() == 1.0
    # only the voter can change an empty vote: 3 · (1 − 0)
    assert majority_credit(r, a, 3, "exclude").tolist() == [[0.0, 3.0, 0.0]]


@pytest.mark.parametrize("value", [0.3, 1 / 3, 1.0, -2.7])
@pytest.mark.parametrize(("G", "k"), [(2, 2), (7, 3), (64, 32), (64, 64)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_group_without_signal_gets_exactly_zero(value, G, k, dtype):
    labels = torch.randint(0, 5, (3, G), generator=torch.Generator().manual_seed(0))
    labels[1], labels[2] = 0, torch.arange(G)
    r = torch.full((3, G), value, dtype=dtype)
    for rule in RULES:
        assert torch.equal(majority_credit(r, labels, k, rule), torch.zeros_like(r))
        assert torch.equal(majority_at_k(r, labels, k, rule), r[:, 0])
        unparsed = torch.full_like(labels, -1)
        assert torch.equal(majority_credit(r, unparsed, k, rule), torch.zeros_like(r))
        assert torch.equal(majority_at_k(r, unparsed, k, rule), torch.zeros_like(r[:, 0]))


def test_a_vote_that_can_turn_nothing_gets_exactly_zero():
    # 5 of 6 for answer 0: in every subset of 4 its lead is at least 2 votes
    credit = majority_credit(
        table([0.3, 0.3, 0.3, 0.3, 0.3, 1.0]), torch.tensor([[7] * 5 + [2]]), 4
    )
    assert torch.equal(credit, torch.zeros(1, 6, dtype=torch.float64))


def test_ties_do_not_depend_on_the_order():
    r, a = table([1.0, 0.0, 1.0, 0.0]), torch.tensor([[0, 1, 0, 1]])
    for order in itertools.permutations(range(4)):
        assert majority_at_k(r[:, order], a[:, order], 4).item() == 0.5
        credit = majority_credit(r[:, order], a[:, order], 4)
        # a vote for the right answer lifts 0 to 1/2, one for the wrong answer lowers 1 to 1/2
        torch.testing.assert_close(credit, table([2.0, -2.0, 2.0, -2.0])[:, order])


@pytest.mark.parametrize("rule", RULES)
def test_permuting_samples_permutes_credit_and_renaming_answers_changes_nothing(rule):
    r, a = random_group(12, 4)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(3))
    credit = majority_credit(r, a, 5, rule)
    permuted = majority_credit(r[:, order], a[:, order], 5, rule)
    torch.testing.assert_close(permuted, credit[:, order])
    renamed = torch.tensor([40, 11, 0, 95, -1])[a]
    torch.testing.assert_close(majority_credit(r, renamed, 5, rule), credit)


def test_no_gradient_flows_and_the_dtype_stays():
    r, a = torch.rand(2, 5, requires_grad=True), torch.tensor([[0, 1, 0, -1, 1]] * 2)
    for result in (majority_credit(r, a, 3), majority_at_k(r, a, 3)):
        assert not result.requires_grad and result.dtype == torch.float32


@pytest.mark.parametrize(
    ("rewards", "labels", "k", "rule"),
    [
        (torch.rand(1, 4), torch.zeros(1, 4).long(), 1, "null"),
        (torch.rand(1, 4), torch.zeros(1, 4).long(), 5, "null"),
        (torch.rand(1, 4), torch.zeros(1, 3).long(), 2, "null"),
        (torch.rand(1, 4), torch.zeros(1, 4), 2, "null"),
        (torch.rand(4), torch.zeros(4).long(), 2, "null"),
        (torch.rand(1, 4), torch.zeros(1, 4).long(), 2, "first"),
    ],
)
def test_refuses_bad_arguments(rewards, labels, k, rule):
    with pytest.raises(AssertionError):
        majority_credit(rewards, labels, k, rule)
