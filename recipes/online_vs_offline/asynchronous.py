"""Asynchronous RLHF: what it costs to train on samples of older weights, and what it saves.

    python recipes/online_vs_offline/asynchronous.py [--seeds 0] [--folder runs/online_vs_offline]

Staleness: a round samples N mini-batches with the same weights and then takes N optimizer steps on
them, so that the last is N − 1 steps off policy. Prompts, completions and optimizer steps are equal
for every N and every method; only the age of the samples differs.

Schedule: `sync` samples, then trains; `one_step` samples the next round while this one is trained
on. Quality is measured on held-out stories; time in runs of their own, with nothing beside them.

Dropped from the paper: PPO, which needs a value head.
Source: Noukhovitch et al., arXiv:2410.18252, sections 3 and 4.
"""

import json
import multiprocessing
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from asynchronous_report import report
from rich.progress import track
from transformers import TrainerCallback
from world import (
    MOST_TOKENS,
    NO_END,
    SMALL,
    Size,
    World,
    load_policy,
    make_world,
    measure,
    proxy_reward,
)

from trl_ext import OnlineDPOConfig, OnlineDPOTrainer
from trl_ext.studies import cpu_arguments, fit, quiet_process, study_options

# Of rates a factor of two apart, the one with the best gold win rate at N = 1 on seed 0.
METHODS: dict[str, dict[str, Any]] = {
    "Online DPO": {"loss_type": "sigmoid", "beta": 0.1, "learning_rate": 4e-4},
    "RLOO": {"loss_type": "rloo", "beta": 0.05, "learning_rate": 4e-4},
    "Proximal RLOO": {"loss_type": "proximal_rloo", "beta": 0.05, "learning_rate": 4e-4},
    "Best-of-2 SFT": {"loss_type": "best_of_k_sft", "learning_rate": 2e-4},
}
COMPARED = "Online DPO"  # between the schedules
PROMPTS, SAMPLES = 16, 2  # of a mini-batch, and of each prompt
SETTLING_ROUNDS = 2  # until the background sampler has started and is a round ahead
Row = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """How much is run.

    Attributes:
        steps: optimizer steps of each run, a multiple of four and of each N.
        mini_batches: values of N.
        compared: values of N at which the schedules are compared.
        timed_rounds: rounds over which time is averaged.
        samples: completions per held-out prompt.
        world: how much of a world is made; by default, what the other study makes.
    """

    steps: int = 128
    mini_batches: tuple[int, ...] = (1, 4, 16, 64)
    compared: tuple[int, ...] = (1, 4)
    timed_rounds: int = 12
    samples: int = 2
    world: Size | None = None


QUICK = Plan(
    steps=4,
    mini_batches=(1, 2),
    compared=(1,),
    timed_rounds=2,
    samples=1,
    world=SMALL,
)


@dataclass(frozen=True)
class Cell:
    """A training run of the study."""

    seed: int
    method: str
    mini_batches: int
    schedule: str = "sync"


class Curve(TrainerCallback):
    """What the policy is like after a quarter, a half and all of the steps."""

    def __init__(self, world: World, samples: int) -> None:
        self.world, self.samples = world, samples
        self.points: list[Row] = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step in (args.max_steps // 4, args.max_steps // 2, args.max_steps):
            measured = measure(self.world, model, samples=self.samples)
            self.points.append({"step": state.global_step, **measured})


class Stopwatch(TrainerCallback):
    """When each optimizer step ended, and how long each call of a watched function took."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.calls: list[float] = []

    def on_step_end(self, args, state, control, **kwargs):
        self.ends.append(time.perf_counter())

    def watched(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = function(*args, **kwargs)
            self.calls.append(time.perf_counter() - start)
            return result

        return timed


def study(folder: Path, seeds: Sequence[int], quick: bool = False, processes: int = 2) -> list[Row]:
    """Runs the study and keeps its rows in `folder/asynchronous.json`.

    Args:
        folder: holds the worlds, which are made where missing.
        seeds: of worlds, training and sampling.
        quick: only enough to see that everything runs.
        processes: training runs at a time, one core each; time is measured one run at a time.

    Returns:
        Rows of three kinds: `part` is "start" for the SFT policy, "quality" for a point of a
        training run, and "time" for a timing run.
    """
    plan = QUICK if quick else Plan()
    cells = cells_of(plan, seeds)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, quiet_process) as pool:
        rows = [*pool.map(partial(start_row, folder, plan), seeds)]  # makes the worlds
        found = pool.map(partial(quality_rows, folder, plan), cells)
        rows += [row for some in track(found, "Training", len(cells)) for row in some]
    world = make_world(folder, seeds[0], plan.world)
    for cell, threads in track(timings_of(plan, seeds[0]), "Timing"):
        rows.append(time_row(world, cell, plan.timed_rounds, threads))
    (folder / "asynchronous.json").write_text(json.dumps(rows, indent=1))
    return rows


def cells_of(plan: Plan, seeds: Sequence[int]) -> list[Cell]:
    """Every method at every N, and the other schedule of one method."""
    return [
        cell
        for seed in seeds
        for cell in (
            *(Cell(seed, method, N) for method in METHODS for N in plan.mini_batches),
            *(Cell(seed, COMPARED, N, "one_step") for N in plan.compared),
        )
    ]


def timings_of(plan: Plan, seed: int) -> list[tuple[Cell, int]]:
    """Runs and their threads: `one_step` has two processes, so `sync` is offered two threads too,
    once, as that can be very slow on a machine that does something else.
    """
    first, *rest = plan.compared
    two_threads = [(Cell(seed, COMPARED, first), 2)]
    alike = [
        (Cell(seed, COMPARED, N, schedule), 1)
        for N in (first, *rest)
        for schedule in ("sync", "one_step")
    ]
    return alike + two_threads


def start_row(folder: Path, plan: Plan, seed: int) -> Row:
    """The SFT policy, from which every curve starts."""
    world = make_world(folder, seed, plan.world)
    measured = measure(world, load_policy(world), samples=plan.samples)
    return {"part": "start", "seed": seed, "step": 0, **measured}


def quality_rows(folder: Path, plan: Plan, cell: Cell) -> list[Row]:
    """Trains as `cell` says and measures on the way."""
    world = make_world(folder, cell.seed, plan.world)
    curve = Curve(world, plan.samples)
    trainer = make_trainer(world, cell, plan.steps)
    trainer.add_callback(curve)
    fit(trainer)
    return [{"part": "quality", **asdict(cell), **point} for point in curve.points]


def time_row(world: World, cell: Cell, rounds: int, threads: int) -> Row:
    """Seconds per round once it has settled, and who waited for whom."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    N, watch = cell.mini_batches, Stopwatch()
    trainer = make_trainer(world, cell, (SETTLING_ROUNDS + rounds) * N)
    trainer.add_callback(watch)
    if cell.schedule == "sync":
        trainer.model.generate = watch.watched(trainer.model.generate)
    fit(trainer)
    torch.set_num_threads(before)
    row = {"part": "time", **asdict(cell), "threads": threads, "rounds": rounds}
    row["round_s"] = (watch.ends[-1] - watch.ends[SETTLING_ROUNDS * N - 1]) / rounds
    if cell.schedule == "sync":
        return row | {"generation_s": statistics.mean(watch.calls[-rounds:])}
    for name in ("generation_wait_s", "training_wait_s"):
        waits = [log[f"perf/{name}"] for log in trainer.state.log_history if f"perf/{name}" in log]
        row[name] = statistics.mean(waits[-rounds:])
    return row


def make_trainer(world: World, cell: Cell, steps: int) -> OnlineDPOTrainer:
    """Trains the SFT policy on the proxy's rewards, by the method of `cell`."""
    arguments = OnlineDPOConfig(
        **cpu_arguments(Path(world.policy).parent / "trainer", cell.seed),
        **METHODS[cell.method],
        max_steps=steps,
        num_generations=SAMPLES,
        per_device_train_batch_size=PROMPTS * SAMPLES,
        gradient_accumulation_steps=1,
        steps_per_generation=cell.mini_batches,
        schedule=cell.schedule,
        max_completion_length=MOST_TOKENS,
        missing_eos="replace",
        missing_eos_value=NO_END,
        logging_steps=1,
    )
    return OnlineDPOTrainer(
        model=load_policy(world),
        reward_funcs=proxy_reward(world),
        args=arguments,
        train_dataset=world.data["written"].select_columns(["prompt"]),
        processing_class=world.tokenizer,
    )


def main() -> None:
    given = study_options(__doc__, "runs/online_vs_offline").parse_args()
    quiet_process()
    report(study(given.folder, given.seeds, given.quick, given.processes), given.folder)


if __name__ == "__main__":
    main()
