"""Judges the work on a calculator puzzle: every step must be right, and the last on the target.

Keys are read by their labels and not by the generator's table, so that the two check each other.
"""

import re
from collections.abc import Sequence
from typing import Any

from trl_ext.completions import Completion, completion_texts

STEP = r"(\S+) (\d\d) (\d\d)"
WORK = re.compile(rf"{STEP}(?: {STEP})*")


def calculator_reward(
    completions: Sequence[Completion],
    start: Sequence[Sequence[int]],
    target: Sequence[Sequence[int]],
    level: Sequence[int],
    keys: Sequence[Sequence[str]],
    **kwargs: Any,
) -> list[float]:
    """Rewards work whose arithmetic is right, presses `level` keys and ends on the target.

    Args:
        completions: `B` strings or conversations; one step is a key and what both displays show.
        start: `B` pairs of displays before the first key, each in [0, 99].
        target: `B` pairs of displays to reach.
        level: `B` numbers of keys that must be pressed.
        keys: `B` lists of the keys that may be pressed, as `"+7"`, `"-1"`, `"*3"` or `"rev"`.
        **kwargs: other columns and TRL's extras, unused.

    Returns:
        `B` values, 1.0 or 0.0. Anything beside the work, even a space, gives 0.0.
    """
    rows = zip(completion_texts(completions), start, target, level, keys, strict=True)
    return [float(_solves(*row)) for row in rows]


def keys_pressed(completion: str) -> str | None:
    """The answer of a completion, `"+7 *3"`, whether its arithmetic is right or not.

    None where the completion is not a sequence of steps.
    """
    return " ".join(completion.split()[::3]) if WORK.fullmatch(completion) else None


def _solves(
    text: str, start: Sequence[int], target: Sequence[int], level: int, keys: Sequence[str]
) -> bool:
    if keys_pressed(text) is None or len(steps := re.findall(STEP, text)) != level:
        return False
    shown = list(start)
    for key, *displays in steps:
        if key not in keys:
            return False
        shown = [_pressed(key, display) for display in shown]
        if displays != [f"{display:02d}" for display in shown]:
            return False
    return shown == list(target)


def _pressed(key: str, shown: int) -> int:
    if key == "rev":
        return int(f"{shown:02d}"[::-1])
    operand = int(key[1:])
    results = {"+": shown + operand, "-": shown - operand, "*": shown * operand}
    return results[key[0]] % 100
