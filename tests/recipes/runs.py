"""Recipes as their users run them, and their modules, which go by plain names."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

from tests.sources import ROOT


def quick_run(recipe: str, folder: Path, *words: str) -> str:
    """What `run.py --quick` says, in a process of its own; results land in `folder`."""
    command = [sys.executable, str(ROOT / "recipes" / recipe / "run.py"), "--quick"]
    run = subprocess.run(
        [*command, "--folder", str(folder), *words],
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "160"},
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout


@contextmanager
def modules_of(recipe: str) -> Iterator[SimpleNamespace]:
    """The recipe's modules by name; other recipes have modules of the same names."""
    folder = ROOT / "recipes" / recipe
    names = [path.stem for path in folder.glob("*.py")]
    others = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    sys.path.insert(0, str(folder))
    yield SimpleNamespace(**{name: import_module(name) for name in names})
    sys.path.remove(str(folder))
    for name in names:
        del sys.modules[name]
    sys.modules.update(others)
