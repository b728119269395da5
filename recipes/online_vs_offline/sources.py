"""Online against offline: the same loss and settings, and only the source of the pairs differs.

    python recipes/online_vs_offline/sources.py [--seeds 0] [--folder runs/online_vs_offline]

| source     | pairs                                                                             |
|------------|-----------------------------------------------------------------------------------|
| `online`   | samples of the policy, the better one by the proxy; recorded                      |
| `offline`  | the labelled pairs of writers' stories, from which the proxy learned              |
| `ordered`  | the record of `online`, in its order: must give its parameters to the bit         |
| `blocks`   | the record, shuffled within blocks of `BLOCK` steps                               |
| `shuffled` | the record, shuffled as a whole: the same data, and none of them on policy        |
| `driven`   | as `online`, at a higher learning rate: what the proxy is worth when it is pushed |

All start from the SFT policy, see the same number of prompts and take the same number of steps. On
the way each is measured at steps a factor of two apart: how well it writes, by the gold reward and
by the proxy; how far it has moved; and how well it tells the better of two held-out stories.

Source: Tang et al., arXiv:2405.08448, sections 3 to 5.
"""

import json
import multiprocessing
import shutil
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from rich.progress import track
from safetensors.torch import load_file
from sources_report import report
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
from trl_ext.data import load_record, shuffled_in_blocks
from trl_ext.studies import cpu_arguments, fit, quiet_process, study_options

ONLINE = ("online", "driven")
REPLAYS = ("ordered", "blocks", "shuffled")  # of `online`
# Chosen on seed 0 alone.
BETA, LEARNING_RATE, DRIVEN_LEARNING_RATE = 0.03, 3e-4, 1e-3
PROMPTS = 16  # of a step; two stories for each
BLOCK = 30  # steps
Row = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """How much is run.

    Attributes:
        steps: optimizer steps of each source.
        measured: steps after which the policy is measured.
        samples: completions per held-out prompt.
        world: how much of a world is made.
    """

    steps: int = 240
    measured: tuple[int, ...] = (8, 15, 30, 60, 120, 240)
    samples: int = 2
    world: Size = field(default_factory=Size)


QUICK = Plan(
    steps=3,
    measured=(1, 3),
    samples=1,
    world=SMALL,
)


class Curve(TrainerCallback):
    """Measures the policy on the way; training is the same to the bit with and without it."""

    def __init__(self, world: World, plan: Plan) -> None:
        self.world, self.plan = world, plan
        self.points: list[Row] = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step in self.plan.measured:
            measured = measure(self.world, model, samples=self.plan.samples)
            self.points.append({"step": state.global_step, **measured})


def study(folder: Path, seeds: Sequence[int], quick: bool = False, processes: int = 2) -> list[Row]:
    """Runs the study and keeps its rows in `folder/sources.json`.

    Args:
        folder: holds the worlds, which are made where missing, and each trained policy.
        seeds: of worlds, training and sampling.
        quick: only enough to see that everything runs.
        processes: training runs at a time, one core each.

    Returns:
        One row per seed, source and measured step; the SFT policy is step 0. The last row of
        `ordered` says in `equals_online` whether its parameters are those of `online`.
    """
    plan = QUICK if quick else Plan()
    rows: list[Row] = []
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, quiet_process) as pool:
        rows += pool.map(start_row, *_arguments(folder, [(seed, "") for seed in seeds], plan))
        # what replays needs the record of what sampled
        for sources in ((*ONLINE, "offline"), REPLAYS):
            runs = [(seed, source) for seed in seeds for source in sources]
            found = pool.map(source_rows, *_arguments(folder, runs, plan))
            title = ", ".join(sources)
            rows += [row for some in track(found, title, len(runs), transient=True) for row in some]
    for row in rows:
        if row["source"] == "ordered" and row["step"] == plan.steps:
            row["equals_online"] = equal_policies(folder, row["seed"], "ordered", "online")
    (folder / "sources.json").write_text(json.dumps(rows, indent=1))
    return rows


def _arguments(folder: Path, runs: list[tuple[int, str]], plan: Plan) -> tuple[list, ...]:
    n = len(runs)
    return [folder] * n, [seed for seed, _ in runs], [source for _, source in runs], [plan] * n


def start_row(folder: Path, seed: int, _: str, plan: Plan) -> Row:
    """The point from which all sources start."""
    world = make_world(folder, seed, plan.world)
    measured = measure(world, load_policy(world), samples=plan.samples)
    return {"seed": seed, "source": "start", "step": 0, **measured}


def source_rows(folder: Path, seed: int, source: str, plan: Plan) -> list[Row]:
    """Trains on the pairs of `source`, measures on the way and saves the policy with its card."""
    world = make_world(folder, seed, plan.world)
    curve = Curve(world, plan)
    trainer = make_trainer(world, folder, seed, source, plan.steps)
    trainer.add_callback(curve)
    fit(trainer).save_model()
    trainer.log(curve.points[-1])  # where the card looks for results
    trainer.create_model_card(model_name=f"stories-{source}")
    return [{"seed": seed, "source": source, **point} for point in curve.points]


def make_trainer(
    world: World, folder: Path, seed: int, source: str, steps: int
) -> OnlineDPOTrainer:
    """Everything is the same for all sources but the pairs; `driven` differs in its rate alone."""
    record, online = policy_folder(folder, seed, "online") / "record", source in ONLINE
    own: dict[str, Any] = {"pair_source": "replay" if source in REPLAYS else "offline"}
    if online:
        own = {"pair_source": "online", "missing_eos": "replace", "missing_eos_value": NO_END}
    if source == "online":
        shutil.rmtree(record, ignore_errors=True)
        own["record_path"] = str(record)
    arguments = OnlineDPOConfig(
        **cpu_arguments(policy_folder(folder, seed, source), seed),
        **own,
        loss_type="sigmoid",
        beta=BETA,
        learning_rate=DRIVEN_LEARNING_RATE if source == "driven" else LEARNING_RATE,
        lr_scheduler_type="constant",
        max_steps=steps,
        per_device_train_batch_size=2 * PROMPTS,
        num_generations=2,
        max_completion_length=MOST_TOKENS,
        shuffle_dataset=source not in REPLAYS,
    )
    return OnlineDPOTrainer(
        model=load_policy(world),
        reward_funcs=proxy_reward(world) if online else None,
        args=arguments,
        train_dataset=pairs_of(world, record, source, seed),
        processing_class=world.tokenizer,
    )


def pairs_of(world: World, record: Path, source: str, seed: int) -> Dataset:
    """The rows of a source; those that sample take only their prompts."""
    if source not in REPLAYS:
        return world.data["train"]
    recorded = load_record(record)
    steps = {"ordered": 0, "blocks": BLOCK, "shuffled": len(recorded)}[source]
    return shuffled_in_blocks(recorded, max(1, steps * PROMPTS), seed)


def policy_folder(folder: Path, seed: int, source: str) -> Path:
    return folder / f"sources-{seed}" / source


def equal_policies(folder: Path, seed: int, *sources: str) -> bool:
    """Whether two saved policies have the same parameters to the bit."""
    first, second = (
        load_file(policy_folder(folder, seed, source) / "model.safetensors") for source in sources
    )
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


def main() -> None:
    given = study_options(__doc__, "runs/online_vs_offline").parse_args()
    quiet_process()
    report(study(given.folder, given.seeds, given.quick, given.processes), given.folder)


if __name__ == "__main__":
    main()
