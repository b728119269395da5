"""Unscorable completions: as if they had never been drawn."""

import math

import pytest
import torch

from trl_ext.objectives.majority import majority_credit
from trl_ext.objectives.pass_at_k import pass_at_k_credit
from trl_ext.objectives.scorable import credit_of_scorable

NAN = math.nan


def at_2(rewards_PG):
    return pass_at_k_credit(rewards_PG, 2)


def test_without_gaps_it_is_the_credit_itself():
    rewards = torch.rand(5, 4)
    assert torch.equal(credit_of_scorable(at_2, rewards, min_samples=2), at_2(rewards))


def test_the_rest_of_the_group_is_credited_as_a_smaller_group():
    rewards = torch.tensor([[1.0, NAN, 0.0, 0.5], [0.25, 1.0, 0.0, 0.5], [NAN, NAN, 1.0, 0.0]])
    credit = credit_of_scorable(at_2, rewards, min_samples=2)
    torch.testing.assert_close(
        credit[0, [0, 2, 3]], at_2(torch.tensor([[1.0, 0.0, 0.5]]))[0] * 4 / 3
    )
    assert torch.equal(credit[1], at_2(rewards[1:2])[0])
    torch.testing.assert_close(credit[2, 2:], at_2(torch.tensor([[1.0, 0.0]]))[0] * 4 / 2)
    assert credit[0, 1] == 0 and (credit[2, :2] == 0).all()


@pytest.mark.parametrize("scorable", [0, 1, 2])
def test_too_few_samples_get_exactly_0(scorable):
    rewards = torch.tensor([[1.0] * scorable + [NAN] * (4 - scorable)])
    credit = credit_of_scorable(lambda r: pass_at_k_credit(r, 3), rewards, min_samples=3)
    assert torch.equal(credit, torch.zeros(1, 4))


def test_labels_stay_with_their_rewards():
    rewards = torch.tensor([[1.0, NAN, 0.0, 1.0, 0.0]])
    labels = torch.tensor([[0, 1, 2, 0, 2]])

    def vote(r, labels):
        return majority_credit(r, labels, 3)

    credit = credit_of_scorable(vote, rewards, labels, min_samples=3)
    kept = [0, 2, 3, 4]
    expected = vote(rewards[:, kept], labels[:, kept]) * 5 / 4
    torch.testing.assert_close(credit[:, kept], expected)


def test_order_of_the_group_does_not_matter():
    rewards = torch.tensor([[1.0, NAN, 0.0, 0.5, NAN, 0.75]])
    order = torch.randperm(6, generator=torch.Generator().manual_seed(0))
    credit = credit_of_scorable(at_2, rewards, min_samples=2)
    shuffled = credit_of_scorable(at_2, rewards[:, order], min_samples=2)
    assert torch.equal(credit[:, order], shuffled)
