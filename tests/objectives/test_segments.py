"""Segments of token rows: sums, broadcasts and runs, against loops."""

import pytest
import torch

from tests.objectives.fixtures import f64
from trl_ext.objectives.segments import on_tokens, runs, segment_sums

SEGMENT = torch.tensor([[0, 0, 1, -1, 2], [-1, 1, 1, 0, -1]])
VALUES = f64([1.0, 2.0, 4.0, torch.nan, 8.0], [torch.nan, 1.0, 3.0, 5.0, torch.inf])


def test_sums_read_nothing_outside_the_segments():
    assert segment_sums(VALUES, SEGMENT, 4).tolist() == [[3.0, 4.0, 8.0, 0.0], [5.0, 4.0, 0.0, 0.0]]


def test_sums_are_differentiable():
    values = VALUES.clone().requires_grad_()
    (segment_sums(values, SEGMENT, 3) * f64([1.0, 10.0, 100.0])).sum().backward()
    assert values.grad.tolist() == [[1.0, 1.0, 10.0, 0.0, 100.0], [0.0, 10.0, 10.0, 1.0, 0.0]]


def test_tokens_get_the_credit_of_their_segment():
    credit = f64([0.1, 0.2, 0.3], [0.4, 0.5, torch.nan])
    expected = f64([0.1, 0.1, 0.2, 0.0, 0.3], [0.0, 0.5, 0.5, 0.4, 0.0])
    assert torch.equal(on_tokens(credit, SEGMENT), expected)


def test_a_sum_of_broadcast_credit_weighs_by_length():
    generator = torch.Generator().manual_seed(0)
    segment = torch.randint(-1, 5, (7, 40), generator=generator)
    credit = torch.randn(7, 5, dtype=torch.float64, generator=generator)
    lengths = segment_sums(torch.ones(7, 40, dtype=torch.float64), segment, 5)
    actual = segment_sums(on_tokens(credit, segment), segment, 5)
    torch.testing.assert_close(actual, credit * lengths)


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        ([1, 1, 0, 1, 0, 0, 1, 0], [0, 0, -1, 1, -1, -1, 2, -1]),
        ([0, 0, 1, 1], [-1, -1, 0, 0]),
        ([0, 0], [-1, -1]),
        ([2, 1], [0, 0]),
        ([], []),
    ],
)
def test_runs_are_numbered_in_their_order(mask, expected):
    assert runs(torch.tensor([mask, mask]).long()).tolist() == [expected, expected]
