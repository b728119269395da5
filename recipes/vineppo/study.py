"""Credit for steps against credit for whole completions: VinePPO beside methods without a critic.

| method    | a token's advantage                                                               |
|-----------|-----------------------------------------------------------------------------------|
| `grpo`    | TRL's GRPO: reward − mean of the group, over its deviation, on every token        |
| `dr-grpo` | TRL's GRPO with `loss_type="dr_grpo"`, `scale_rewards="none"`: not divided        |
| `rloo`    | TRL's RLOO: reward − mean of the others', on every token                          |
| `vine-1`  | VinePPO, what its step changed in the value, from one rollout per step            |
| `vine-3`  | from three; `vine-9`: from nine, as in the paper                                  |

All start from the same policy and see the same number of prompts and completions in each step. As
rollouts cost time, methods without them go on for longer. The clock is CPU time of one thread, of
training alone: a machine may be shared.

Source: Kazemnejad et al., arXiv:2410.01679.
"""

import json
import multiprocessing
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trl
from rich.progress import track
from transformers import TrainerCallback
from world import (
    Size,
    World,
    correct,
    each_word,
    fit,
    load_start,
    make_world,
    measure,
    set_up_process,
    shared_arguments,
)

from trl_ext import VinePPOConfig, VinePPOTrainer

PROMPTS, SAMPLES = 16, 4  # of a step, and of each prompt
PLAIN: dict[str, tuple[type, type, dict[str, Any]]] = {
    "grpo": (trl.GRPOTrainer, trl.GRPOConfig, {}),
    "dr-grpo": (
        trl.GRPOTrainer,
        trl.GRPOConfig,
        {"loss_type": "dr_grpo", "scale_rewards": "none"},
    ),
    "rloo": (trl.RLOOTrainer, trl.RLOOConfig, {}),
}
VINE = {"vine-1": 1, "vine-3": 3, "vine-9": 9}
METHODS = (*PLAIN, *VINE)
RATES = (3e-4, 1e-3, 3e-3)
# The best of RATES on seed 100, of each method, after the steps that all methods take.
CHOSEN = dict.fromkeys(METHODS, 1e-3)
Row = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """How much is run.

    Attributes:
        measured: steps after which each policy is measured.
        longer: further ones, of methods without rollouts.
        samples: completions per held-out prompt.
        world: how much of a world is made.
        rates: learning rates to try, in place of the chosen one.
    """

    measured: tuple[int, ...] = (10, 20, 40, 80)
    longer: tuple[int, ...] = (160, 320)
    samples: int = 8
    world: Size = field(default_factory=Size)
    rates: tuple[float, ...] = ()


QUICK = Plan((1, 2), (3,), 2, Size(keys=3, train=128, held_out=8, start_steps=4))


class Curve(TrainerCallback):
    """Measures the policy on the way, and keeps the time that training took without that."""

    def __init__(self, world: World, plan: Plan, steps: tuple[int, ...]):
        self.world, self.plan, self.steps = world, plan, steps
        self.points: list[Row] = []
        self.branching: list[float] = []

    def on_train_begin(self, *_: Any, **kwargs: Any) -> None:
        self.seconds, self.resumed = 0.0, time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        if state.global_step in self.steps:
            self.seconds += time.process_time() - self.resumed
            numbers = measure(self.world, model, samples=self.plan.samples)
            point = {"step": state.global_step, "seconds": self.seconds, **numbers}
            self.points.append(point)
            self.resumed = time.process_time()


@dataclass(frozen=True)
class Job:
    """One training run."""

    folder: Path
    seed: int
    method: str
    rate: float
    plan: Plan

    @property
    def home(self) -> Path:
        name = f"{self.method}-{self.rate:g}" if self.plan.rates else self.method
        return self.folder / f"seed-{self.seed}" / name

    @property
    def steps(self) -> tuple[int, ...]:
        """When the policy is measured; a sweep compares after equally many steps."""
        further = self.method in PLAIN and not self.plan.rates
        return self.plan.measured + (self.plan.longer if further else ())


def study(folder: Path, seeds: Iterable[int], plan: Plan, processes: int) -> list[Row]:
    """Runs the study and keeps its rows in `folder/vineppo.json`.

    Args:
        folder: holds the worlds, which are made where missing, and each trained policy.
        seeds: of worlds, training and sampling.
        plan: how much is run.
        processes: training runs at a time, one core each.

    Returns:
        One row per seed, method, rate and measured step; step 0 is the start of all.
    """
    jobs = [
        Job(folder, seed, method, rate, plan)
        for seed in seeds
        for method in METHODS
        for rate in plan.rates or [CHOSEN[method]]
    ]
    starts = [Job(folder, seed, "start", 0.0, plan) for seed in seeds]
    rows: list[Row] = []
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, set_up_process) as pool:
        for title, some in (("Starting policies", starts), ("Training", jobs)):
            found = pool.map(rows_of, some)
            rows += [row for each in track(found, title, len(some)) for row in each]
    (folder / "vineppo.json").write_text(json.dumps(rows, indent=1))
    return rows


def rows_of(job: Job) -> list[Row]:
    """Trains, measures on the way, and saves the policy with its card."""
    world = make_world(job.folder, job.seed, job.plan.world)
    if job.method == "start":
        numbers = measure(world, load_start(world), samples=job.plan.samples)
        points = [{"step": 0, "seconds": 0.0, "branching": 0.0, **numbers}]
        look_into(world, job)
    else:
        points = trained(world, job)
    return [{"seed": job.seed, "method": job.method, "rate": job.rate, **p} for p in points]


def trained(world: World, job: Job) -> list[Row]:
    """The measured points of a run, with the share of time that went into rollouts."""
    curve = Curve(world, job.plan, job.steps)
    trainer = make_trainer(world, job)
    trainer.add_callback(curve)
    fit(trainer).save_model()
    logged = [row for row in trainer.state.log_history if "step_time" in row]
    spent = [(row.get("perf/branching_s", 0.0), row["step_time"]) for row in logged]
    share = sum(branching for branching, _ in spent) / sum(whole for _, whole in spent)
    trainer.log(curve.points[-1])  # where the card looks for results
    trainer.create_model_card(model_name=f"calculator-runs-{job.method}")
    return [{**point, "branching": share} for point in curve.points]


def make_trainer(world: World, job: Job) -> Any:
    """Everything is the same for all methods but the advantage and its prescribed normaliser."""
    arguments = {
        **shared_arguments(job.home, job.seed),
        "max_steps": job.steps[-1],
        "per_device_train_batch_size": PROMPTS * SAMPLES,
        "num_generations": SAMPLES,
        "max_completion_length": world.size.most_tokens,
        "learning_rate": job.rate,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "beta": 0.0,
    }
    prompts = world.data["train"].select_columns(["prompt", "answer"])
    trainer, config, own = PLAIN.get(job.method, (VinePPOTrainer, VinePPOConfig, {}))
    if job.method in VINE:
        own = vine_options(VINE[job.method])
    return trainer(
        load_start(world),
        correct,
        config(**arguments, **own),
        prompts,
        processing_class=world.tokenizer,
    )


def vine_options(rollouts: int) -> dict[str, Any]:
    return {"num_rollouts": rollouts, "splitter": each_word, "rollout_batch_size": 1024}


def look_into(world: World, job: Job) -> None:
    """A round of VinePPO at the start, not trained on: where do its completions go wrong?"""
    arguments = {
        **shared_arguments(job.home, job.seed),
        "max_steps": 1,
        "per_device_train_batch_size": PROMPTS * SAMPLES,
        "num_generations": SAMPLES,
        "max_completion_length": world.size.most_tokens,
        "learning_rate": 0.0,
        "beta": 0.0,
        "logging_steps": 1,
        "log_completions": True,
        "num_completions_to_print": 0,
        "log_values": True,
        **vine_options(9),
    }
    prompts = world.data["train"].select_columns(["prompt", "answer"])
    fit(
        VinePPOTrainer(
            load_start(world),
            correct,
            VinePPOConfig(**arguments),
            prompts,
            processing_class=world.tokenizer,
        )
    )
