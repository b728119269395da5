"""A record of what a run sampled, scored and trained on: Parquet, one file per round and process.

A round's file is written when the round begins, whole or not at all. A resumed run writes the
rounds that it samples again under the same names: its record equals that of an uninterrupted run.
"""

import os
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet


def write_round(folder: str, number: int, rank: int, step: int, rows: list[dict[str, Any]]) -> None:
    """Writes one round of one process.

    Args:
        folder: where the record is kept; made if missing.
        number: index of the round in the run.
        rank: index of the process.
        step: optimizer steps made when the round began.
        rows: one per group, in the order of training.
    """
    path = Path(folder) / f"round-{number:06d}-rank-{rank:03d}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    where = {"round": number, "rank": rank, "step": step}
    table = pyarrow.Table.from_pylist([{**where, **row} for row in rows])
    partial = path.with_suffix(".partial")
    pyarrow.parquet.write_table(table, partial)
    os.replace(partial, path)
