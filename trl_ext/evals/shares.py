"""Works off a dataset in chunks, all processes together, without touching anybody's random state.

Composition and seed of a chunk depend on nothing but the arguments, and processes share out whole
chunks: any number of them finds the same rows.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from accelerate import PartialState
from accelerate.utils import extract_model_from_parallel, gather_object, parse_flag_from_env
from datasets import Dataset
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from trl_ext.evals.sampling import own_random_state, seed_everything
from trl_ext.modes import evaluation_mode

Row = TypeVar("Row")
Columns = dict[str, list[Any]]


def rows_of_all_processes(
    rows_of: Callable[[int, Columns], list[Row]],
    dataset: Dataset,
    model: PreTrainedModel,
    *,
    size: int,
    seed: Sequence[int] = (0,),
    title: str,
    disable_tqdm: bool = False,
) -> list[Row]:
    """What `rows_of` makes of each chunk of the dataset, in the order of the dataset.

    Args:
        rows_of: from the number of the chunk's first row, and its columns, to any number of small
            picklable objects. It runs in evaluation mode, under a seed of its own.
        model: put into evaluation mode; its device is the one that is seeded.
        size: rows of the dataset per chunk.
        seed: integers that go into each chunk's seed.
        title: of the progress bar.
    """
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    mine = range(state.process_index * size, len(dataset), state.num_processes * size)
    silent = disable_tqdm or not state.is_main_process
    device = next(model.parameters()).device
    chunks = []
    with evaluation_mode(model), own_random_state(device):
        for start in tqdm(mine, title, disable=silent, leave=False):
            seed_everything(device, *seed, start)
            chunks.append((start, rows_of(start, dataset[start : start + size])))
    ordered = sorted(gather_object(chunks), key=lambda chunk: chunk[0])
    return [row for _, rows in ordered for row in rows]


def whole_model(model: PreTrainedModel) -> PreTrainedModel:
    """The model under its wrappers; refuses one whose weights are spread over processes."""
    modules = list(model.modules())
    if any(isinstance(module, (FSDPModule, FullyShardedDataParallel)) for module in modules):
        sharding = "FSDP"
    elif any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        sharding = "DeepSpeed ZeRO-3"
    else:
        return extract_model_from_parallel(model)
    raise ValueError(
        f"model is sharded by {sharding}: each process works off its own prompts, which needs all "
        "weights in each process. Train with DDP or ZeRO-2, or save a checkpoint and evaluate it "
        "in a script of its own."
    )


def first_rows(
    dataset: Dataset, max_prompts: int | None, columns: Sequence[str] = ("prompt",)
) -> Dataset:
    """The first rows of a dataset that has the columns; refuses any other."""
    if not isinstance(dataset, Dataset):
        raise ValueError(
            f"dataset is a {type(dataset).__name__}: every process must be able to pick its "
            "prompts by number. Give a datasets.Dataset (`Dataset.from_list(list(rows))`)."
        )
    missing = [name for name in columns if name not in dataset.column_names]
    if missing or len(dataset) == 0:
        raise ValueError(
            f"dataset has {len(dataset)} rows and columns {dataset.column_names}: nothing to "
            f"evaluate. Give at least one row and the columns {list(columns)}."
        )
    return dataset if max_prompts is None else dataset.take(min(max_prompts, len(dataset)))
