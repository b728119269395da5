import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.objectives.enumeration import (
    REWARDS,
    best,
    brute_force_credit,
    expected_gradient,
    objective_gradient,
    subsets,
    table,
)
from trl_ext.objectives.pkpo import max_at_k, pkpo_credit, weigh_gaps

GIVEN = table([0.1, 0.7, 0.7, 0.2, 0.9])
# Continuous rewards, and a coarse grid on which ties are the rule.
rewards = st.one_of(
    st.lists(st.floats(-2, 2), min_size=2, max_size=6),
    st.lists(st.sampled_from([0.0, 0.3, 1.0]), min_size=2, max_size=6),
)
exhaustive = settings(max_examples=40, deadline=None, derandomize=True)


def ranges(n):
    """Every (baseline, k) that is defined for n samples."""
    yield from (("none", k) for k in range(1, n + 1))
    yield from (("loo", k) for k in range(1, n))
    yield from (("loo_minus_one", k) for k in range(2, n + 1))


@pytest.mark.parametrize(
    ("k", "baseline", "expected"),
    [
        (2, "none", [0.25, 0.3, 0.3, 0.25, 0.36]),
        (2, "loo", [-0.15, -0.35 / 6, -0.35 / 6, -0.15, 0.31 / 6]),
        (2, "loo_minus_one", [0, 0.11, 0.11, 0.01, 0.19]),
        (3, "none", [0.48, 0.48, 0.48, 0.48, 0.54]),
        (3, "loo", [-0.1575, -0.1575, -0.1575, -0.1575, 0.015]),
        (3, "loo_minus_one", [0, 0.05, 0.05, 0, 0.17]),
    ],
)
def test_golden_values(k, baseline, expected):
    torch.testing.assert_close(pkpo_credit(GIVEN, k, baseline), 5 * table(expected))


@exhaustive
@given(rewards)
def test_identities(values):
    r, n = table(values), len(values)
    for k in range(1, n + 1):
        rho, s = max_at_k(r, k), pkpo_credit(r, k) / n
        torch.testing.assert_close(s.sum(1), k * rho)
        others = torch.cat([r[:, torch.arange(n) != i] for i in range(n)])
        if k < n:
            rho_others = max_at_k(others, k)
            torch.testing.assert_close(rho_others.mean(0, keepdim=True), rho)
            loo = s - k / (n - 1) * rho_others
            torch.testing.assert_close(pkpo_credit(r, k, "loo"), n * loo)
        if k > 1:
            loo_minus_one = s - k / n * max_at_k(others, k - 1)
            torch.testing.assert_close(pkpo_credit(r, k, "loo_minus_one"), n * loo_minus_one)


@exhaustive
@given(rewards)
def test_equals_the_enumeration_of_subsets(values):
    n = len(values)

    def top(subset):
        return max(values[j] for j in subset)

    def gain(subset, i):
        return top(subset) - top([j for j in subset if j != i])

    for k in range(1, n + 1):
        rho = sum(map(top, subsets(n, k))) / math.comb(n, k)
        torch.testing.assert_close(max_at_k(table(values), k), table([rho])[0])
        s = brute_force_credit(lambda subset, _: top(subset), n, k)
        torch.testing.assert_close(pkpo_credit(table(values), k), table(s))
        if k > 1:
            expected = table(brute_force_credit(gain, n, k))
            torch.testing.assert_close(pkpo_credit(table(values), k, "loo_minus_one"), expected)


@pytest.mark.parametrize("c", range(8))
@pytest.mark.parametrize("k", range(1, 8))
def test_binary_rewards_have_the_papers_closed_form(c, k):
    n = 7
    r = table([1.0] * c + [0.0] * (n - c))

    def rho(n, c, k):
        return 1 - math.comb(n - c, k) / math.comb(n, k)

    torch.testing.assert_close(max_at_k(r, k), table([rho(n, c, k)])[0])
    wrong = k / n * rho(n - 1, c, k - 1) if c < n else 0.0
    expected = table([k / n] * c + [wrong] * (n - c))
    torch.testing.assert_close(pkpo_credit(r, k), n * expected)


@pytest.mark.parametrize(("n", "k"), [(4, 2), (4, 3), (5, 2)])
@pytest.mark.parametrize("baseline", ["none", "loo", "loo_minus_one"])
def test_expected_gradient_is_that_of_the_objective(n, k, baseline):
    gradient = expected_gradient(lambda y: pkpo_credit(REWARDS[y], k, baseline), n)
    torch.testing.assert_close(gradient, objective_gradient(best, k), rtol=0, atol=1e-13)


@pytest.mark.parametrize(("n", "k"), [(4, 2), (4, 3), (4, 4), (5, 2)])
def test_what_mean_centring_makes_of_it(n, k):
    def centred(baseline):
        def credit(y):
            s = pkpo_credit(REWARDS[y], k, baseline)
            return s - s.mean(1, keepdim=True)

        return expected_gradient(credit, n)

    of_k, of_fewer = objective_gradient(best, k), objective_gradient(best, k - 1)
    torch.testing.assert_close(centred("none"), (1 - k / n) * of_k, rtol=0, atol=1e-13)
    mixture = (1 - k / n) * of_k + k / n * of_fewer
    torch.testing.assert_close(centred("loo_minus_one"), mixture, rtol=0, atol=1e-13)


@pytest.mark.parametrize("value", [0.0, 0.3, 1 / 3, 1.0, -2.7])
@pytest.mark.parametrize(("n", "k"), [(2, 2), (7, 3), (16, 8), (64, 32), (64, 64)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_equal_rewards_are_exact(value, n, k, dtype):
    r = torch.full((2, n), value, dtype=dtype)
    assert torch.equal(max_at_k(r, k), r[:, 0])
    assert torch.equal(pkpo_credit(r, k), k * r)
    assert torch.equal(pkpo_credit(r, k, "loo_minus_one"), torch.zeros_like(r))
    if k < n:
        torch.testing.assert_close(pkpo_credit(r, k, "loo"), -k / (n - 1) * r)
        assert torch.equal(pkpo_credit(0 * r, k, "loo"), torch.zeros_like(r))


def test_permuting_a_group_permutes_its_credit():
    order = torch.randperm(5, generator=torch.Generator().manual_seed(3))
    for baseline, k in ranges(5):
        permuted = pkpo_credit(GIVEN[:, order], k, baseline)
        torch.testing.assert_close(permuted, pkpo_credit(GIVEN, k, baseline)[:, order])


def test_tied_samples_get_the_same_credit_exactly():
    r = table([0.3, 0.7, 0.1, 0.7, 0.3, 0.7, 0.9])
    for baseline, k in ranges(7):
        credit = pkpo_credit(r, k, baseline)[0]
        assert credit[[1, 3, 5]].unique().numel() == credit[[0, 4]].unique().numel() == 1


def test_groups_do_not_see_each_other():
    r = torch.rand(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for baseline, k in ranges(6):
        apart = torch.cat([pkpo_credit(row[None], k, baseline) for row in r])
        torch.testing.assert_close(pkpo_credit(r, k, baseline), apart)


def test_large_groups_match_rational_arithmetic():
    n, k = 64, 32
    r = torch.rand(1, n, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    ranked = [Fraction(value) for value in sorted(r[0].tolist())]
    terms = [math.comb(i - 1, k - 1) * ranked[i - 1] for i in range(k, n + 1)]
    expected = table([float(sum(terms) / math.comb(n, k))])[0]
    torch.testing.assert_close(max_at_k(r, k), expected, rtol=1e-14, atol=0)
    torch.testing.assert_close(pkpo_credit(r, k).mean(1), k * expected, rtol=1e-14, atol=0)


def test_binomials_beyond_float64_stay_finite():
    r = torch.linspace(0, 1, 1200, dtype=torch.float64)[None]
    for baseline in ("none", "loo", "loo_minus_one"):
        assert pkpo_credit(r, 600, baseline).isfinite().all()


def test_no_gradient_flows_and_the_dtype_stays():
    r = GIVEN.float().requires_grad_()
    for baseline, k in ranges(5):
        credit = pkpo_credit(r, k, baseline)
        assert not credit.requires_grad and credit.dtype == torch.float32
    assert not max_at_k(r, 2).requires_grad


@pytest.mark.parametrize(
    ("k", "baseline"), [(0, "none"), (6, "none"), (5, "loo"), (1, "loo_minus_one")]
)
def test_refuses_k_outside_its_range(k, baseline):
    with pytest.raises(AssertionError, match="outside"):
        pkpo_credit(GIVEN, k, baseline)


@pytest.mark.parametrize("bad", [torch.zeros(4), torch.zeros(2, 4, dtype=torch.long)])
def test_refuses_other_tables(bad):
    with pytest.raises(AssertionError):
        max_at_k(bad, 1)
    with pytest.raises(AssertionError):
        weigh_gaps(bad, [0.0] * 3, [0.0] * 3)
