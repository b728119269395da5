"""AGRO against policy gradients and DPO, by enumeration and on a task, on a CPU, in minutes.

    python recipes/agro/run.py [--study tabular|task|all] [--seeds 0 1 2] [--sweep] [--quick]

`tabular`: how far each rule gets to the optimum of the KL on completions of another policy.
`task`: stories with a verifiable reward; fixed data of the start policy, then samples.
"""

import time

from report import report_sweep, report_tabular, report_task
from rich.console import Console
from study import study, sweep
from tabular import study as tabular_study

from trl_ext.studies import quiet_process, study_options


def main() -> None:
    parser = study_options(__doc__, "runs/agro")
    parser.add_argument("--study", choices=["tabular", "task", "all"], default="all")
    parser.add_argument("--sweep", action="store_true", help="instead, the task's learning rates")
    given = parser.parse_args()
    console = Console()
    quiet_process()
    given.folder.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    if given.sweep:
        report_sweep(sweep(given.folder, given.quick, given.processes), console)
    if not given.sweep and given.study in ("tabular", "all"):
        report_tabular(tabular_study(given.folder, given.seeds, given.quick), given.folder, console)
    if not given.sweep and given.study in ("task", "all"):
        rows = study(given.folder, given.seeds, given.quick, given.processes)
        report_task(rows, given.folder, console)
    console.print(f"Time: {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
