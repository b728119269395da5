"""Learning to teach from preferences between whole conversations, on a CPU, in minutes.

    python recipes/education_dialogue/run.py [--seeds 0 1 2] [--quick]

MTPO and MTPO-τ against multi-turn and single-turn RLHF with a learned reward (arXiv:2405.14655).
"""

import argparse
import time
from pathlib import Path

from report import report
from rich.console import Console
from study import study

from trl_ext.studies import quiet_process


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/education_dialogue"))
    parser.add_argument("--processes", type=int, default=2, help="training runs at a time")
    parser.add_argument("--quick", action="store_true", help="only see that everything runs")
    given = parser.parse_args()
    quiet_process()
    started = time.perf_counter()
    figures = study(given.folder, given.seeds, given.quick, given.processes)
    console = Console()
    report(figures, given.folder, console)
    console.print(f"{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
