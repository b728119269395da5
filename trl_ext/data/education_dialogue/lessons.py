"""Lessons, and the conversations of a clumsy teacher to start from."""

import math
import random
import re
from typing import Any

from datasets import Dataset, DatasetDict

from trl_ext.data.education_dialogue.classroom import END, REACTIONS, STYLES, Classroom

Message = dict[str, Any]

THINGS = (
    *("lava", "moon", "bread", "glass", "wind", "tide", "seed", "bone", "salt", "fire", "rain"),
    *("steel", "honey", "silk", "paper", "clock", "wheel", "bridge", "forest", "desert"),
)
THINGS_PER_LESSON = 3
MOST_HELD_OUT = math.comb(len(THINGS), THINGS_PER_LESSON) // 2


def education_lessons(train: int = 2000, held_out: int = 128, *, seed: int = 0) -> DatasetDict:
    """Draws lessons, each with a student whose preference the prompt does not tell.

    Args:
        train: Number of training lessons; the same things may return with another student.
        held_out: Number of held-out lessons, whose sets of things are distinct and in no training
            lesson; at most half of all sets.
        seed: Seed of the lessons; equal seeds give equal datasets.

    Returns:
        Splits `train` and `held_out` with the columns `prompt` (one message), `things`,
        `preference`, `reaction`: what `Classroom.reset` takes.

    Raises:
        ValueError: An empty split, or too many held-out lessons.
    """
    for name, size in (("train", train), ("held_out", held_out)):
        if size < 1:
            raise ValueError(f"{name}={size}: the split would be empty. Ask for at least 1 lesson.")
    if held_out > MOST_HELD_OUT:
        raise ValueError(
            f"held_out={held_out}: more than half of the sets of things would be held out. Ask for "
            f"at most {MOST_HELD_OUT}."
        )
    rng = random.Random(seed)
    secret: dict[frozenset[str], dict] = {}
    while len(secret) < held_out:
        row = _lesson(rng)
        secret.setdefault(frozenset(row["things"]), row)
    rows: list[dict] = []
    while len(rows) < train:
        row = _lesson(rng)
        if frozenset(row["things"]) not in secret:
            rows.append(row)
    return DatasetDict(
        {"train": Dataset.from_list(rows), "held_out": Dataset.from_list([*secret.values()])}
    )


def education_demonstrations(lessons: Dataset, *, seed: int = 0) -> Dataset:
    """Conversations of a clumsy teacher: what supervised learning starts from.

    Half the time the teacher overhears what the student likes, sometimes speaks of something else
    or says a thing twice, and now and then gives up early.

    Args:
        lessons: a split of `education_lessons`.
        seed: Seed of the teacher.

    Returns:
        Columns `prompt` and `completion`, both messages. The teacher's turns are calls of the tool
        `say`, the last one a plain farewell.
    """
    rng, rows = random.Random(seed), []
    for lesson in lessons:
        assert isinstance(lesson, dict)
        rows.append({"prompt": lesson["prompt"], "completion": _demonstrate(rng, lesson)})
    return Dataset.from_list(rows)


def teacher_says(message: str) -> Message:
    """The teacher's turn as a message: one call of the tool `say`."""
    call = {"name": "say", "arguments": {"message": message}}
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": call}],
    }


def _lesson(rng: random.Random) -> dict:
    things = rng.sample(THINGS, THINGS_PER_LESSON)
    text = f"teach your student about {' , '.join(things[:-1])} and {things[-1]}"
    return {
        "prompt": [{"role": "user", "content": text}],
        "things": things,
        "preference": rng.choice([*STYLES]),
        "reaction": rng.choice(REACTIONS),
    }


def _demonstrate(rng: random.Random, lesson: dict) -> list[Message]:
    classroom = Classroom()
    classroom.reset(**lesson)
    style, answer, messages = rng.choice([*STYLES]), "", []
    while END not in answer and rng.random() < 0.95:
        hint = re.search(r"i like a (\w+)", answer)
        if hint and rng.random() < 0.5:
            style = hint[1]
        of_lesson = rng.random() < 0.85
        thing = rng.choice(lesson["things"] if of_lesson else THINGS)
        message = f"a {style} about {thing}"
        answer = classroom.say(message)
        messages += [teacher_says(message), {"role": "tool", "name": "say", "content": answer}]
    return [*messages, {"role": "assistant", "content": "goodbye"}]
