"""The record of an earlier run as a dataset, to be replayed in its order or in another."""

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset


def load_record(folder: str | Path) -> Dataset:
    """What a run with `record_path=folder` trained on, in its order.

    Args:
        folder: as given to the run.

    Returns:
        One row per group, of all processes: `round`, `rank`, `step`, `prompt`, `prompt_ids`,
        `completion_ids` and `rewards` of the completions that were trained on, `version` of the
        weights that sampled them, and what the loss kept of the scores, `selected_...`. With
        `pair_source="replay"`, `shuffle_dataset=False` and the batch sizes of that run, a trainer
        takes the same steps to the bit.

    Raises:
        FileNotFoundError: the folder holds no record.
    """
    files: list[Any] = sorted(str(p) for p in Path(folder).glob("round-*-rank-*.parquet"))
    if not files:
        raise FileNotFoundError(
            f"{folder} holds no record (round-*-rank-*.parquet): train with record_path={folder!s}."
        )
    dataset = Dataset.from_parquet(files)
    assert isinstance(dataset, Dataset)
    return dataset


def shuffled_in_blocks(dataset: Dataset, rows_per_block: int, seed: int = 0) -> Dataset:
    """Shuffles rows within successive blocks: from the order of a record to none at all.

    Args:
        dataset: rows in their order.
        rows_per_block: 1 keeps the order, the number of rows or more shuffles uniformly; a round
            has `generation_batch_size / num_generations` rows.
        seed: of the permutation.

    Raises:
        ValueError: `rows_per_block` is below 1.
    """
    if rows_per_block < 1:
        raise ValueError(f"rows_per_block={rows_per_block} must be at least 1, which keeps order.")
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    for start in range(0, len(dataset), rows_per_block):
        size = min(rows_per_block, len(dataset) - start)
        order += (start + torch.randperm(size, generator=generator)).tolist()
    return dataset.select(order)
