"""What rewards read from the dataset: the reference of each row."""

from collections.abc import Sequence
from typing import Any


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
