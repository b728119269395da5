"""The world of the study: calculator runs of many keys, and a policy taught by a careless pupil.

    +7 *3 rev -1 +7 *3 from 10               # the prompt
    17 51 15 14 21 63 is 63                  # each step, then the answer

A step is a table that the policy knows, but like its teacher it slips: one wrong display, and all
that follows is lost. The verifier reads the answer alone, and does not say which step it was.
"""

import argparse
import json
import logging
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
import trl
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    PrinterCallback,
    set_seed,
)

from trl_ext import evaluate_generations
from trl_ext.data import calculator_runs

MARKER = " is "


@dataclass(frozen=True)
class Size:
    """How much of a world is made; the smoke test makes little.

    Attributes:
        keys: steps of a run.
        slips: how often the pupil presses another key.
    """

    keys: int = 8
    slips: float = 0.25
    train: int = 8000
    held_out: int = 256
    start_steps: int = 300

    @property
    def most_tokens(self) -> int:
        """All displays, the marker, the answer and the end."""
        return self.keys + 3


@dataclass(frozen=True)
class World:
    """What the runs of one seed share.

    Attributes:
        size: how much was made.
        data: splits `train` and `held_out` with `prompt`, `completion` (the pupil's), `answer`.
        tokenizer: one token per word.
        start: folder of the policy that every run starts from.
    """

    size: Size
    data: datasets.DatasetDict
    tokenizer: PreTrainedTokenizerFast
    start: str


def options(doc: str | None) -> argparse.ArgumentParser:
    """What the command line can change; the first line of `doc` says which it is."""
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/vineppo"))
    parser.add_argument("--processes", type=int, default=2, help="training runs at a time")
    parser.add_argument("--quick", action="store_true", help="only see that everything runs")
    return parser


def set_up_process() -> None:
    """Leaves the screen to the recipe's own lines, and a core to each process."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    torch.set_num_threads(1)


def each_word(text: str) -> list[int]:
    """A step per word, as lines are in longer texts."""
    return [match.end() for match in re.finditer(r"\S+\s+", text)]


def make_world(folder: Path, seed: int, size: Size) -> World:
    """Makes the world of a seed, or loads it where `folder` holds it already."""
    home, made = folder / f"seed-{seed}" / "start", {**vars(size), "seed": seed}
    data = calculator_runs(size.train, size.held_out, keys=size.keys, slips=size.slips, seed=seed)
    world = World(size, data, make_tokenizer(data), str(home))
    record = home / "world.json"
    if not record.exists() or json.loads(record.read_text()) != made:
        record.unlink(missing_ok=True)
        train_start(world, seed)
        record.write_text(json.dumps(made))  # last: a world without it is made again
    return world


def make_tokenizer(data: datasets.DatasetDict) -> PreTrainedTokenizerFast:
    """One token per word of the task."""
    columns = [data[split][name] for split in data for name in data[split].column_names]
    words = sorted({word for column in columns for text in column for word in text.split()})
    ids = {word: i for i, word in enumerate(["<pad>", "<eos>", *words])}
    tokenizer = Tokenizer(models.WordLevel(ids, "<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def train_start(world: World, seed: int) -> None:
    """SFT on the pupil's completions."""
    set_seed(seed)
    arguments = trl.SFTConfig(
        **shared_arguments(world.start, seed),
        max_steps=world.size.start_steps,
        per_device_train_batch_size=64,
        learning_rate=3e-3,
        lr_scheduler_type="cosine",
        warmup_steps=10,
    )
    model = LlamaForCausalLM(architecture(world.tokenizer))
    rows = world.data["train"].select_columns(["prompt", "completion"])
    trainer = trl.SFTTrainer(model, arguments, train_dataset=rows, processing_class=world.tokenizer)
    fit(trainer).save_model()


def architecture(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """A Llama of 0.2 million parameters; a step reads two words, which one layer can."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        initializer_range=0.06,  # with the usual 0.02 so small a model needs three times the steps
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )


def shared_arguments(folder: str | Path, seed: int) -> dict[str, Any]:
    """Arguments of every trainer of the recipe, TRL's and ours."""
    return {
        "output_dir": str(folder),
        "seed": seed,
        "adam_beta2": 0.98,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def fit(trainer: Any) -> Any:
    """Trains without a line for every log entry."""
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer


def load_start(world: World) -> PreTrainedModel:
    """A fresh copy of the policy that every run starts from."""
    return AutoModelForCausalLM.from_pretrained(world.start)


def correct(completions: Sequence[str], answer: Sequence[str], **kwargs: Any) -> list[float]:
    """The verifier: 1 where what stands behind the marker is the answer, else 0."""
    told = [completion.partition(MARKER)[2] for completion in completions]
    return [float(text == right) for text, right in zip(told, answer, strict=True)]


def measure(world: World, model: PreTrainedModel, *, samples: int = 8) -> dict[str, float]:
    """Held-out `accuracy`, its standard error over prompts, and `mean_length` in tokens."""
    result = evaluate_generations(
        model,
        world.tokenizer,
        world.data["held_out"],
        correct,
        num_generations=samples,
        max_completion_length=world.size.most_tokens,
        batch_size=2048,
        disable_tqdm=True,
    )
    told = result.metrics("")
    names = {"accuracy": "pass@1", "accuracy_se": "pass@1_se", "mean_length": "mean_length"}
    return {name: told[key] for name, key in names.items()}
