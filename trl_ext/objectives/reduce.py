"""From a loss per token to the number that is differentiated, with TRL's normalisers.

Sequence objectives ask for a *sum* over tokens: `luspo` keeps it, `dr_grpo` divides it by a
constant. `grpo` and `sapo` divide each row by its own length, `bnpo` and `dapo` (with `cispo` and
`vespo`) by a number of tokens in the batch; their gradient is a reweighted one.
"""

from torch import Tensor

EXACT_FOR_SEQUENCES = ("dr_grpo", "luspo")


def reduce_tokens(
    loss_BT: Tensor,
    mask_BT: Tensor,
    loss_type: str,
    *,
    accumulation: int,
    max_completion_length: int,
    tokens_per_step: Tensor | float,
) -> Tensor:
    """Aggregates a loss per token as TRL aggregates its own for the same `loss_type`.

    Args:
        loss_BT: `(B, T)`.
        mask_BT: `(B, T)`, 1 on tokens that count.
        loss_type: TRL's name of the normaliser.
        accumulation: micro-batches per optimizer step; 1 in evaluation.
        max_completion_length: tokens, the constant of `dr_grpo`.
        tokens_per_step: tokens per process in one optimizer step, the divisor of `dapo`, `cispo`
            and `vespo`, which needs no division by `accumulation`.

    Returns:
        Scalar whose sum over the accumulated micro-batches is differentiated.

    Raises:
        ValueError: `loss_type` is none of TRL 1.16.
    """
    assert loss_BT.dim() == 2 and loss_BT.shape == mask_BT.shape, (loss_BT.shape, mask_BT.shape)
    masked_BT = loss_BT * mask_BT
    if loss_type in ("dapo", "cispo", "vespo"):
        return masked_BT.sum() / tokens_per_step
    if loss_type == "luspo":
        loss = masked_BT.sum(-1).mean()
    elif loss_type == "dr_grpo":
        loss = masked_BT.sum() / (masked_BT.size(0) * max_completion_length)
    elif loss_type in ("grpo", "sapo"):
        loss = (masked_BT.sum(-1) / mask_BT.sum(-1).clamp(min=1.0)).mean()
    elif loss_type == "bnpo":
        loss = masked_BT.sum() / mask_BT.sum().clamp(min=1.0)
    else:
        raise ValueError(f"loss_type={loss_type!r} is none of the loss types of TRL 1.16")
    return loss / accumulation
