"""Thoughts learned from answers alone: JEPO and its relatives against a verifier and against SFT.

| method      | what it learns from                                                              |
|-------------|----------------------------------------------------------------------------------|
| `sft`       | the answer straight behind the marker, without a thought                         |
| `single`    | JEPO's one-sample bound, four thoughts for each prompt                           |
| `multi-2`   | the multi-sample bound of two thoughts; `multi-4`, `multi-8`: of four, of eight  |
| `verifree`  | VeriFree's E p, four thoughts                                                    |
| `grpo`      | four completions and the verifier, which the others never ask                    |
| `no-sft-4`  | `multi-4` without its likelihood term, `supervised_coef=0`                       |

All start from the same policy and take the same number of steps on the same number of prompts. On
the way each is measured on held-out prompts: accuracy, and bounds on the answer's likelihood.

Source: Tang et al., arXiv:2503.19618.
"""

import json
import multiprocessing
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset
from rich.progress import track
from transformers import PreTrainedModel, TrainerCallback
from world import (
    MARKER,
    MOST_TOKENS,
    Size,
    World,
    correct,
    load_start,
    make_world,
    measure,
    supervised,
)

from trl_ext import GRPOConfig, GRPOTrainer, JEPOConfig, JEPOTrainer
from trl_ext.studies import cpu_arguments, fit, quiet_process

PROMPTS = 16  # of a step
JEPO: dict[str, dict[str, Any]] = {
    "single": {"bound": "single", "num_generations": 4},
    "multi-2": {"bound": "multi", "num_generations": 2},
    "multi-4": {"bound": "multi", "num_generations": 4},
    "multi-8": {"bound": "multi", "num_generations": 8},
    "verifree": {"bound": "verifree", "num_generations": 4},
    "no-sft-4": {"bound": "multi", "num_generations": 4, "supervised_coef": 0.0},
}
METHODS = {
    "numbers": ("sft", "single", "multi-2", "multi-4", "multi-8", "verifree", "grpo"),
    "words": ("sft", "single", "multi-4", "no-sft-4"),
}
RATES = (1e-4, 3e-4, 1e-3)
# For each task and method the best of RATES on seed 100, by accuracy, in words by `nll_L4`.
CHOSEN = {
    "numbers": dict.fromkeys(METHODS["numbers"], 3e-4) | {"multi-8": 1e-3},
    "words": dict.fromkeys(METHODS["words"], 3e-4) | {"sft": 1e-3},
}
Row = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """How much is run.

    Attributes:
        measured: steps after which a policy is measured, by task; the last ends the run.
        samples: thoughts per held-out prompt.
        world: how much of a world is made.
        rates: learning rates to try, in place of the chosen one.
    """

    measured: dict[str, tuple[int, ...]] = field(
        default_factory=lambda: {"numbers": (25, 50, 100, 200), "words": (25, 50, 100)}
    )
    samples: int = 8
    world: Size = field(default_factory=Size)
    rates: tuple[float, ...] = ()


QUICK = Plan({"numbers": (1, 2), "words": (1, 2)}, 4, Size(train=128, held_out=8, start_steps=4))


class Curve(TrainerCallback):
    """Measures the policy on the way; training is the same to the bit with and without it."""

    def __init__(self, world: World, plan: Plan):
        self.world, self.plan = world, plan
        self.points: list[Row] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        if state.global_step in self.plan.measured[self.world.task]:
            numbers = measure(self.world, model, samples=self.plan.samples)
            self.points.append({"step": state.global_step, **numbers})


@dataclass(frozen=True)
class Job:
    """One training run."""

    folder: Path
    task: str
    seed: int
    method: str
    rate: float
    plan: Plan

    @property
    def home(self) -> Path:
        name = f"{self.method}-{self.rate:g}" if self.plan.rates else self.method
        return self.folder / f"{self.task}-{self.seed}" / name


def study(folder: Path, seeds: Iterable[int], plan: Plan, processes: int) -> list[Row]:
    """Runs the study and keeps its rows in `folder/jepo.json`.

    Args:
        folder: holds the worlds, which are made where missing, and each trained policy.
        seeds: of worlds, training and sampling.
        plan: how much is run.
        processes: training runs at a time, one core each.

    Returns:
        One row per task, seed, method, rate and measured step; step 0 is the start of all.
    """
    tasks = [(task, seed) for seed in seeds for task in METHODS]
    jobs = [
        Job(folder, task, seed, method, rate, plan)
        for task, seed in tasks
        for method in METHODS[task]
        for rate in plan.rates or [CHOSEN[task][method]]
    ]
    starts = [Job(folder, task, seed, "start", 0.0, plan) for task, seed in tasks]
    rows: list[Row] = []
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, quiet_process) as pool:
        for title, some in (("Starting policies", starts), ("Training", jobs)):
            found = pool.map(rows_of, some)
            rows += [row for each in track(found, title, len(some)) for row in each]
    (folder / "jepo.json").write_text(json.dumps(rows, indent=1))
    return rows


def rows_of(job: Job) -> list[Row]:
    """Trains, measures on the way, and saves the policy with its card."""
    world = make_world(job.folder, job.task, job.seed, job.plan.world)
    if job.method == "start":
        points = [{"step": 0, **measure(world, load_start(world), samples=job.plan.samples)}]
    else:
        points = trained(world, job)
    named = {"task": job.task, "seed": job.seed, "method": job.method, "rate": job.rate}
    return [{**named, **point} for point in points]


def trained(world: World, job: Job) -> list[Row]:
    """The measured points of a run."""
    curve = Curve(world, job.plan)
    trainer = make_trainer(world, job)
    trainer.add_callback(curve)
    fit(trainer).save_model()
    trainer.log(curve.points[-1])  # where the card looks for results
    trainer.create_model_card(model_name=f"calculator-runs-{job.method}")
    return curve.points


def make_trainer(world: World, job: Job) -> Any:
    """Everything is the same for all methods but the loss and, as named, the number of thoughts."""
    model, steps = load_start(world), job.plan.measured[job.task][-1]
    if job.method == "sft":
        rows = answers_alone(world.data["train"])
        return supervised(world, model, rows, job.home, job.seed, steps, job.rate, "constant")
    samples = JEPO.get(job.method, {}).get("num_generations", 4)
    arguments = {
        **cpu_arguments(job.home, job.seed, adam_beta2=0.98),
        "max_steps": steps,
        "per_device_train_batch_size": PROMPTS * samples,
        "num_generations": samples,
        "max_completion_length": MOST_TOKENS[job.task],
        "learning_rate": job.rate,
        "lr_scheduler_type": "constant",
        "beta": 0.0,
    }
    prompts = world.data["train"].select_columns(["prompt", "answer"])
    return policy_trainer(job.method, model, arguments, prompts, world)


def policy_trainer(
    method: str, model: PreTrainedModel, arguments: dict[str, Any], prompts: Dataset, world: World
) -> Any:
    """Only GRPO is given the verifier."""
    if method == "grpo":
        return GRPOTrainer(
            model, correct, GRPOConfig(**arguments), prompts, processing_class=world.tokenizer
        )
    config = JEPOConfig(**{**arguments, "marker": MARKER, "answer_prefix": "", **JEPO[method]})
    return JEPOTrainer(model, None, config, prompts, processing_class=world.tokenizer)


def answers_alone(rows: Dataset) -> Dataset:
    """Marker and answer as the whole completion."""
    completions = [f"{MARKER} {answer}" for answer in rows["answer"]]
    return Dataset.from_dict({"prompt": rows["prompt"], "completion": completions})
