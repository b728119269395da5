"""Credit for steps against credit for whole completions, in a toy world, on a CPU, in minutes.

python recipes/vineppo/run.py [--seeds 0 1 2] [--sweep] [--quick]
"""

import dataclasses
import time

from report import report
from rich.console import Console
from study import QUICK, RATES, Plan, study

from trl_ext.studies import quiet_process, study_options


def main() -> None:
    parser = study_options(__doc__, "runs/vineppo")
    parser.add_argument("--sweep", action="store_true", help="every learning rate, not the chosen")
    given = parser.parse_args()
    plan = QUICK if given.quick else Plan()
    if given.sweep:
        plan = dataclasses.replace(plan, rates=RATES)
    quiet_process()
    started = time.perf_counter()
    rows = study(given.folder, given.seeds, plan, given.processes)
    console = Console()
    report(rows, given.folder, console)
    console.print(f"Time: {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
