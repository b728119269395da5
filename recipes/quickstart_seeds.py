"""The quickstart over several seeds: is its effect more than the luck of one?

    python recipes/quickstart_seeds.py [--seeds 0 1 2 3 4 5] [--processes 2]

Every seed has its own puzzles, weights and samples. Beside the three methods runs a control: GRPO
with the normaliser and the unscaled rewards of pass@k, so that nothing but the credit differs.
Prints Markdown: mean ± standard error over seeds, then the differences seed by seed.
"""

import argparse
import multiprocessing
import statistics
import tempfile
from concurrent.futures import ProcessPoolExecutor
from io import StringIO
from pathlib import Path

import torch
import trl
from quickstart import METHODS, Options, quieten, train_and_evaluate
from rich.console import Console

CONTROL = {
    "Dr. GRPO": (
        trl.GRPOTrainer,
        trl.GRPOConfig,
        {"loss_type": "dr_grpo", "scale_rewards": "none"},
    )
}
COLUMNS = ("pass@1", "pass@4", "pass@16", "maj@16")
Numbers = dict[str, dict[str, float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4, 5])
    parser.add_argument("--processes", type=int, default=2, help="seeds at a time, a core for each")
    given = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(given.processes, spawn) as pool:
        runs = []
        for seed, numbers in zip(given.seeds, pool.map(numbers_of, given.seeds), strict=True):
            runs.append(numbers)
            print(f"seed {seed}: pass@16 {rounded(numbers, 'pass@16')}", flush=True)
    print(f"\n{policy_table(runs)}\n\n{difference_table(given.seeds, runs)}")


def numbers_of(seed: int) -> Numbers:
    """Runs one seed and returns each policy's metrics."""
    quieten()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        steps = Options().steps
        options = Options(seed=seed, output_dir=Path(folder), eval_steps=steps)
        run = train_and_evaluate(options, METHODS | CONTROL, Console(file=StringIO()))
    return {policy: result.metrics("") for policy, result in run.results.items()}


def rounded(numbers: Numbers, column: str) -> str:
    return ", ".join(f"{policy} {metrics[column]:.3f}" for policy, metrics in numbers.items())


def policy_table(runs: list[Numbers]) -> str:
    rows = [f"| policy | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for policy in runs[0]:
        cells = [over_seeds([run[policy][column] for run in runs]) for column in COLUMNS]
        rows.append(f"| {policy} | {' | '.join(cells)} |")
    return "\n".join(rows)


def difference_table(seeds: list[int], runs: list[Numbers]) -> str:
    """pass@k training minus each GRPO, in pass@1 and pass@16."""
    rows = [
        f"| pass@k training − | metric | {' | '.join(f'seed {seed}' for seed in seeds)} | mean |",
        "|---" * (len(seeds) + 3) + "|",
    ]
    for other in ("GRPO", "Dr. GRPO"):
        for column in ("pass@16", "pass@1"):
            values = [run["pass@k"][column] - run[other][column] for run in runs]
            cells = [*(f"{value:+.3f}" for value in values), over_seeds(values)]
            rows.append(f"| {other} | {column} | {' | '.join(cells)} |")
    return "\n".join(rows)


def over_seeds(values: list[float]) -> str:
    """Mean ± standard error, the latter over seeds."""
    if len(values) < 2:
        return f"{values[0]:.3f}"
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values) / len(values) ** 0.5:.3f}"


if __name__ == "__main__":
    main()
