"""The judge: which of two conversations of the same lesson was better?"""

from collections.abc import Sequence
from typing import Any

Message = dict[str, Any]

# First words of an answer, by which the judge knows it, and how the student feels.
MOODS = {"great !": 2, "okay .": 1, "again ?": 0, "what ?": -1, "hm .": -1}
LEARNED = ("great !", "okay .")


def education_judge(
    prompts: Sequence[Any], first: Sequence[Sequence[Message]], second: Sequence[Sequence[Message]]
) -> list[float]:
    """Compares whole conversations of the same lesson: P(first is better).

    Three questions have one vote each: in which did the student learn more, in which was the mood
    better (2 for delight, 1 for assent, −1 for each unhappy answer), and which was shorter? Answers
    are read from the messages of the tool, which a teacher cannot write.

    Args:
        prompts: N lessons, not read.
        first, second: N conversations each, as lists of messages.

    Returns:
        N values: 1 and 0 by the majority of the votes, 0.5 where there is none. Both orders add up
        to 1. Not transitive: each of three conversations can lose against the next.

    Raises:
        ValueError: a conversation that is not a list of messages.
    """
    pairs = zip(prompts, first, second, strict=True)
    return [_majority(_merits(one), _merits(other)) for _, one, other in pairs]


def _merits(conversation: Sequence[Message]) -> tuple[int, int, int]:
    """What was learned, the mood, and minus the number of turns."""
    if isinstance(conversation, str) or not all(isinstance(m, dict) for m in conversation):
        raise ValueError(
            f"conversation={conversation!r:.80} is no list of messages, and only these tell who "
            "said what. Use a conversational prompt."
        )
    answers = [m.get("content") for m in conversation if m.get("role") == "tool"]
    kinds = [kind for text in answers for kind in MOODS if str(text).startswith(kind)]
    learned = sum(kind in LEARNED for kind in kinds)
    return learned, sum(MOODS[kind] for kind in kinds), -len(answers)


def _majority(one: tuple[int, ...], other: tuple[int, ...]) -> float:
    votes = sum((a > b) - (a < b) for a, b in zip(one, other, strict=True))
    return 0.5 if votes == 0 else float(votes > 0)
