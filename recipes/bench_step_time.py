"""Time of an optimizer step, trl_ext against TRL on the same GRPO work, side by side.

    python recipes/bench_step_time.py [--rounds 7] [--steps 10]

Every round trains each variant on the same prompts from the same weights, and its time is divided
by TRL's of the same round; printed is the median of the ratios. Rounds alternate the order, because
these machines are shared. The quickstart's puzzles and Llama of
0.9 million parameters, 64 completions a step, one process.

JEPO stands beside TRL's GRPO at equal tokens: the same prompts, as many completions, and in each
the thought as it was sampled and an answer of the same length, sampled for one and given for
the other. Both sample it, JEPO in vain, and both train on it.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import torch
import trl
from datasets import Dataset
from quickstart import MOST_TOKENS, make_model, make_tokenizer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import PreTrainedTokenizerBase, PrinterCallback

import trl_ext
from trl_ext.data import calculator_puzzles, calculator_runs
from trl_ext.rewards.calculator import calculator_reward

MARKER = "is"


@dataclass(frozen=True)
class Variant:
    """A trainer, its options, and the variant whose time is its unit."""

    trainer: type
    config: type
    options: dict[str, Any]
    host: str
    task: str = "puzzles"


def grpo(options: dict[str, Any], host: str, task: str = "puzzles") -> Variant:
    """TRL's trainer where it is its own host, else ours."""
    library: Any = trl if options.pop("theirs", False) else trl_ext
    return Variant(library.GRPOTrainer, library.GRPOConfig, options, host, task)


def jepo(beta: float) -> Variant:
    options = {"beta": beta, "marker": MARKER, "answer_prefix": ""}
    return Variant(
        trl_ext.JEPOTrainer, trl_ext.JEPOConfig, options, f"TRL on runs, beta={beta:g}", "runs"
    )


PLAIN, WITH_KL = "TRL, beta=0", "TRL, beta=0.04"
VARIANTS: dict[str, Variant] = {
    PLAIN: grpo({"theirs": True}, PLAIN),
    "trl_ext, beta=0": grpo({}, PLAIN),
    "trl_ext pass@k, beta=0": Variant(trl_ext.PassAtKTrainer, trl_ext.PassAtKConfig, {}, PLAIN),
    WITH_KL: grpo({"theirs": True, "beta": 0.04}, WITH_KL),
    **{
        f"trl_ext, beta=0.04, {form}": grpo({"beta": 0.04, "kl_gradient": form}, WITH_KL)
        for form in ("token", "sequence", "sequence_total", "sequence_vocab")
    },
    "TRL on runs, beta=0": grpo({"theirs": True}, "TRL on runs, beta=0", "runs"),
    "trl_ext JEPO, beta=0": jepo(0.0),
    "TRL on runs, beta=0.001": grpo(
        {"theirs": True, "beta": 0.001}, "TRL on runs, beta=0.001", "runs"
    ),
    "trl_ext JEPO, beta=0.001": jepo(0.001),
}


@dataclass(frozen=True)
class Work:
    """What every variant of a task is given."""

    model: Path
    tokenizer: PreTrainedTokenizerBase
    rows: Dataset
    reward: Callable[..., list[float]]

    @classmethod
    def puzzles(cls, folder: Path) -> "Work":
        """The weights are random: what they write has all the tokens that are allowed."""
        worked = calculator_puzzles(1000, 1)["train"]
        tokenizer = make_tokenizer(worked)
        torch.manual_seed(0)
        make_model(tokenizer).save_pretrained(folder / "puzzles")
        rows = worked.remove_columns("completion")
        return cls(folder / "puzzles", tokenizer, rows, calculator_reward)

    @classmethod
    def runs(cls, folder: Path) -> "Work":
        """The weights know the form, so that sampled and reference answers have equal length."""
        worked = calculator_runs(2000, 1)["train"]
        tokenizer = make_tokenizer(worked)
        torch.manual_seed(0)
        trainer = trl.SFTTrainer(
            make_model(tokenizer),
            trl.SFTConfig(
                str(folder / "runs"),
                max_steps=60,
                per_device_train_batch_size=64,
                learning_rate=3e-3,
                **QUIET,
            ),
            train_dataset=worked.select_columns(["prompt", "completion"]),
            processing_class=tokenizer,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        trainer.save_model()
        return cls(folder / "runs", tokenizer, worked.remove_columns("completion"), correct)


QUIET: dict[str, Any] = {
    "gradient_checkpointing": False,
    "bf16": False,
    "use_cpu": True,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "logging_steps": 1000,
}


def correct(completions: Sequence[str], answer: Sequence[str], **kwargs: Any) -> list[float]:
    """1 where what stands behind the marker is the answer."""
    told = [completion.partition(f" {MARKER} ")[2] for completion in completions]
    return [float(text == right) for text, right in zip(told, answer, strict=True)]


def seconds_of(name: str, works: dict[str, Work], steps: int) -> float:
    """Seconds of `steps` optimizer steps; building the trainer does not count."""
    variant = VARIANTS[name]
    work = works[variant.task]
    with tempfile.TemporaryDirectory() as folder:
        arguments = variant.config(
            folder,
            max_steps=steps,
            per_device_train_batch_size=64,
            num_generations=8,
            max_completion_length=MOST_TOKENS,
            **QUIET,
            **variant.options,
        )
        reward = None if arguments.__class__ is trl_ext.JEPOConfig else work.reward
        run = variant.trainer(
            str(work.model), reward, arguments, work.rows, processing_class=work.tokenizer
        )
        run.remove_callback(PrinterCallback)
        begin = time.perf_counter()
        run.train()
        return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--task", choices=["puzzles", "runs"], help="only its variants")
    options = parser.parse_args()
    names = [name for name, v in VARIANTS.items() if options.task in (None, v.task)]
    ratios: dict[str, list[float]] = {name: [] for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        works = {"puzzles": Work.puzzles(Path(folder)), "runs": Work.runs(Path(folder))}
        for i in track(range(-1, options.rounds), description="Rounds"):
            order = names[:: 1 if i % 2 else -1]
            timed = {name: seconds_of(name, works, options.steps) for name in order}
            if i < 0:
                continue  # the first round warms the caches
            for name, value in timed.items():
                seconds[name].append(value / options.steps)
                ratios[name].append(value / timed[VARIANTS[name].host])
    table = Table("Variant", "ms per step", "ratio to TRL", "range", title="Time of a step")
    for name in names:
        spread = f"{min(ratios[name]):.3f}-{max(ratios[name]):.3f}"
        table.add_row(
            name,
            f"{1000 * statistics.median(seconds[name]):.0f}",
            f"{statistics.median(ratios[name]):.3f}",
            spread,
        )
    Console().print(table)


if __name__ == "__main__":
    main()
