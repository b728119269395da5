"""Credit for steps against credit for whole completions: VinePPO beside methods without a critic.

| method    | a token's advantage                                                               |
|-----------|-----------------------------------------------------------------------------------|
| `grpo`    | TRL's GRPO: reward − mean of the group, over its deviation, on every token        |
| `dr-grpo` | TRL's GRPO with `loss_type="dr_grpo"`, `scale_rewards="none"`: not divided        |
| `rloo`    | TRL's RLOO: reward − mean of the others', on every token                          |
| `vine-1`  | VinePPO, what its step changed in the value, from one rollout per step            |
| `vine-3`  | from three; `vine-9`: from nine, as in the paper                                  |

All start from the same policy and see the same number of prompts and completions in each step. As
rollouts cost time, methods with fewer of them go on for longer, so that all may be compared after
equal times too. The clock is CPU time of one thread, of training alone: a machine may be shared.

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
from world import Size, World, correct, each_word, load_start, make_world, measure

from trl_ext import VinePPOConfig, VinePPOTrainer
from trl_ext.studies import cpu_arguments, fit, quiet_process

PROMPTS, SAMPLES = 8, 4  # of a step, and of each prompt
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
RATES = (1e-4, 2e-4, 4e-4, 8e-4)
# The best of RATES on seed 100, of each method, after the 80 steps that all take.
CHOSEN = dict.fromkeys(PLAIN, 2e-4) | dict.fromkeys(VINE, 4e-4)
Row = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """How much is run.

    Attributes:
        measured: steps after which each policy is measured; all methods take these.
        longer: further ones, by method, up to about the time that the slowest takes.
        samples: completions per held-out prompt.
        world: how much of a world is made.
        rates: learning rates to try, in place of the chosen one.
    """

    measured: tuple[int, ...] = (10, 20, 40, 80)
    longer: dict[str, tuple[int, ...]] = field(
        default_factory=lambda: {
            **dict.fromkeys(PLAIN, (160, 320, 640)),
            "vine-1": (160, 240),
            "vine-3": (160,),
        }
    )
    samples: int = 8
    world: Size = field(default_factory=Size)
    rates: tuple[float, ...] = ()


QUICK = Plan((1, 2), {"grpo": (3,)}, 2, Size(keys=3, train=128, held_out=8, start_steps=4))


class Curve(TrainerCallback):
    """Measures the policy on the way, and keeps the time that training took without that."""

    def __init__(self, world: World, plan: Plan, steps: tuple[int, ...]):
        self.world, self.plan, self.steps = world, plan, steps
        self.points: list[Row] = []
        self.seconds = self.resumed = 0.0

    def on_train_begin(self, *_: Any, **kwargs: Any) -> None:
        self.resumed = time.process_time()

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
        swept = self.plan.rates and self.rate
        name = f"{self.method}-{self.rate:g}" if swept else self.method
        return self.folder / f"seed-{self.seed}" / name

    @property
    def steps(self) -> tuple[int, ...]:
        """When the policy is measured; the last of them ends the run."""
        return self.plan.measured + self.plan.longer.get(self.method, ())


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
    with ProcessPoolExecutor(processes, context, quiet_process) as pool:
        for title, some in (("Starting policies", starts), ("Training", jobs)):
            for found in track(pool.map(rows_of, some), title, len(some)):
                rows += found
                (folder / "vineppo.json").write_text(json.dumps(rows, indent=1))
    return rows


def rows_of(job: Job) -> list[Row]:
    """Trains, measures on the way, and saves the policy with its card."""
    world = make_world(job.folder, job.seed, job.plan.world)
    if job.method == "start":
        look_into(world, job)
        numbers = measure(world, load_start(world), samples=job.plan.samples)
        points = [{"step": 0, "seconds": 0.0, "branching": 0.0, **numbers}]
    else:
        points = trained(world, job)
    return [{"seed": job.seed, "method": job.method, "rate": job.rate, **p} for p in points]


def trained(world: World, job: Job) -> list[Row]:
    """The measured points of a run, each with the share of training that all rollouts took."""
    curve = Curve(world, job.plan, job.steps)
    options = {"max_steps": job.steps[-1], "learning_rate": job.rate, "logging_steps": 1}
    trainer = make_trainer(world, job, options)
    trainer.add_callback(curve)
    fit(trainer).save_model()
    logged = [row for row in trainer.state.log_history if "step_time" in row]
    spent = [(row.get("perf/branching_s", 0.0), row["step_time"]) for row in logged]
    share = sum(branching for branching, _ in spent) / sum(whole for _, whole in spent)
    trainer.log(curve.points[-1])  # where the card looks for results
    trainer.create_model_card(model_name=f"calculator-runs-{job.method}")
    return [{**point, "branching": share} for point in curve.points]


def look_into(world: World, job: Job) -> None:
    """A round of VinePPO at the start, not learned from: at which step is the solution lost?"""
    shown = {"log_completions": True, "num_completions_to_print": 0, "log_values": True}
    options = {"max_steps": 1, "learning_rate": 0.0, "logging_steps": 1, **shown}
    fit(make_trainer(world, job, options, VINE["vine-9"]))


def make_trainer(
    world: World, job: Job, options: dict[str, Any], rollouts: int | None = None
) -> Any:
    """Everything is the same for all methods but the advantage and its prescribed normaliser."""
    trainer, config, own = PLAIN.get(job.method, (VinePPOTrainer, VinePPOConfig, {}))
    if job.method not in PLAIN:
        rollouts = rollouts or VINE[job.method]
        own = {"num_rollouts": rollouts, "splitter": each_word, "rollout_batch_size": 1024}
    arguments = {
        **cpu_arguments(job.home, job.seed, adam_beta2=0.98),
        "per_device_train_batch_size": PROMPTS * SAMPLES,
        "num_generations": SAMPLES,
        "max_completion_length": world.size.most_tokens,
        "lr_scheduler_type": "constant",
        "beta": 0.0,
        **options,
    }
    return trainer(
        load_start(world),
        correct,
        config(**arguments, **own),
        world.data["train"].select_columns(["prompt", "answer"]),
        processing_class=world.tokenizer,
    )
