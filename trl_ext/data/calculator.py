"""The calculator puzzle: which keys take both displays to their targets?

A calculator shows two digits, and each key changes what it shows; what does not fit is cut off, so
that 93 + 7 shows 00. Two displays react to the same keys. The puzzle names where they start and
where they shall end:

    2 keys to 51 63 from 10 14          # the prompt
    +7 17 21 *3 51 63                   # the work: each key, then what both displays show

It is a search problem: the work is checked with arithmetic a child can do, while nothing short of
trying tells which of the 4ⁿ programs is the one. Keys are pressed with unequal frequency, as
problem sets use some moves often and others rarely: who always plays the usual move is often right,
and never where a rare one is needed. The target stands before the start because the start is what
the first step of the work reads: every step then finds its input in the same place.
"""

import itertools
import random
from collections.abc import Callable, Mapping, Sequence

from datasets import Dataset, DatasetDict

Displays = tuple[int, ...]
Program = tuple[str, ...]

KEYS: dict[str, Callable[[int], int]] = {
    "+7": lambda shown: (shown + 7) % 100,
    "*3": lambda shown: shown * 3 % 100,
    "rev": lambda shown: shown % 10 * 10 + shown // 10,
    "-1": lambda shown: (shown - 1) % 100,
}
KEY_FREQUENCIES = {"+7": 0.4, "*3": 0.3, "rev": 0.2, "-1": 0.1}
LEVELS = (1, 2, 3)
MOST_MISSES = 1000


def calculator_puzzles(
    train: int = 12_000,
    held_out: int = 256,
    *,
    levels: Sequence[int] = LEVELS,
    frequencies: Mapping[str, float] = KEY_FREQUENCIES,
    seed: int = 0,
) -> DatasetDict:
    """Draws puzzles with exactly one solution each, split so that no prompt is in both splits.

    Args:
        train: Number of training puzzles.
        held_out: Number of held-out puzzles, from the same distribution.
        levels: Numbers of keys to press, drawn with equal probability; more is harder.
        frequencies: Relative frequency of each of `KEYS` in the programs, positive.
        seed: Seed of the puzzles; equal seeds give equal datasets.

    Returns:
        Splits `train` and `held_out` with the columns `prompt`, `completion` (worked solution),
        `answer` (the keys, `"+7 *3"`), `level`, `keys`, `start` and `target` (two displays each).

    Raises:
        ValueError: An argument out of range, or more puzzles asked for than there are.
    """
    _check(train, held_out, levels, frequencies)
    rng = random.Random(seed)
    puzzles: dict[str, dict] = {}
    misses = 0
    while len(puzzles) < train + held_out:
        puzzle = _draw(rng, levels, frequencies)
        if puzzle is not None and puzzle["prompt"] not in puzzles:
            puzzles[puzzle["prompt"]] = puzzle
            misses = 0
            continue
        misses += 1
        if misses == MOST_MISSES:
            raise ValueError(
                f"train={train} and held_out={held_out} at levels={tuple(levels)}: after "
                f"{len(puzzles)} puzzles, {misses} draws in a row brought no new one. Ask for "
                "fewer puzzles, or add a level."
            )
    rows = list(puzzles.values())
    return DatasetDict(
        {
            "train": Dataset.from_list(rows[held_out:]),
            "held_out": Dataset.from_list(rows[:held_out]),
        }
    )


def press(program: Program, start: Displays) -> list[Displays]:
    """What all displays show after each key."""
    shown = itertools.accumulate(
        program, lambda displays, key: tuple(map(KEYS[key], displays)), initial=start
    )
    return list(shown)[1:]


def solutions(start: Displays, target: Displays, level: int, keys: Sequence[str]) -> list[Program]:
    """Every program of `level` keys that takes `start` to `target`, by trying them all."""
    programs = itertools.product(keys, repeat=level)
    return [program for program in programs if press(program, start)[-1] == target]


def _draw(
    rng: random.Random, levels: Sequence[int], frequencies: Mapping[str, float]
) -> dict | None:
    """One puzzle; None if the drawn one has a second solution, or none is needed."""
    keys, level = list(frequencies), rng.choice(levels)
    start = tuple(rng.sample(range(100), 2))
    program = tuple(rng.choices(keys, list(frequencies.values()), k=level))
    steps = press(program, start)
    if steps[-1] == start or len(solutions(start, steps[-1], level, keys)) > 1:
        return None
    return {
        "prompt": f"{level} keys to {_digits(steps[-1])} from {_digits(start)}\n",
        "completion": " ".join(f"{k} {_digits(s)}" for k, s in zip(program, steps, strict=True)),
        "answer": " ".join(program),
        "level": level,
        "keys": keys,
        "start": list(start),
        "target": list(steps[-1]),
    }


def _digits(displays: Displays) -> str:
    return " ".join(f"{shown:02d}" for shown in displays)


def _check(
    train: int, held_out: int, levels: Sequence[int], frequencies: Mapping[str, float]
) -> None:
    for name, size in (("train", train), ("held_out", held_out)):
        if size < 1:
            raise ValueError(f"{name}={size}: the split would be empty. Ask for at least 1 puzzle.")
    if not levels or min(levels) < 1:
        raise ValueError(
            f"levels={tuple(levels)}: a level is the number of keys to press. Give at least one "
            "level, each 1 or more."
        )
    if not frequencies or not set(frequencies) <= set(KEYS) or min(frequencies.values()) <= 0:
        raise ValueError(
            f"frequencies={dict(frequencies)} must give a positive frequency to some of the keys "
            f"{', '.join(KEYS)}. Leave out a key that shall not be used."
        )
