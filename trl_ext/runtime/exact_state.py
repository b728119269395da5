"""What a checkpoint must add to the host's so that a resumed run equals the uninterrupted one.

Two files per process, `trl_ext_window_<rank>.safetensors` and `trl_ext_state_<rank>.json`: the
generation window in use, and counters, metrics and logs; and once `trl_ext_<name>.safetensors` for
each frozen policy that changes during the run, such as a synchronised reference. No pickle.
"""

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor, nn
from transformers.utils import logging

logger = logging.get_logger(__name__)

Window = list[dict[str, Any]]


def _paths(folder: str, rank: int) -> tuple[Path, Path]:
    root = Path(folder)
    return root / f"trl_ext_window_{rank}.safetensors", root / f"trl_ext_state_{rank}.json"


def save_exact_state(folder: str, rank: int, window: Window | None, values: dict[str, Any]) -> None:
    """Writes the state of one process into a checkpoint folder.

    Args:
        folder: an existing checkpoint folder.
        rank: index of the process.
        window: micro-batches of the generation window; tensors, or JSON-able values.
        values: JSON-able, floats survive exactly; what is not becomes its text.
    """
    tensors, rest = {}, []
    for i, batch in enumerate(window or []):
        for key, value in batch.items():
            if isinstance(value, Tensor):
                # Micro-batches are views of one storage, which safetensors refuses to share.
                tensors[f"{i}.{key}"] = value.detach().cpu().contiguous().clone()
        rest.append({k: v for k, v in batch.items() if not isinstance(v, Tensor)})
    window_path, state_path = _paths(folder, rank)
    _replace(window_path, lambda path: save_file(tensors, path))
    state = {"window": None if window is None else rest, "values": values}
    # A reward function may log anything beside its completions; its text is enough for a table.
    text = json.dumps(state, default=str)
    _replace(state_path, lambda path: path.write_text(text))


def _replace(path: Path, write: Any) -> None:
    """A reader sees the whole file or none."""
    partial = path.with_name(path.name + ".partial")
    write(partial)
    os.replace(partial, path)


def load_exact_state(
    folder: str, rank: int, device: torch.device
) -> tuple[Window | None, dict[str, Any]] | None:
    """Reads what `save_exact_state` wrote, tensors on `device`.

    Returns:
        Window and values, or None, said aloud, where the checkpoint has no state for this process:
        it was written by another trainer or by another number of processes.
    """
    window_path, state_path = _paths(folder, rank)
    if not (window_path.is_file() and state_path.is_file()):
        logger.warning(
            f"{folder} holds no trl_ext state for process {rank}: training goes on from its "
            "weights, but samples the generation window anew and will not equal the uninterrupted "
            "run. Such a checkpoint was written by another trainer or by another number of "
            "processes."
        )
        return None
    state = json.loads(state_path.read_text())
    window = state["window"]
    if window is not None:
        for name, value in load_file(window_path).items():
            i, key = name.split(".", 1)
            window[int(i)][key] = value.to(device)
    return window, state["values"]


def _weights_path(folder: str, name: str) -> Path:
    return Path(folder) / f"trl_ext_{name}.safetensors"


def save_policy(folder: str, model: nn.Module, name: str = "reference") -> None:
    """Writes a frozen policy that changes during training: the reference, or a snapshot."""
    _replace(_weights_path(folder, name), lambda path: save_model(model, str(path)))


def load_policy(folder: str, model: nn.Module, name: str = "reference") -> None:
    """Reads the policy of `save_policy` in place.

    Raises:
        FileNotFoundError: the checkpoint has none, so that the run would be pulled elsewhere.
    """
    path = _weights_path(folder, name)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing: the checkpoint was written with other options (for the reference, "
            "sync_ref_model=False). Resume with those, or start from its weights as a new run."
        )
    load_model(model, str(path))
