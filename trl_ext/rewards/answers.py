"""Rewards that compare text with text, for tasks whose answer has one spelling."""

from collections.abc import Sequence
from typing import Any

from trl_ext.completions import Completion, completion_texts
from trl_ext.rewards._columns import references
from trl_ext.rewards.extract import last_boxed


def exact_match_reward(
    completions: Sequence[Completion], answer: Sequence[Any], **kwargs: Any
) -> list[float | None]:
    """Rewards a completion that is the reference and nothing else.

    r = 1[strip(y) = strip(a)]

    Args:
        completions: `B` strings, or `B` conversations whose last assistant message counts.
        answer: `B` references.
        **kwargs: other columns and TRL's extras, unused.

    Returns:
        `B` values, 1.0 or 0.0; None where the reference is None or blank, so that the row
        is left out.

    Raises:
        ValueError: if `answer` does not hold one value per completion.
    """
    targets = references("answer", answer, len(completions))
    texts = [text.strip() for text in completion_texts(completions)]
    return [_equal(text, target) for text, target in zip(texts, targets, strict=True)]


def boxed_answer_reward(
    completions: Sequence[Completion], answer: Sequence[Any], **kwargs: Any
) -> list[float | None]:
    r"""Rewards a completion whose last `\boxed{…}` holds the reference: only the last box counts.

    r = 1[squeeze(last box of y) = squeeze(a)],   squeeze: each run of white space is one space

    Args:
        completions: `B` strings, or `B` conversations whose last assistant message counts.
        answer: `B` references, without a box.
        **kwargs: other columns and TRL's extras, unused.

    Returns:
        `B` values, 1.0 or 0.0; None where the reference is None or blank, so that the row
        is left out. No box and an empty box give 0.0.

    Raises:
        ValueError: if `answer` does not hold one value per completion.
    """
    targets = references("answer", answer, len(completions))
    boxes = [last_boxed(text) or "" for text in completion_texts(completions)]
    return [
        _equal(_squeeze(box), target and _squeeze(target))
        for box, target in zip(boxes, targets, strict=True)
    ]


def _equal(text: str, target: str | None) -> float | None:
    return None if target is None else float(text == target)


def _squeeze(text: str) -> str:
    return " ".join(text.split())
