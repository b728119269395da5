"""`python -m tests.resume_report`: a resume at each step, compared with the uninterrupted run."""

import tempfile
from pathlib import Path

import trl
from rich.console import Console
from rich.progress import track
from rich.table import Table

import tests.conftest  # noqa: F401  the settings of every test
from tests.runs import OURS
from tests.trainers.test_resume import WINDOWS, differences


def main() -> None:
    table = Table("Trainer", "Setting", "largest difference after a resume at step 1, 2, …")
    cases = [(trainer, window) for trainer in (*OURS, trl.GRPOTrainer) for window in WINDOWS]
    for trainer, window in track(cases, "Resuming"):
        with tempfile.TemporaryDirectory() as folder:
            found = differences(trainer, Path(folder), **WINDOWS[window])
        shown = ", ".join("0.0" if d == 0 else f"{d:.1e}" for d, _ in found.values())
        host = "TRL" if trainer is trl.GRPOTrainer else "trl_ext"
        table.add_row(f"{host}.{trainer.__name__}", window, shown)
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
