"""Sampling one round ahead against sampling in turn, on a load that is balanced between the two.

    python recipes/bench_async.py [--repeats 3] [--rounds 24] [--completions 16] [--quality]

A synchronous run tells how long a round's sampling and training take, t_gen and t_train. A perfect
overlap would be (t_gen + t_train) / max(t_gen, t_train) times as fast: the ideal, of which
`schedule="one_step"` reaches the fraction printed. Trainer and sampler have one thread each: run it
where two cores are free. Rounds in which the sampler starts are left out, and pairs of runs
alternate the order.

On a balanced load t_train / t_gen lies in 0.8-1.25: more completions make training longer and
sampling, token by token, hardly. `--quality` compares what both schedules learn, over seeds.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["OMP_NUM_THREADS"] = "1"  # read by torch at import, here and in the sampler

import torch
from bench_online_dpo import Work, distinct_words, make_model, make_prompts, make_tokenizer
from datasets import disable_progress_bars
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import PrinterCallback, TrainerCallback

from trl_ext import OnlineDPOConfig, OnlineDPOTrainer

SCHEDULES = ("sync", "one_step")
FIRST_ROUNDS = 3  # the sampler starts, and answers twice in the first
LEARNING = Work(
    "even words",
    vocabulary=64,
    prompts_per_pass=16,
    accumulation=1,
    tokens=12,
    hidden=64,
    layers=2,
)
WAITS = {"generation_wait": "perf/generation_wait_s", "training_wait": "perf/training_wait_s"}


@dataclass(frozen=True)
class Pace:
    """Seconds of a round, and of its parts."""

    round: float
    generation: float = 0.0
    generation_wait: float = 0.0
    training_wait: float = 0.0

    @property
    def training(self) -> float:
        return self.round - self.generation


class RoundEnds(TrainerCallback):
    """When each round ended; here a round is one optimizer step."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_end(self, args, state, control, **kwargs):
        self.times.append(time.perf_counter())


def main() -> None:
    options = parse_arguments()
    torch.set_num_threads(1)
    disable_progress_bars()
    console = Console()
    console.print(quality(options) if options.quality else speed(options))
    load = " ".join(f"{value:.1f}" for value in os.getloadavg())
    console.print(f"Load of the machine over 1, 5 and 15 minutes: {load}; {os.cpu_count()} cores.")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3, help="pairs of runs")
    parser.add_argument("--rounds", type=int, default=24, help="timed rounds of a run")
    parser.add_argument("--completions", type=int, default=16, help="per round, an even number")
    parser.add_argument("--tokens", type=int, default=64, help="of each completion")
    parser.add_argument("--quality", action="store_true", help="compare what is learned instead")
    parser.add_argument("--seeds", type=int, default=3, help="of --quality")
    parser.add_argument("--steps", type=int, default=60, help="of --quality")
    return parser.parse_args()


def speed(options: argparse.Namespace) -> Table:
    """One row per pair of runs, and their medians."""
    work = Work(
        "balanced",
        prompts_per_pass=options.completions // 2,
        accumulation=1,
        tokens=options.tokens,
    )
    columns = ("t_gen", "t_train", "train/gen", "ideal", "speed-up", "of ideal")
    waits = ("trainer waits", "sampler waits")
    title = "One round ahead against in turn; seconds of a round"
    table = Table("Pair", *columns, *waits, title=title)
    rows = []
    for i in track(range(options.repeats), "Pairs", transient=True):
        paces = {
            schedule: pace(schedule, work, options.rounds)
            for schedule in SCHEDULES[:: -1 if i % 2 else 1]
        }
        rows.append(row_of(paces["sync"], paces["one_step"]))
        table.add_row(str(i + 1), *shown(rows[-1]))
    table.add_section()
    table.add_row(
        "median", *shown([statistics.median(column) for column in zip(*rows, strict=True)])
    )
    return table


def row_of(sync: Pace, ahead: Pace) -> list[float]:
    ideal = sync.round / max(sync.generation, sync.training)
    speed_up = sync.round / ahead.round
    parts = [sync.generation, sync.training, sync.training / sync.generation]
    waits = [ahead.generation_wait, ahead.training_wait]
    return [*parts, ideal, speed_up, speed_up / ideal, *waits]


def shown(row: list[float]) -> list[str]:
    return [f"{value:.0%}" if i == 5 else f"{value:.3f}" for i, value in enumerate(row)]


def pace(schedule: str, work: Work, rounds: int) -> Pace:
    """Means over the rounds behind the first ones."""
    ends, steps = RoundEnds(), FIRST_ROUNDS + rounds
    run = build(schedule, work, max_steps=steps, generation_kwargs={"min_new_tokens": work.tokens})
    run.add_callback(ends)
    sampled_s = timed_generate(run.model) if schedule == "sync" else []
    run.train()
    round_s = (ends.times[-1] - ends.times[FIRST_ROUNDS - 1]) / rounds
    if schedule == "sync":
        return Pace(round_s, generation=statistics.fmean(sampled_s[FIRST_ROUNDS:]))
    logged = run.state.log_history[FIRST_ROUNDS:steps]
    waits = {name: statistics.fmean(row[key] for row in logged) for name, key in WAITS.items()}
    return Pace(round_s, **waits)


def timed_generate(model: Any) -> list[float]:
    """Seconds of each later call of `model.generate`, in a list that grows."""
    seconds: list[float] = []
    generate = model.generate

    def timed(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        sequences = generate(*args, **kwargs)
        seconds.append(time.perf_counter() - start)
        return sequences

    model.generate = timed
    return seconds


def quality(options: argparse.Namespace) -> Table:
    """Mean reward of the first and of the last ten rounds."""
    title = f"Fraction of even words, {options.steps} rounds"
    table = Table("Seed", "at first", "sync", "one_step", title=title)
    rows = []
    for seed in track(range(options.seeds), "Seeds", transient=True):
        curves = [reward_curve(schedule, seed, options.steps) for schedule in SCHEDULES]
        rows.append([curves[0][0], *(statistics.fmean(curve[-10:]) for curve in curves)])
        table.add_row(str(seed), *(f"{value:.3f}" for value in rows[-1]))
    table.add_section()
    means = [statistics.fmean(column) for column in zip(*rows, strict=True)]
    table.add_row("mean", *(f"{value:.3f}" for value in means))
    return table


def reward_curve(schedule: str, seed: int, steps: int) -> list[float]:
    options: dict[str, Any] = {"learning_rate": 1e-3, "lr_scheduler_type": "constant"}
    run = build(schedule, LEARNING, even_words, max_steps=steps, seed=seed, **options)
    run.train()
    return [row["reward"] for row in run.state.log_history if "reward" in row]


def even_words(completions: list[str], **_: Any) -> list[float]:
    numbers = [[int(word[1:]) for word in text.split()] for text in completions]
    return [sum(n % 2 == 0 for n in row) / max(len(row), 1) for row in numbers]


def build(
    schedule: str,
    work: Work,
    reward: Callable[..., list[float]] = distinct_words,
    **options: Any,
) -> OnlineDPOTrainer:
    """Online DPO where a round is one optimizer step."""
    arguments = OnlineDPOConfig(
        tempfile.mkdtemp(prefix="bench_async_"),
        schedule=schedule,
        per_device_train_batch_size=2 * work.prompts,
        max_completion_length=work.tokens,
        gradient_checkpointing=False,
        use_cpu=True,
        bf16=False,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        **options,
    )
    run = OnlineDPOTrainer(
        make_model(work),
        reward,
        arguments,
        make_prompts(work),
        processing_class=make_tokenizer(work.vocabulary),
    )
    run.remove_callback(PrinterCallback)
    return run


if __name__ == "__main__":
    main()
