"""Learning to teach from preferences between whole conversations, on a CPU, in minutes.

    python recipes/education_dialogue/run.py [--seeds 0 1 2] [--sweep] [--long | --quick]

MTPO and MTPO-τ against multi-turn and single-turn RLHF with a learned reward (arXiv:2405.14655).
"""

import time

from report import report, sweep_table
from rich.console import Console
from study import LONG, QUICK, Plan, study, sweep

from trl_ext.studies import quiet_process, study_options


def main() -> None:
    parser = study_options(__doc__, "runs/education_dialogue")
    parser.add_argument("--sweep", action="store_true", help="instead, the learning rates")
    parser.add_argument("--long", action="store_true", help="four times as many steps")
    given = parser.parse_args()
    if given.long and given.quick:
        parser.error("--long and --quick: give one of them.")
    plan = LONG if given.long else QUICK if given.quick else Plan()
    quiet_process()
    started = time.perf_counter()
    console = Console()
    if given.sweep:
        console.print(sweep_table(sweep(given.folder, plan, given.processes)))
    else:
        figures = study(given.folder, given.seeds, plan, given.processes)
        report(figures, given.folder, console)
    console.print(f"{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
