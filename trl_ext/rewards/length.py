"""Rewards the length of a completion, in tokens as sampled."""

from collections.abc import Sequence
from typing import Any

from trl_ext.completions import Completion


def length_reward(
    completions: Sequence[Completion],
    completion_ids: Sequence[Sequence[int]],
    *,
    max_length: int = 20480,
    buffer: int = 4096,
    **kwargs: Any,
) -> list[float]:
    """Punishes completions that come near the length limit, softly within a buffer before it.

    r = 0                          if |y| ≤ L − b
    r = (L − b − |y|) / b          if L − b < |y| ≤ L
    r = −1                         if L < |y|

    Args:
        completions: `B` completions; only their number is read.
        completion_ids: `B` lists of token ids, from TRL; |y| is their length in tokens.
        max_length: L in tokens, ≥ 1. With the run's `max_completion_length`, truncated ones get −1.
        buffer: b in tokens, 0 ≤ b ≤ L. With 0 the punishment is a step just above L.
        **kwargs: other columns and TRL's extras, unused.

    Returns:
        `B` values in [−1, 0].

    Raises:
        ValueError: if a length is out of range, or if token ids are missing.

    Defaults and formula: DAPO, arXiv:2503.14476, equation 13.
    """
    _check(max_length, buffer)
    if completion_ids is None or len(completion_ids) != len(completions):
        raise ValueError(
            f"completion_ids={completion_ids!r} does not hold the tokens of {len(completions)} "
            "completions: length is counted in tokens. Pass what TRL passes."
        )
    return [_punishment(len(ids), max_length, buffer) for ids in completion_ids]


def _punishment(length: int, max_length: int, buffer: int) -> float:
    if length > max_length:
        return -1.0
    excess = length - (max_length - buffer)
    return -excess / buffer if excess > 0 else 0.0


def _check(max_length: int, buffer: int) -> None:
    for name, value, low in (("max_length", max_length, 1), ("buffer", buffer, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise ValueError(
                f"{name}={value!r} is not a number of tokens, an integer of at least {low}. If the "
                f"dataset has a column {name!r}, rename it, for TRL passes columns by name."
            )
    if buffer > max_length:
        raise ValueError(
            f"buffer={buffer} exceeds max_length={max_length}: the punishment would start before "
            "the first token. Lower buffer."
        )
