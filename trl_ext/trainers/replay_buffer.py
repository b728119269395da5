"""A replay buffer of groups: part of each round is taken from the rounds before it."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from trl_ext.trainers.group_rows import PROMPT, TOKENS

Batch = dict[str, Any]


def replayed_groups(share: float, groups: int) -> int:
    """How many of a round's groups are taken from the rounds before."""
    return round(share * groups)


class ReplayBuffer:
    """Groups of the last rounds as they were scored and selected.

    Args:
        rounds: how many rounds are kept; 0 keeps none.
        share: of each round's groups, how many are taken from the rounds before, in [0, 1].
    """

    def __init__(self, rounds: int, share: float) -> None:
        self.capacity, self.share = rounds, share
        self.rounds: list[Batch] = []

    def exchange(self, batch: Batch) -> Batch:
        """Keeps a round, and puts groups of earlier ones in the place of its first ones.

        Which ones is drawn with torch's generator, which a checkpoint holds. A group that gives way
        waits in the buffer, so that none is sampled in vain.

        Args:
            batch: groups in the order in which they were sampled, tensors `(P, M, ...)`.

        Returns:
            A batch of as many groups.
        """
        if not self.capacity:
            return batch
        past, P = self.rounds, len(batch["completion_ids"])
        self.rounds = [*past, batch][-self.capacity :]
        taken = replayed_groups(self.share, P) if past else 0
        if not taken:
            return batch
        pool = _joined(past)
        places = torch.randperm(len(pool["completion_ids"]))[:taken]
        fresh = torch.arange(min(taken, len(places)), P)
        return _joined([_chosen(pool, places), _chosen(batch, fresh)])


def _chosen(batch: Batch, places: Tensor) -> Batch:
    return {
        key: value[places.to(value.device)]
        if isinstance(value, Tensor)
        else [value[i] for i in places.tolist()]
        for key, value in batch.items()
    }


def _joined(batches: list[Batch]) -> Batch:
    """One batch of all groups: prompts padded on the left, completions on the right.

    Only the first round of a run that samples ahead knows nothing of who sampled it.
    """
    joined: Batch = {}
    for key in [key for key in batches[0] if all(key in batch for batch in batches)]:
        values = [batch[key] for batch in batches]
        if not isinstance(values[0], Tensor):
            joined[key] = [item for value in values for item in value]
            continue
        if key in (*PROMPT, *TOKENS):
            width = max(value.size(-1) for value in values)
            room = [width - value.size(-1) for value in values]
            sides = [(n, 0) if key in PROMPT else (0, n) for n in room]
            values = [pad(value, side) for value, side in zip(values, sides, strict=True)]
        joined[key] = torch.cat(values)
    return joined
