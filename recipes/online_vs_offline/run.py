"""Two studies of learning from preferences, in a toy world, on a CPU, in minutes.

    python recipes/online_vs_offline/run.py [--study sources|async|all] [--seeds 0 1 2] [--quick]

`sources`: online against offline pairs, and replays of the online ones (arXiv:2405.08448).
`async`: what training on samples of older weights costs and saves (arXiv:2410.18252).
"""

import argparse
import time
from pathlib import Path

import asynchronous
import asynchronous_report
import sources
import sources_report
from rich.console import Console

STUDIES = {
    "sources": (sources.study, sources_report.report),
    "async": (asynchronous.study, asynchronous_report.report),
}


def main() -> None:
    given = parse_options()
    console = Console()
    sources.set_up_process()
    for name in STUDIES if given.study == "all" else [given.study]:
        study, report = STUDIES[name]
        started = time.perf_counter()
        rows = study(given.folder, given.seeds, given.quick, given.processes)
        report(rows, given.folder, console)
        console.print(f"Study {name}: {time.perf_counter() - started:.0f} s\n")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--study", choices=[*STUDIES, "all"], default="all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/online_vs_offline"))
    parser.add_argument("--processes", type=int, default=2, help="training runs at a time")
    parser.add_argument("--quick", action="store_true", help="only see that everything runs")
    return parser.parse_args()


if __name__ == "__main__":
    main()
