"""Token ids as a batch, padded as TRL pads them, and what a model's forward takes besides."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def pad_left(
    prompt_ids: Sequence[Sequence[int]], pad_token_id: int, multiple_of: int | None = None
) -> tuple[Tensor, Tensor]:
    """Token ids and mask, both `(B, width)`, with the padding before the prompt."""
    width = max(map(len, prompt_ids))
    width += -width % (multiple_of or 1)
    ids = [[pad_token_id] * (width - len(row)) + list(row) for row in prompt_ids]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in prompt_ids]
    return torch.tensor(ids), torch.tensor(mask)


def pad_right(completion_ids: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Token ids and mask, both `(B, T)`, with zeros after the completion."""
    T = max(map(len, completion_ids))
    ids = [[*row, *[0] * (T - len(row))] for row in completion_ids]
    mask = [[1] * len(row) + [0] * (T - len(row)) for row in completion_ids]
    return torch.tensor(ids, dtype=torch.long), torch.tensor(mask, dtype=torch.long)


def positions(mask: Tensor) -> Tensor:
    """Positions that count tokens, not pads, as they do in `generate`."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


def accepted(model: Any, **arguments: Any) -> dict[str, Any]:
    """Those of the arguments that the model's forward names."""
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    names = inspect.signature(type(model).forward).parameters  # wrappers hide the instance's
    return {name: value for name, value in arguments.items() if name in names}


def device_of(model: Any) -> torch.device:
    return next(model.parameters()).device
