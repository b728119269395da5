"""From what the host passes (a mask, positions, a cache) to what `trl_ext.ops` takes."""

from typing import Any, TypedDict

import torch
from torch import Tensor
from transformers import Cache


class Visible(TypedDict):
    """Which keys the queries of a call may see; the keywords of `trl_ext.ops`."""

    attention_mask: Tensor | None
    document_ids: Tensor | None
    query_offset: int | None


def visible_keys(
    hidden_BTD: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cache: Cache | None,
    *,
    layer_idx: int,
    sees_itself: bool,
    **kwargs: Any,
) -> Visible:
    """Reads padding, packed documents and cached keys.

    Args:
        hidden_BTD: the new tokens' embeddings, for their shape and device.
        attention_mask: `(B, cached + T)`, 1 on real tokens; None: no padding.
        position_ids: `(B, T)` or `(1, T)`. Without mask and cached keys, each restart begins a
            packed document, as in transformers. Otherwise unused: both attentions count tokens.
        cache: before this call's keys are appended.
        layer_idx: a layer that keeps its keys in this cache.
        sees_itself: whether a query attends to its own key.
        **kwargs: `cu_seq_lens_q`, `(documents + 1,)`, says the same as restarting positions.

    Raises:
        ValueError: the mask has another shape.
    """
    (B, T), device = hidden_BTD.shape[:2], hidden_BTD.device
    cached = 0 if cache is None else cache.get_seq_length(layer_idx)
    slots = T if cache is None else int(cache.get_mask_sizes(T, layer_idx)[0])
    if attention_mask is None and isinstance(cached, int) and cached == 0:
        documents = _documents(T, device, position_ids, kwargs.get("cu_seq_lens_q"))
        if documents is not None:
            documents = _up_to(documents, slots, value=-1).expand(B, slots)
            return Visible(attention_mask=None, document_ids=documents, query_offset=0)
    real = _checked(attention_mask, B, cached, T, slots)
    if isinstance(cached, int) and cached + T == slots:
        return Visible(attention_mask=real, document_ids=None, query_offset=None)
    if T > 1:
        return Visible(attention_mask=real, document_ids=None, query_offset=int(cached))
    # One new token and a cache with room: the number of cached keys is a tensor, which must not be
    # read back from the device. The query takes the last slot, and the mask hides those in between.
    slot = torch.arange(slots, device=device)
    filled = (slot <= cached if sees_itself else slot < cached).expand(B, slots)
    mask = filled if real is None else filled & real
    return Visible(attention_mask=mask, document_ids=None, query_offset=None)


def _checked(
    mask: Tensor | None, B: int, cached: int | Tensor, T: int, slots: int
) -> Tensor | None:
    """The padding mask as booleans, `(B, slots)`; slots of a cache that are still empty are 0."""
    if mask is None:
        return None
    tensor = isinstance(mask, Tensor)
    if tensor and mask.dim() == 2 and mask.size(1) > slots != T:
        raise ValueError(
            f"attention_mask has {mask.size(1)} columns, and the cache has room for {slots} "
            "tokens: pass one column for each cached and new token, or make the cache larger "
            "(max_cache_len)."
        )
    if not tensor or mask.dim() != 2 or mask.size(0) != B or not T <= mask.size(1) <= slots:
        given = f"has shape {tuple(mask.shape)}" if tensor else f"is a {type(mask).__name__}"
        raise ValueError(
            f"attention_mask {given}: pass ({B}, {slots}), 1 on the real "
            "tokens among cached and new ones. A mask per pair of tokens is not supported: packed "
            "documents are told by position_ids that restart."
        )
    if isinstance(cached, int) and mask.size(1) < cached + T:
        raise ValueError(
            f"attention_mask has {mask.size(1)} columns, and there are {cached} cached and {T} new "
            "tokens: pass one column for each."
        )
    return _up_to(mask != 0, slots, value=False)


def _documents(
    T: int, device: torch.device, position_ids: Tensor | None, cu_seq_lens: Tensor | None
) -> Tensor | None:
    """Number of the document that each token belongs to, `(1 or B, T)`."""
    if position_ids is not None:
        step = position_ids.diff(dim=-1, prepend=position_ids[:, :1] - 1)
        return (step != 1).cumsum(-1)
    if cu_seq_lens is not None:
        ends = cu_seq_lens[1:].to(device)
        return torch.bucketize(torch.arange(T, device=device), ends, right=True)[None]
    return None


def _up_to(x: Tensor, slots: int, value: int | bool) -> Tensor:
    return torch.nn.functional.pad(x, (0, slots - x.size(1)), value=value)
