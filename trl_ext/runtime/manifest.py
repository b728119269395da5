"""Which checkpoints are whole: a list of hashes, written last.

A checkpoint whose manifest is missing was cut off while it was written; one whose files differ from
their hashes was damaged later. The host resumes from both, from fresh optimizer state if need be,
and says nothing.
"""

import hashlib
import json
import os
from pathlib import Path

from transformers.utils import logging

logger = logging.get_logger(__name__)

MANIFEST = "trl_ext_manifest.json"


def write_manifest(folder: str) -> None:
    """Hashes every file of a checkpoint; call it when nothing is left to write."""
    root = Path(folder)
    files = sorted(p for p in root.rglob("*") if p.is_file() and p.name != MANIFEST)
    hashes = {str(p.relative_to(root)): _sha256(p) for p in files}
    partial = root / f"{MANIFEST}.partial"
    partial.write_text(json.dumps(hashes, indent=1))
    os.replace(partial, root / MANIFEST)


def damage(folder: str | Path) -> str | None:
    """One phrase on what is wrong with a checkpoint; None for a whole one."""
    root = Path(folder)
    try:
        hashes = json.loads((root / MANIFEST).read_text())
    except (OSError, ValueError):
        return "its manifest is missing or unreadable: it was not written to the end"
    for name, expected in hashes.items():
        if not (root / name).is_file():
            return f"{name} is missing"
        if _sha256(root / name) != expected:
            return f"{name} has changed since it was written"
    return None


def sound_checkpoint(wanted: str | bool | None, output_dir: str) -> str | bool | None:
    """The checkpoint to resume from: the wanted one if it is whole, else the last whole one before.

    Args:
        wanted: what `train(resume_from_checkpoint=...)` was given: a folder, True for the last one
            in `output_dir`, or nothing.
        output_dir: where the run keeps its checkpoints.

    Returns:
        A folder, or `wanted` itself where no checkpoint has a manifest, as after another trainer.

    Raises:
        ValueError: none is whole.
    """
    if not wanted:
        return wanted
    parent = Path(output_dir) if wanted is True else Path(wanted).parent
    folders = _newest_first(parent)
    if not any((folder / MANIFEST).is_file() for folder in folders):
        return wanted
    if wanted is not True:
        number = _number(Path(wanted))
        folders = [Path(wanted), *(folder for folder in folders if _number(folder) < number)]
    for folder in folders:
        problem = damage(folder)
        if problem is None:
            return str(folder)
        logger.warning(f"{folder} is damaged ({problem}): falling back to the checkpoint before.")
    raise ValueError(
        f"resume_from_checkpoint={wanted!r}: no checkpoint beside {folders[0]} is whole. To start "
        "from the weights of a damaged one, pass its folder as the model of a new run."
    )


def _newest_first(parent: Path) -> list[Path]:
    found = [f for f in parent.glob("checkpoint-*") if f.is_dir() and _number(f) >= 0]
    return sorted(found, key=_number, reverse=True)


def _number(folder: Path) -> int:
    number = folder.name.removeprefix("checkpoint-")
    return int(number) if number.isdecimal() else -1


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
