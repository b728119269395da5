"""What every reward reads from TRL's arguments: the completion's text and the row's reference."""

from collections.abc import Sequence
from typing import Any

Message = dict[str, Any]
Completion = str | Sequence[Message]


def completion_texts(completions: Sequence[Completion]) -> list[str]:
    """Gives the text of each completion: a string itself, or its last assistant message.

    Args:
        completions: `B` strings, or `B` lists of messages. A message without a role counts
            as the assistant's; content in parts is joined. No assistant text: the empty string.

    Returns:
        `B` strings.

    Raises:
        ValueError: if a completion is neither a string nor a list of messages.
    """
    return [_text(completion) for completion in completions]


def references(name: str, values: Sequence[Any] | None, rows: int) -> list[str | None]:
    """Gives the reference of each row, stripped; None where there is nothing to compare with.

    Args:
        name: the dataset column, for the error message.
        values: `B` strings or numbers; None and blank strings give None.
        rows: `B`, the number of completions.

    Raises:
        ValueError: if the column is missing, is one string, or does not have `B` values.
    """
    if values is None or isinstance(values, str):
        raise ValueError(
            f"{name}={values!r} is not a column of references: one value per completion is needed. "
            f"Add a column {name!r} to the dataset, or pass a list."
        )
    if len(values) != rows:
        raise ValueError(
            f"{name} has {len(values)} values for {rows} completions: each completion needs its "
            "own reference. Repeat the reference for the samples of one prompt."
        )
    return [None if value is None else str(value).strip() or None for value in values]


def _text(completion: Completion) -> str:
    if isinstance(completion, str):
        return completion
    if not isinstance(completion, Sequence):
        raise ValueError(
            f"completions holds a {type(completion).__name__}: only a string or a list of messages "
            "can be scored. Pass what TRL passes to `reward_funcs`."
        )
    for message in reversed(completion):
        if message.get("role", "assistant") == "assistant":
            return _content(message.get("content"))
    return ""


def _content(content: str | Sequence[Message] | None) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part.get("text") or "" for part in content)
