"""Time of an optimizer step, trl_ext against TRL on the same GRPO work, side by side.

    python recipes/bench_step_time.py [--rounds 7] [--steps 10]

Every round trains each variant on the same prompts from the same weights, and its time is divided
by TRL's of the same round; printed is the median of the ratios. Rounds alternate the order, because
these machines are shared. The quickstart's puzzles and Llama of
0.9 million parameters, 64 completions a step, one process.
"""

import argparse
import os
import statistics
import tempfile
import time
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
from trl_ext.data import calculator_puzzles
from trl_ext.rewards.calculator import calculator_reward

VARIANTS: dict[str, tuple[type, type, dict[str, Any]]] = {
    "TRL, beta=0": (trl.GRPOTrainer, trl.GRPOConfig, {}),
    "trl_ext, beta=0": (trl_ext.GRPOTrainer, trl_ext.GRPOConfig, {}),
    "trl_ext pass@k, beta=0": (trl_ext.PassAtKTrainer, trl_ext.PassAtKConfig, {}),
    "TRL, beta=0.04": (trl.GRPOTrainer, trl.GRPOConfig, {"beta": 0.04}),
    **{
        f"trl_ext, beta=0.04, {form}": (
            trl_ext.GRPOTrainer,
            trl_ext.GRPOConfig,
            {"beta": 0.04, "kl_gradient": form},
        )
        for form in ("token", "sequence", "sequence_total", "sequence_vocab")
    },
}
HOSTS = {False: "TRL, beta=0", True: "TRL, beta=0.04"}


@dataclass(frozen=True)
class Work:
    """What every variant is given."""

    model: Path
    tokenizer: PreTrainedTokenizerBase
    puzzles: Dataset

    @classmethod
    def make(cls, folder: Path) -> "Work":
        worked = calculator_puzzles(1000, 1)["train"]
        tokenizer = make_tokenizer(worked)
        torch.manual_seed(0)
        make_model(tokenizer).save_pretrained(folder)
        return cls(folder, tokenizer, worked.remove_columns("completion"))


def seconds_of(name: str, work: "Work", steps: int) -> float:
    """Seconds of `steps` optimizer steps; building the trainer does not count."""
    trainer, config, options = VARIANTS[name]
    with tempfile.TemporaryDirectory() as folder:
        arguments = config(
            folder,
            max_steps=steps,
            per_device_train_batch_size=64,
            num_generations=8,
            max_completion_length=MOST_TOKENS,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            logging_steps=1000,
            **options,
        )
        model, puzzles, tokenizer = str(work.model), work.puzzles, work.tokenizer
        run = trainer(model, calculator_reward, arguments, puzzles, processing_class=tokenizer)
        run.remove_callback(PrinterCallback)
        begin = time.perf_counter()
        run.train()
        return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_args()
    ratios: dict[str, list[float]] = {name: [] for name in VARIANTS}
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    with tempfile.TemporaryDirectory() as folder:
        work = Work.make(Path(folder))
        for i in track(range(-1, options.rounds), description="Rounds"):
            order = list(VARIANTS)[:: 1 if i % 2 else -1]
            timed = {name: seconds_of(name, work, options.steps) for name in order}
            if i < 0:
                continue  # the first round warms the caches
            for name, value in timed.items():
                seconds[name].append(value / options.steps)
                ratios[name].append(value / timed[HOSTS["beta=0.04" in name]])
    table = Table("Variant", "ms per step", "ratio to TRL", "range", title="Time of a step")
    for name in VARIANTS:
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
