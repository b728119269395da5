import itertools

import pytest
import torch

from tests.objectives.enumeration import expected_gradient, objective_gradient, table
from trl_ext.objectives.pass_at_k_training import analytic_credit
from trl_ext.objectives.pkpo import max_at_k, pkpo_credit

ONE_OF_FOUR = table([0.0, 1.0, 0.0, 0.0])


def all_binary(n):
    return table(*map(list, itertools.product([0.0, 1.0], repeat=n)))


def test_golden_values():
    # c=1, n=4, k=2: 1−ρ = C(3,2)/C(4,2) = 1/2; A₋ = 1/2 − C(2,1)/C(3,1) = −1/6; σ = 1/2
    unnormalised = table([-1 / 6, 1 / 2, -1 / 6, -1 / 6])
    torch.testing.assert_close(analytic_credit(ONE_OF_FOUR, 2, normalise=False), unnormalised)
    torch.testing.assert_close(analytic_credit(ONE_OF_FOUR, 2), unnormalised / (0.5 + 1e-6))


@pytest.mark.parametrize("n", [2, 3, 5, 6])
def test_is_a_rescaled_pkpo_credit_minus_the_value(n):
    r = all_binary(n)
    for k in range(1, n):
        credit = analytic_credit(r, k, normalise=False)
        torch.testing.assert_close(credit, pkpo_credit(r, k) / k - max_at_k(r, k)[:, None])
        torch.testing.assert_close(credit.sum(1), torch.zeros(2**n).double(), rtol=0, atol=1e-14)


def test_normalised_credit_has_the_deviation_of_pass_at_k_as_unit():
    r = all_binary(5)
    rho = max_at_k(r, 3)[:, None]
    expected = analytic_credit(r, 3, normalise=False) / ((rho * (1 - rho)).sqrt() + 1e-6)
    torch.testing.assert_close(analytic_credit(r, 3), expected)


@pytest.mark.parametrize(("n", "k"), [(4, 1), (4, 2), (4, 3), (5, 2)])
def test_expected_gradient_is_a_fraction_of_that_of_pass_at_k(n, k):
    rewards = ONE_OF_FOUR[0]
    gradient = expected_gradient(lambda y: analytic_credit(rewards[y], k, normalise=False), n)
    of_k = objective_gradient(lambda y: rewards[y].amax(1), k)
    torch.testing.assert_close(gradient, (1 / k - 1 / n) * of_k, rtol=0, atol=1e-13)


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize(("n", "k"), [(4, 2), (5, 1), (16, 8), (64, 32)])
def test_a_group_without_signal_gets_exactly_zero(n, k, normalise):
    # no correct sample; fewer than k wrong ones; no wrong one
    for c in (0, n - k + 1, n):
        r = torch.tensor([[1.0] * c + [0.0] * (n - c)])
        assert torch.equal(analytic_credit(r, k, normalise), torch.zeros(1, n))


def test_permuting_a_group_permutes_its_credit():
    r = table([1, 0, 0, 1, 0, 0])
    order = torch.randperm(6, generator=torch.Generator().manual_seed(3))
    assert torch.equal(analytic_credit(r[:, order], 3), analytic_credit(r, 3)[:, order])


def test_no_gradient_flows_and_the_dtype_stays():
    credit = analytic_credit(ONE_OF_FOUR.float().requires_grad_(), 2)
    assert not credit.requires_grad and credit.dtype == torch.float32


@pytest.mark.parametrize("bad", [0.3, -1.0, 2.0, 0.9999999])
def test_refuses_rewards_that_are_neither_0_nor_1(bad):
    with pytest.raises(ValueError, match=r"exactly 0 or 1.*pass_at_k_credit"):
        analytic_credit(table([0, 1, bad, 0]), 2)


@pytest.mark.parametrize("k", [0, 4, 5])
def test_refuses_k_outside_its_range(k):
    with pytest.raises(AssertionError, match="outside"):
        analytic_credit(ONE_OF_FOUR, k)
