"""Credit of whole segments (a step of reasoning, a turn of a conversation) on rows of tokens."""

import torch
from torch import Tensor


def segment_sums(values_BT: Tensor, segment_BT: Tensor, segments: int) -> Tensor:
    """Sums each row's tokens by segment.

    Args:
        values_BT: `(B, T)`; not read where the token belongs to no segment.
        segment_BT: `(B, T)`, integers in [−1, S); −1 is no segment.
        segments: S, columns of the result.

    Returns:
        `(B, S)`, differentiable in the values; 0 for a segment without tokens.
    """
    _assert_tokens(segment_BT)
    assert values_BT.shape == segment_BT.shape, (values_BT.shape, segment_BT.shape)
    outside_BT = segment_BT < 0
    kept_BT = values_BT.masked_fill(outside_BT, 0.0)
    sums_BS = values_BT.new_zeros(values_BT.size(0), segments)
    return sums_BS.scatter_add(1, segment_BT.masked_fill(outside_BT, 0), kept_BT)


def on_tokens(credit_BS: Tensor, segment_BT: Tensor) -> Tensor:
    """Gives each token the credit of its segment.

    Args:
        credit_BS: `(B, S)`.
        segment_BT: `(B, T)`, integers in [−1, S); −1 is no segment.

    Returns:
        `(B, T)`; exactly 0 on tokens without a segment.
    """
    _assert_tokens(segment_BT)
    assert credit_BS.dim() == 2 and credit_BS.size(0) == segment_BT.size(0), credit_BS.shape
    outside_BT = segment_BT < 0
    credit_BT = credit_BS.gather(1, segment_BT.masked_fill(outside_BT, 0))
    return credit_BT.masked_fill(outside_BT, 0.0)


def runs(mask_BT: Tensor) -> Tensor:
    """Numbers the runs of a mask: the turns of a policy between which others speak.

    Args:
        mask_BT: `(B, T)`, nonzero on the tokens that the policy sampled.

    Returns:
        `(B, T)`, integers: 0 on the first run, 1 on the second and so on; −1 outside.
    """
    assert mask_BT.dim() == 2, mask_BT.shape
    inside_BT = (mask_BT != 0).long()
    starts_BT = inside_BT.diff(dim=1, prepend=torch.zeros_like(inside_BT[:, :1])).clamp(min=0)
    return (starts_BT.cumsum(1) - 1).masked_fill(inside_BT == 0, -1)


def _assert_tokens(segment_BT: Tensor) -> None:
    assert segment_BT.dim() == 2 and not segment_BT.is_floating_point(), segment_BT.dtype
