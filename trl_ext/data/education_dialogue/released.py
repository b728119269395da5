"""The conversations that the paper's authors released."""

import hashlib
import tempfile
import urllib.request
from http.client import HTTPException
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset, config

RELEASED = (
    "https://raw.githubusercontent.com/google-research-datasets/Education-Dialogue-Dataset/main"
)
FILES = {
    "train": [f"conversations_train{i}.json" for i in range(1, 6)],
    "test": ["conversations_eval.json"],
}
TIMEOUT = 60  # seconds without an answer
ROLES = {"teacher": "assistant", "student": "user"}
SPELT = {"preference": "prefrences", "reaction": "reactions"}  # in the files
IS_IT = "Is `source` the Education Dialogue Dataset?"


def load_education_dialogue(
    split: Literal["train", "test"] = "train", source: str = RELEASED
) -> Dataset:
    """Reads the conversations that the paper's authors released, 40,000 and 7,234.

    Args:
        split: "train" or "test".
        source: address or folder of the JSON files, by default the authors' repository. What is
            fetched stays in the cache of `datasets`.

    Returns:
        Columns `topic`, `student_preference`, `student_reaction`, `teacher_preference`,
        `teacher_reaction`, and `messages`, in which the teacher is the assistant and told the topic
        only.

    Raises:
        ValueError: another split, a field that is missing, or a turn of somebody else than teacher
            and student.
    """
    if split not in FILES:
        raise ValueError(f"split={split!r} was not released. Give one of {', '.join(FILES)}.")
    files: list[Any] = [_local(f"{source}/{name}") for name in FILES[split]]
    rows = Dataset.from_json(files)
    assert isinstance(rows, Dataset)
    return rows.map(_released_row, remove_columns=rows.column_names)


def _local(file: str) -> str:
    """Path of the file, fetched once if it is an address."""
    if not file.startswith(("https://", "http://")):
        return file
    # Not left to `datasets`, which reads addresses only where aiohttp happens to be installed.
    folder = Path(config.DOWNLOADED_DATASETS_PATH)
    path = folder / f"{hashlib.sha256(file.encode()).hexdigest()}.json"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        try:
            _fetch(file, path)
        except (OSError, HTTPException) as error:
            error.add_note(
                f"source: {file} could not be fetched. Download the files and give their folder."
            )
            raise
    return str(path)


def _fetch(address: str, path: Path) -> None:
    with (
        urllib.request.urlopen(address, timeout=TIMEOUT) as answer,
        tempfile.TemporaryDirectory(dir=path.parent) as scratch,
    ):
        part = Path(scratch, path.name)
        part.write_bytes(answer.read())
        part.replace(path)  # whole, or not at all


def _released_row(row: dict) -> dict:
    background = _field(row, "background_info")
    topic = _field(background, "topic")
    system = f"You are a teacher. Teach the student this topic: {topic}"
    messages = [{"role": "system", "content": system}]
    for turn in _field(row, "conversation"):
        role = ROLES.get(str(_field(turn, "role")).casefold())
        if role is None:
            raise ValueError(
                f"role={turn['role']!r} in a conversation about {topic!r}: expected Teacher or "
                f"Student. {IS_IT}"
            )
        messages.append({"role": role, "content": _field(turn, "text")})
    parts = [(who, what) for who in ("student", "teacher") for what in ("preference", "reaction")]
    told = {f"{who}_{what}": _field(background, f"{who}_{SPELT[what]}") for who, what in parts}
    return {"topic": topic, **told, "messages": messages}


def _field(record: dict, name: str) -> Any:
    if name not in (record or ()):
        raise ValueError(f"source: no {name!r} in {record!r:.80}. {IS_IT}")
    return record[name]
