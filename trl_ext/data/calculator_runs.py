"""Calculator runs: what does the display show after these keys?

    +7 *3 rev -1 from 10                     # the prompt
    17 51 15 14 is 14                        # a thought, the marker `is`, the answer

The keys are those of the puzzles, two digits are shown, and what does not fit is cut off. Each step
is a table of one key; the whole run is a table of millions of rows. A small model looks up the
first and cannot learn the second, so that the answer has to be thought out: a step finds its key
always the same number of places back, and what was shown one place back.

Demonstrations are a careless pupil's, who now and then presses another key and goes on from there.
An answer is a number, which has one spelling, or an account in words: the same facts in 32
spellings, of which a verifier that compares texts knows nothing.

    17 51 15 14 is we read 14 , it has grown , two divides it
"""

import random
from collections.abc import Iterator, Sequence

from datasets import Dataset, DatasetDict

from trl_ext.data.calculator import KEYS, press

MARKER = " is"
OPENINGS = ("it shows", "we read", "you get", "there is")
PARITIES = (("an even number", "two divides it"), ("an odd number", "two leaves one"))
GROWTHS = (
    ("less than at first", "it has shrunk"),
    ("the same as at first", "it has stayed"),
    ("more than at first", "it has grown"),
)


def calculator_runs(
    train: int = 8000,
    held_out: int = 256,
    *,
    keys: int = 4,
    slips: float = 0.25,
    in_words: bool = False,
    seed: int = 0,
) -> DatasetDict:
    """Draws runs that end elsewhere than they start, split so that no prompt is in both splits.

    Args:
        train: Number of training runs.
        held_out: Number of held-out runs, from the same distribution.
        keys: Number of keys that are pressed, at least 1.
        slips: Probability that the pupil presses another key than the next one, in [0, 1).
        in_words: Answers are accounts in words.
        seed: Seed of runs, slips and words; equal seeds give equal datasets.

    Returns:
        Splits `train` and `held_out` with the columns `prompt`, `completion` (the pupil's thought
        and the answer it leads to) and `answer` (the right one).

    Raises:
        ValueError: An argument out of range, or more runs asked for than there are.
    """
    _check(train, held_out, keys, slips)
    rng = random.Random(seed)
    runs: dict[str, dict[str, str]] = {}
    while len(runs) < train + held_out:
        program = tuple(rng.choices(list(KEYS), k=keys))
        start = rng.randrange(100)
        end = press(program, (start,))[-1][0]
        prompt = f"{' '.join(program)} from {start:02d}\n"
        if end == start or prompt in runs:
            continue
        shown = list(_pupils(rng, program, start, slips))
        thought = " ".join(f"{display:02d}" for display in shown)
        runs[prompt] = {
            "prompt": prompt,
            "completion": f"{thought}{MARKER} {_answer(rng, start, shown[-1], in_words)}",
            "answer": _answer(rng, start, end, in_words),
        }
    rows = list(runs.values())
    return DatasetDict(
        {
            "train": Dataset.from_list(rows[held_out:]),
            "held_out": Dataset.from_list(rows[:held_out]),
        }
    )


def _pupils(rng: random.Random, program: Sequence[str], start: int, slips: float) -> Iterator[int]:
    """What a careless pupil reads after each key."""
    shown = start
    for key in program:
        if rng.random() < slips:
            key = rng.choice([other for other in KEYS if other != key])
        shown = KEYS[key](shown)
        yield shown


def _answer(rng: random.Random, start: int, end: int, in_words: bool) -> str:
    if not in_words:
        return f"{end:02d}"
    growth = (end > start) - (end < start)
    remarks = [rng.choice(PARITIES[end % 2]), rng.choice(GROWTHS[1 + growth])]
    rng.shuffle(remarks)
    return f"{rng.choice(OPENINGS)} {end:02d} , {remarks[0]} , {remarks[1]}"


def _check(train: int, held_out: int, keys: int, slips: float) -> None:
    for name, size in (("train", train), ("held_out", held_out), ("keys", keys)):
        if size < 1:
            raise ValueError(f"{name}={size}: nothing would be left to do. Ask for at least 1.")
    if not 0 <= slips < 1:
        raise ValueError(
            f"slips={slips} is the probability of a slip at each key. Give one in [0, 1): whoever "
            "always slips shows nothing."
        )
    most = 100 * len(KEYS) ** keys // 2
    if train + held_out > most:
        raise ValueError(
            f"train={train} and held_out={held_out} at keys={keys}: only {most} runs are handed "
            "out, half of all prompts. Ask for fewer, or for more keys."
        )
