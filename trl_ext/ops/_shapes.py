"""What the attentions share: checked tensors, grouped heads, and which query sees which key.

Slots number the keys of a call, cached ones first: 0 … Tₖ−1. Queries occupy consecutive slots, the
last ones unless told otherwise. Dropped: additive masks `(B, 1, T, T)`, whose size is what the
linear-memory forms avoid; a padding mask and document numbers say the same in O(T).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Which key each query sees: real, of its own document, and not in a later slot.

    visible(i, j) = first_key[i] ≤ j ≤ i  and  real[j],   i, j slots

    Attributes:
        query_offset: slot of the first query, which is the number of keys before this call.
        first_key_BT: `(B, Tₖ)`, first slot of each slot's document; None: one document per row.
        real_BT: `(B, Tₖ)`, False on padding; None: no padding.
    """

    query_offset: int
    first_key_BT: Tensor | None = None
    real_BT: Tensor | None = None

    def visible(
        self, rows: range, columns: range, device: torch.device, *, strict: bool = False
    ) -> Tensor | None:
        """The visible pairs of a tile of queries `rows` and keys `columns`.

        Args:
            rows: queries of this call, counted from 0.
            columns: slots of keys.
            strict: hide a query's own slot as well.

        Returns:
            Booleans that broadcast against `(B, Hkv, H/Hkv, rows, columns)`; None if all are True.
        """
        first, last = rows.start + self.query_offset, rows.stop + self.query_offset
        tile = None
        if columns.stop + strict > first + 1:
            slots = torch.arange(first, last, device=device)[:, None]
            keys = torch.arange(columns.start, columns.stop, device=device)
            tile = (keys < slots if strict else keys <= slots)[None]
        if self.first_key_BT is not None:
            keys = torch.arange(columns.start, columns.stop, device=device)
            own = keys >= self.first_key_BT[:, first:last, None]
            tile = own if tile is None else tile & own
        if self.real_BT is not None:
            real = self.real_BT[:, None, columns.start : columns.stop]
            tile = real if tile is None else tile & real
        return None if tile is None else tile[:, None, None]

    def distance(self, rows: range, columns: range, device: torch.device) -> Tensor:
        """|i − j| of a tile, counted in real tokens, so that padding anywhere takes no room.

        Args:
            rows, columns: as in `visible`.

        Returns:
            Integers that broadcast against `(B, Hkv, H/Hkv, rows, columns)`, 0 … Tₖ.
        """
        first, last = rows.start + self.query_offset, rows.stop + self.query_offset
        if self.real_BT is None:
            place = torch.arange(max(last, columns.stop), device=device)[None]
        else:
            place = self.real_BT.cumsum(-1)
        difference = place[:, first:last, None] - place[:, None, columns.start : columns.stop]
        return difference.abs()[:, None, None]

    def tiles(
        self, queries: int, query_block: int, key_block: int
    ) -> Iterator[tuple[range, list[range]]]:
        """Blocks of queries, each with the blocks of keys that hold a visible pair, oldest first.

        Args:
            queries: number of queries, Tq.
            query_block, key_block: largest number of queries and keys in a tile, ≥ 1.

        Yields:
            Queries of this call and a list of slots, as `visible` takes them. Keys of documents
            that no query of the block belongs to are left out.
        """
        starts = range(0, queries, query_block)
        oldest = [0] * len(starts)
        if self.first_key_BT is not None:
            # first_key never falls along a row, so a block's oldest key is its first query's.
            slots = [start + self.query_offset for start in starts]
            oldest = self.first_key_BT[:, slots].amin(0).tolist()
        for start, old in zip(starts, oldest, strict=True):
            rows = range(start, min(start + query_block, queries))
            end = rows.stop + self.query_offset
            yield rows, [range(j, min(j + key_block, end)) for j in range(old, end, key_block)]


def make_layout(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    attention_mask: Tensor | None,
    document_ids: Tensor | None,
    query_offset: int | None,
) -> Layout:
    """Checks the arguments that every attention of `trl_ext.ops` takes, and says who sees whom.

    Args:
        q: `(B, H, Tq, D)`.
        k, v: `(B, Hkv, Tk, D)` and `(B, Hkv, Tk, Dv)`; Hkv divides H.
        attention_mask: `(B, Tk)`, bool or 0/1, 1 on real tokens; None: no padding.
        document_ids: `(B, Tk)`, integers; a run of equal numbers is one document.
        query_offset: slot of the first query, 0 … Tk − Tq; None: Tk − Tq.

    Raises:
        ValueError: shapes, dtypes or the offset do not fit together.
    """
    _check_tensors(q, k, v)
    queries, keys = q.size(2), k.size(2)
    if query_offset is None:
        query_offset = keys - queries
    if not 0 <= query_offset <= keys - queries:
        raise ValueError(
            f"query_offset={query_offset} puts {queries} queries outside the {keys} slots of the "
            f"keys: pass 0 to {keys - queries}, and all cached keys before the new ones."
            if keys >= queries
            else f"q has {queries} positions and k only {keys}: every query needs its own key, so "
            "append the new keys to the cached ones before the call."
        )
    first_key_BT = real_BT = None
    if document_ids is not None:
        _check_row_wise("document_ids", document_ids, k)
        first_key_BT = _start_of_run(document_ids.to(k.device))
    if attention_mask is not None:
        _check_row_wise("attention_mask", attention_mask, k)
        real_BT = attention_mask.to(k.device) != 0
    return Layout(query_offset, first_key_BT, real_BT)


def _check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}: pass (batch, heads, positions, head width)."
            )
        if x.dtype != q.dtype or not x.is_floating_point():
            raise ValueError(
                f"{name} has dtype {x.dtype} and q {q.dtype}: pass q, k and v in one floating-point"
                " dtype; the scores are computed in float32 or better in any case."
            )
        if x.size(0) != q.size(0):
            raise ValueError(
                f"{name} has {x.size(0)} rows and q {q.size(0)}: they belong to one batch."
            )
    if k.shape[:3] != v.shape[:3]:
        raise ValueError(
            f"k has shape {tuple(k.shape)} and v {tuple(v.shape)}: each key needs one value, so "
            "batch, heads and positions must be equal."
        )
    if q.size(3) != k.size(3):
        raise ValueError(f"q has head width {q.size(3)} and k {k.size(3)}: they must be equal.")
    if k.size(1) == 0 or q.size(1) % k.size(1):
        raise ValueError(
            f"q has {q.size(1)} heads and k {k.size(1)}: the heads of k must divide those of q, "
            "because query head h uses key head h // (H / Hkv)."
        )


def _check_row_wise(name: str, x: Tensor, k: Tensor) -> None:
    if x.is_floating_point() or x.shape != (k.size(0), k.size(2)):
        raise ValueError(
            f"{name} has shape {tuple(x.shape)} and dtype {x.dtype}: pass one integer or boolean "
            f"per row and key, shape {(k.size(0), k.size(2))}; causality needs no mask."
        )


def _start_of_run(ids_BT: Tensor) -> Tensor:
    """Slot at which the run of equal numbers begins that each slot belongs to, `(B, T)`."""
    slots = torch.arange(ids_BT.size(1), device=ids_BT.device).expand_as(ids_BT)
    begins = torch.ones_like(ids_BT, dtype=torch.bool)
    begins[:, 1:] = ids_BT[:, 1:] != ids_BT[:, :-1]
    return slots.masked_fill(~begins, 0).cummax(-1).values


def group_heads(x: Tensor, kv_heads: int) -> Tensor:
    """Splits query heads by the key head they use: `(B, H, T, D)` to `(B, Hkv, H/Hkv, T, D)`."""
    return x.unflatten(1, (kv_heads, x.size(1) // kv_heads))


def score_dtype(x: Tensor) -> torch.dtype:
    """Dtype of scores and sums: float64 for float64, float32 for everything below."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
