"""Two studies of learning from preferences, in a toy world, on a CPU, in minutes.

    python recipes/online_vs_offline/run.py [--study sources|async|all] [--seeds 0 1 2] [--quick]

`sources`: online against offline pairs, and replays of the online ones (arXiv:2405.08448).
`async`: what training on samples of older weights costs and saves (arXiv:2410.18252).
"""

import argparse
import time

import asynchronous
import asynchronous_report
import sources
import sources_report
from rich.console import Console

from trl_ext.studies import quiet_process, study_options

STUDIES = {
    "sources": (sources.study, sources_report.report),
    "async": (asynchronous.study, asynchronous_report.report),
}


def main() -> None:
    given = parse_options()
    console = Console()
    quiet_process()
    for name in STUDIES if given.study == "all" else [given.study]:
        study, report = STUDIES[name]
        started = time.perf_counter()
        rows = study(given.folder, given.seeds, given.quick, given.processes)
        report(rows, given.folder, console)
        console.print(f"Study {name}: {time.perf_counter() - started:.0f} s\n")


def parse_options() -> argparse.Namespace:
    parser = study_options(__doc__, "runs/online_vs_offline")
    parser.add_argument("--study", choices=[*STUDIES, "all"], default="all")
    return parser.parse_args()


if __name__ == "__main__":
    main()
