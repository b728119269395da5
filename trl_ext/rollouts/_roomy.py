"""Rows of a cache, repeated or left out, with room behind them for the tokens to come."""

from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicLayer


class RoomyLayer(DynamicLayer):
    """Chosen rows of a growing layer, written in place: `torch.cat` copies all of it per token.

    Args:
        layer: from which rows are taken.
        rows: their places, any number of times each.
        room: tokens that can be added; behind them the layer grows as any other.
    """

    keys: Any  # set once the layer is made
    values: Any

    def __init__(self, layer: Any, rows: Tensor, room: int) -> None:
        super().__init__()
        self.lazy_initialization(layer.keys, layer.values)
        self.all_keys, self.keys = _widened(layer.keys, rows, room)
        self.all_values, self.values = _widened(layer.values, rows, room)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        begin = self.keys.size(-2)
        end = begin + key_states.size(-2)
        if end > self.all_keys.size(-2):
            return super().update(key_states, value_states, *args, **kwargs)
        self.all_keys[..., begin:end, :] = key_states
        self.all_values[..., begin:end, :] = value_states
        self.keys, self.values = self.all_keys[..., :end, :], self.all_values[..., :end, :]
        return self.keys, self.values


def take_rows(cache: Cache, rows: Tensor, room: int) -> None:
    """Leaves the cache with these rows, as `reorder_cache`, and where it can with room."""
    layers: list[Any] = cache.layers
    for index, layer in enumerate(layers):
        if type(layer) in (DynamicLayer, RoomyLayer) and layer.get_seq_length():
            layers[index] = RoomyLayer(layer, rows, room)
        else:
            layer.reorder_cache(rows)


def _widened(states: Tensor, rows: Tensor, room: int) -> tuple[Tensor, Tensor]:
    """Storage for these rows and what comes behind them, and the part of it that is filled."""
    length = states.size(-2)
    shape = (len(rows), *states.shape[1:-2], length + room, states.size(-1))
    storage = torch.empty(shape, dtype=states.dtype, device=states.device)
    filled = storage[..., :length, :]
    filled.copy_(states.index_select(0, rows.to(states.device)))
    return storage, filled
