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
    table,
)
from trl_ext.objectives.baselines import leave_one_out
from trl_ext.objectives.pass_at_k import centred_pass_at_k_credit, pass_at_k_credit
from trl_ext.objectives.pkpo import max_at_k, pkpo_credit

ESTIMATORS = [pass_at_k_credit, centred_pass_at_k_credit]
rewards = st.one_of(
    st.lists(st.floats(-2, 2), min_size=2, max_size=6),
    st.lists(st.sampled_from([0.0, 0.3, 1.0]), min_size=2, max_size=6),
)
exhaustive = settings(max_examples=40, deadline=None, derandomize=True)


@exhaustive
@given(rewards)
def test_k_of_one_and_centred_k_of_two_are_leave_one_out(values):
    r = table(values)
    expected = r - leave_one_out(r)
    torch.testing.assert_close(pass_at_k_credit(r, 1), expected)
    torch.testing.assert_close(centred_pass_at_k_credit(r, 2), expected)


@exhaustive
@given(rewards)
def test_k_of_G_is_the_lead_of_the_single_best(values):
    r, n = table(values), len(values)
    without = table([max(values[:i] + values[i + 1 :]) for i in range(n)])
    torch.testing.assert_close(pass_at_k_credit(r, n), n * (r.amax(1, keepdim=True) - without))


@exhaustive
@given(rewards)
def test_equals_the_enumeration_of_subsets(values):
    n = len(values)

    def gain(subset, i):
        rest = [values[j] for j in subset if j != i]
        return max(values[j] for j in subset) - max(rest)

    def centred_gain(subset, i):
        return gain(subset, i) - sum(gain(subset, j) for j in subset) / len(subset)

    for k in range(2, n + 1):
        expected = brute_force_credit(gain, n, k)
        torch.testing.assert_close(pass_at_k_credit(table(values), k), table(expected))
        expected = brute_force_credit(centred_gain, n, k)
        torch.testing.assert_close(centred_pass_at_k_credit(table(values), k), table(expected))


@exhaustive
@given(rewards)
def test_centred_credit_sums_to_zero(values):
    for k in range(2, len(values) + 1):
        total = centred_pass_at_k_credit(table(values), k).sum(1)
        torch.testing.assert_close(total, torch.zeros_like(total), rtol=0, atol=1e-13)


@pytest.mark.parametrize(("n", "k"), [(2, 2), (3, 3), (4, 4), (4, 2), (4, 3), (5, 2)])
def test_expected_gradient_is_that_of_the_objective(n, k):
    gradient = expected_gradient(lambda y: pass_at_k_credit(REWARDS[y], k), n)
    torch.testing.assert_close(gradient, objective_gradient(best, k), rtol=0, atol=1e-13)


@pytest.mark.parametrize(("n", "k"), [(2, 2), (3, 3), (4, 4), (4, 2), (4, 3), (5, 2)])
def test_centring_ascends_the_objective_of_one_sample_less(n, k):
    gradient = expected_gradient(lambda y: centred_pass_at_k_credit(REWARDS[y], k), n)
    torch.testing.assert_close(gradient, objective_gradient(best, k - 1), rtol=0, atol=1e-13)


@pytest.mark.parametrize(("n", "k"), [(4, 1), (4, 2), (4, 3), (5, 2)])
def test_the_other_centred_form_is_exact_too(n, k):
    def credit(y):
        s = pkpo_credit(REWARDS[y], k)
        return n / (n - k) * (s - s.mean(1, keepdim=True))

    gradient = expected_gradient(credit, n)
    torch.testing.assert_close(gradient, objective_gradient(best, k), rtol=0, atol=1e-13)


def test_only_a_lead_is_credited():
    # 2 of 3: A = 3/3 · Σ over the two pairs with i of its lead: (0.7) + (0.2), (0.5), nothing
    r = table([0.9, 0.7, 0.2])
    torch.testing.assert_close(pass_at_k_credit(r, 2), table([0.9, 0.5, 0.0]))
    assert pass_at_k_credit(r, 3).count_nonzero() == 1
    assert pass_at_k_credit(table([1.0, 1.0, 0.0]), 3).count_nonzero() == 0


@pytest.mark.parametrize("value", [0.0, 0.3, 1 / 3, 1.0, -2.7])
@pytest.mark.parametrize(("n", "k"), [(2, 2), (7, 1), (7, 3), (64, 32), (64, 64)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_group_without_signal_gets_exactly_zero(value, n, k, dtype):
    r = torch.full((2, n), value, dtype=dtype)
    assert torch.equal(pass_at_k_credit(r, k), torch.zeros_like(r))
    if k > 1:
        assert torch.equal(centred_pass_at_k_credit(r, k), torch.zeros_like(r))


@pytest.mark.parametrize("credit", ESTIMATORS)
@pytest.mark.parametrize("k", [2, 3, 6])
def test_permuting_a_group_permutes_its_credit(credit, k):
    r = table([0.1, 0.7, 0.7, 0.2, 0.9, 0.0])
    order = torch.randperm(6, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(credit(r[:, order], k), credit(r, k)[:, order])
    assert credit(r, k)[0, 1] == credit(r, k)[0, 2]


@pytest.mark.parametrize("credit", ESTIMATORS)
def test_no_gradient_flows_and_the_dtype_stays(credit):
    r = torch.rand(2, 5, requires_grad=True)
    for k in (2, 5):
        assert not credit(r, k).requires_grad and credit(r, k).dtype == torch.float32
    assert not pass_at_k_credit(r, 1).requires_grad


@pytest.mark.parametrize(("credit", "k"), [(pass_at_k_credit, 0), (centred_pass_at_k_credit, 1)])
def test_refuses_k_outside_its_range(credit, k):
    with pytest.raises(AssertionError):
        credit(torch.rand(2, 4), k)
    with pytest.raises(AssertionError):
        credit(torch.rand(2, 4), 5)


def test_large_groups_are_stable():
    r = torch.rand(3, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    # s = s^(loo-1) + k/n · ρ(others, k−1), summed over the group: k·ρ(n,k) on the left
    others = torch.stack([r[:, torch.arange(64) != i] for i in range(64)])
    baseline = sum(32 * max_at_k(group, 31) for group in others)
    total = pass_at_k_credit(r, 32).sum(1) + baseline
    torch.testing.assert_close(total, 64 * 32 * max_at_k(r, 32), rtol=1e-13, atol=0)
