"""The world of the study: calculator runs, a policy taught by a careless pupil, and measures.

The pupil thinks step by step and slips at every fourth key, so that three of ten runs end where
they should. What a run really ends with stands in the column `answer`; whether a completion says
so, `correct` knows, and only GRPO and the measures ask it.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import trl
from transformers import (
    AutoModelForCausalLM,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    set_seed,
)

from trl_ext import evaluate_generations
from trl_ext.data import calculator_runs
from trl_ext.studies import cpu_arguments, fit, word_llama, word_tokenizer, words_of

MARKER = "is"
TASKS = ("numbers", "words")
# Four keys, the marker, the answer and the end; and what a thought may be too long.
MOST_TOKENS = {"numbers": 9, "words": 20}
ROWS = 64  # of a step of SFT


@dataclass(frozen=True)
class Size:
    """How much of a world is made; the smoke test makes little."""

    train: int = 8000
    held_out: int = 256
    start_steps: int = 300


@dataclass(frozen=True)
class World:
    """What the runs of one seed and task share.

    Attributes:
        task: `"numbers"`, whose answers can be compared, or `"words"`, whose answers cannot.
        data: splits `train` and `held_out` with `prompt`, `completion` (the pupil's), `answer`.
        tokenizer: one token per word.
        start: folder of the policy that every run starts from.
    """

    task: str
    data: datasets.DatasetDict
    tokenizer: PreTrainedTokenizerFast
    start: str


def make_world(folder: Path, task: str, seed: int, size: Size) -> World:
    """Makes the world of a task and seed, or loads it where `folder` holds it already."""
    home, made = folder / f"{task}-{seed}" / "start", {**vars(size), "seed": seed}
    data = calculator_runs(size.train, size.held_out, in_words=task == "words", seed=seed)
    world = World(task, data, word_tokenizer(words_of(data)), str(home))
    record = home / "world.json"
    if not record.exists() or json.loads(record.read_text()) != made:
        record.unlink(missing_ok=True)
        set_seed(seed)
        model = LlamaForCausalLM(word_llama(world.tokenizer))
        shown = data["train"].select_columns(["prompt", "completion"])
        fit(supervised(world, model, shown, home, seed, size.start_steps, 3e-3)).save_model()
        record.write_text(json.dumps(made))  # last: a world without it is made again
    return world


def supervised(
    world: World,
    model: PreTrainedModel,
    rows: datasets.Dataset,
    folder: Path,
    seed: int,
    steps: int,
    rate: float,
    schedule: str = "cosine",
) -> trl.SFTTrainer:
    """SFT on columns `prompt` and `completion`."""
    arguments = trl.SFTConfig(
        **cpu_arguments(folder, seed, adam_beta2=0.98),
        max_steps=steps,
        per_device_train_batch_size=ROWS,
        learning_rate=rate,
        lr_scheduler_type=schedule,
        warmup_steps=10 if schedule == "cosine" else 0,
    )
    return trl.SFTTrainer(model, arguments, train_dataset=rows, processing_class=world.tokenizer)


def load_start(world: World) -> PreTrainedModel:
    """A fresh copy of the policy that every run starts from."""
    return AutoModelForCausalLM.from_pretrained(world.start)


def correct(completions: Sequence[str], answer: Sequence[str], **kwargs: Any) -> list[float]:
    """The verifier: 1 where what stands behind the marker is the answer, else 0."""
    told = [completion.partition(f" {MARKER} ")[2] for completion in completions]
    return [float(text == right) for text, right in zip(told, answer, strict=True)]


def measure(world: World, model: PreTrainedModel, *, samples: int = 8) -> dict[str, float]:
    """Held-out figures of a policy, each with its standard error over prompts.

    Args:
        world: its held-out prompts.
        model: the policy.
        samples: thoughts per prompt.

    Returns:
        `accuracy` where answers can be compared; `nll_L1`, `nll_L2`, ..., upper bounds on the
        negative log-likelihood of the answer, nats; `marked_rate`, of thoughts that came to the
        marker; `mean_length` in tokens; and others. Each name with `_se` is its standard error.
    """
    result = evaluate_generations(
        model,
        world.tokenizer,
        world.data["held_out"],
        correct if world.task == "numbers" else None,
        num_generations=samples,
        max_completion_length=MOST_TOKENS[world.task],
        marker=MARKER,
        answer_prefix="",
        batch_size=2048,
        disable_tqdm=True,
    )
    return {k.replace("pass@1", "accuracy"): v for k, v in result.metrics("").items()}
