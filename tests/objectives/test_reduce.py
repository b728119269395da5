"""Normalisers, by hand; that they are TRL's is shown through the trainer in `test_seam.py`."""

import pytest
import torch

from trl_ext.objectives.reduce import EXACT_FOR_SEQUENCES, reduce_tokens

LOSS = torch.tensor([[1.0, 2.0, 3.0], [4.0, 100.0, 100.0]])
MASK = torch.tensor([[1, 1, 1], [1, 0, 0]])


def reduced(loss_type, accumulation=1):
    return reduce_tokens(
        LOSS,
        MASK,
        loss_type,
        accumulation=accumulation,
        max_completion_length=5,
        tokens_per_step=8.0,
    ).item()


@pytest.mark.parametrize(
    ("loss_type", "expected"),
    [
        ("luspo", (6 + 4) / 2),
        ("dr_grpo", 10 / (2 * 5)),
        ("grpo", (2 + 4) / 2),
        ("sapo", (2 + 4) / 2),
        ("bnpo", 10 / 4),
        ("dapo", 10 / 8),
        ("cispo", 10 / 8),
        ("vespo", 10 / 8),
    ],
)
def test_by_hand(loss_type, expected):
    assert reduced(loss_type) == pytest.approx(expected)
    divided = loss_type not in ("dapo", "cispo", "vespo")
    assert reduced(loss_type, accumulation=2) == pytest.approx(expected / (2 if divided else 1))


@pytest.mark.parametrize("loss_type", EXACT_FOR_SEQUENCES)
def test_sequence_losses_weigh_each_token_alike_whatever_its_row(loss_type):
    loss = LOSS.clone().requires_grad_()
    value = reduce_tokens(
        loss, MASK, loss_type, accumulation=1, max_completion_length=5, tokens_per_step=1.0
    )
    (gradient,) = torch.autograd.grad(value, loss)
    assert gradient[MASK.bool()].unique().numel() == 1
    assert (gradient[~MASK.bool()] == 0).all()


def test_an_unknown_loss_is_refused():
    with pytest.raises(ValueError, match="loss_type='ppo'"):
        reduced("ppo")
