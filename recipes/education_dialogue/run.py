"""Learning to teach from preferences between whole conversations, on a CPU, in minutes.

    python recipes/education_dialogue/run.py [--seeds 0 1 2] [--sweep] [--quick]

MTPO and MTPO-τ against multi-turn and single-turn RLHF with a learned reward (arXiv:2405.14655).
"""

import time

from report import report, sweep_table
from rich.console import Console
from study import study, sweep

from trl_ext.studies import quiet_process, study_options


def main() -> None:
    parser = study_options(__doc__, "runs/education_dialogue")
    parser.add_argument("--sweep", action="store_true", help="instead, the learning rates")
    given = parser.parse_args()
    quiet_process()
    started = time.perf_counter()
    console = Console()
    if given.sweep:
        console.print(sweep_table(sweep(given.folder, given.quick, given.processes)))
    else:
        figures = study(given.folder, given.seeds, given.quick, given.processes)
        report(figures, given.folder, console)
    console.print(f"{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
