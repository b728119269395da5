"""The runs: every method from one start on each seed, measured on the way, at a rate of its own.

Rates come from a sweep that gives each method the same grid, steps and seed, a seed that is not
reported: `--sweep`. Chosen is the highest accuracy − β KL at the end.
"""

import json
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from methods import OFFLINE, ONLINE, make_trainer
from rich.progress import track
from transformers import TrainerCallback
from world import SMALL, Size, World, load_policy, make_world, measure

from trl_ext.studies import fit, quiet_process

METHODS = (*OFFLINE, *ONLINE)
RATES = {
    "agro": 1e-4,
    "grpo": 4e-4,
    "grpo_old": 5e-5,
    "dpo": 5e-5,
    "topr": 2.5e-5,
    "agro_on": 8e-4,
    "grpo_on": 8e-4,
    "rloo_on": 4e-4,
}
GRID = (2.5e-5, 5e-5, 1e-4, 2e-4, 4e-4, 8e-4, 1.6e-3)
SWEEP_SEED = 100
SAVED = ("agro", "agro_on")  # with a card; TRL writes its own for its trainers
Row = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """How much is run.

    Attributes:
        steps: optimizer steps of each run.
        measured: steps after which the policy is measured.
        samples: stories per held-out prompt.
        world: how much of a world is made.
    """

    steps: int = 64
    measured: tuple[int, ...] = (8, 16, 32, 64)
    samples: int = 4
    world: Size = field(default_factory=Size)


QUICK = Plan(steps=2, measured=(1, 2), samples=1, world=SMALL)


@dataclass(frozen=True)
class Job:
    """One run."""

    folder: Path
    seed: int
    method: str
    rate: float
    plan: Plan


class Curve(TrainerCallback):
    """Measures the policy on the way; training is the same to the bit with and without it."""

    def __init__(self, world: World, plan: Plan) -> None:
        self.world, self.plan = world, plan
        self.points: list[Row] = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step in self.plan.measured and model is not None:
            found = measure(self.world, model, samples=self.plan.samples, seed=args.seed)
            self.points.append({"step": state.global_step, **found})


def study(folder: Path, seeds: Sequence[int], quick: bool, processes: int) -> list[Row]:
    """Runs every method on every seed and keeps the rows in `folder/task.json`.

    Args:
        folder: holds the worlds, which are made where missing, and the saved policies.
        seeds: of worlds, training and sampling.
        quick: only enough to see that everything runs.
        processes: runs at a time, one core each.

    Returns:
        One row per seed, method and measured step; the SFT policy is the method `start`, step 0.
    """
    plan = QUICK if quick else Plan()
    jobs = [Job(folder, seed, m, RATES[m], plan) for seed in seeds for m in METHODS]
    return run_jobs(folder / "task.json", jobs, processes)


def sweep(folder: Path, quick: bool, processes: int) -> list[Row]:
    """Each method at each rate of the grid, measured at the end; kept in `folder/sweep.json`."""
    plan = QUICK if quick else Plan(measured=(Plan.steps,))
    jobs = [Job(folder, SWEEP_SEED, m, rate, plan) for m in METHODS for rate in GRID]
    return run_jobs(folder / "sweep.json", jobs, processes)


def run_jobs(path: Path, jobs: list[Job], processes: int) -> list[Row]:
    """The rows of all jobs, each world made once before its runs."""
    first = list({job.seed: job for job in jobs}.values())
    with pool_of(processes) as pool:
        each = pool.map if pool else map
        rows = list(track(each(start_row, first), "starts", len(first), transient=True))
        for found in track(each(rows_of, jobs), "runs", len(jobs), transient=True):
            rows += found
            path.write_text(json.dumps(rows, indent=1))
    return rows


def pool_of(processes: int) -> AbstractContextManager[ProcessPoolExecutor | None]:
    """Processes of their own, or this one."""
    if processes == 1:
        return nullcontext()
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(processes, context, quiet_process)


def start_row(job: Job) -> Row:
    """The point from which all runs of a seed start."""
    world = make_world(job.folder, job.seed, job.plan.world)
    found = measure(world, load_policy(world), samples=job.plan.samples, seed=job.seed)
    return {"seed": job.seed, "method": "start", "rate": 0.0, "step": 0, **found}


def rows_of(job: Job) -> list[Row]:
    """Trains, measures on the way, and saves some of the policies with their cards."""
    world = make_world(job.folder, job.seed, job.plan.world)
    curve, home = Curve(world, job.plan), job.folder / f"task-{job.seed}" / job.method
    trainer = make_trainer(
        world, job.method, job.rate, seed=job.seed, folder=home, steps=job.plan.steps
    )
    trainer.add_callback(curve)
    fit(trainer)
    if job.method in SAVED:
        trainer.save_model()
        trainer.log(curve.points[-1])  # where the card looks for results
        trainer.create_model_card(model_name=f"stories-{job.method.replace('_', '-')}")
    return [
        {"seed": job.seed, "method": job.method, "rate": job.rate, **point}
        for point in curve.points
    ]
