"""Rewards the shape of a completion, whatever it says."""

import re
from collections.abc import Sequence
from typing import Any

from trl_ext.completions import Completion, completion_texts
from trl_ext.rewards.extract import last_boxed


def format_reward(
    completions: Sequence[Completion], *, pattern: str | None = None, **kwargs: Any
) -> list[float]:
    r"""Rewards `<think>…</think>` followed by an answer in `\boxed{…}`, or a pattern of yours.

    Args:
        completions: `B` strings, or `B` conversations whose last assistant message counts.
        pattern: regular expression for the whole text, in which `.` also matches a line break.
            None asks for one thought that is not blank, at the start, then a box that is not empty.
        **kwargs: other columns and TRL's extras, unused.

    Returns:
        `B` values, 1.0 or 0.0.

    Raises:
        ValueError: if `pattern` is not a regular expression.

    A chat template that opens the thought in the prompt leaves no `<think>` in the completion:
    then give a `pattern`.
    """
    texts = completion_texts(completions)
    if pattern is None:
        return [float(_thinks_then_boxes(text)) for text in texts]
    compiled = _compile(pattern)
    return [float(compiled.fullmatch(text) is not None) for text in texts]


def _thinks_then_boxes(text: str) -> bool:
    """Counts tags instead of matching a pattern, which would backtrack over every closing tag."""
    head, tag, tail = text.strip().partition("</think>")
    opened = head.startswith("<think>") and text.count("<think>") == 1
    closed = tag != "" and "</think>" not in tail
    return (
        opened
        and closed
        and head != "<think>"
        and not head[7:].isspace()
        and bool(last_boxed(tail))
    )


def _compile(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern, re.DOTALL)
    except (TypeError, re.error) as error:
        raise ValueError(
            f"pattern={pattern!r} is not a regular expression ({error}). Give one string; if the "
            "dataset has a column 'pattern', rename it, for TRL passes columns by name."
        ) from error
