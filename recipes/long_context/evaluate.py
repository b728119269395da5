"""Measures a trained model at several context lengths, and says so on its card.

    python recipes/long_context/evaluate.py --model runs/tapa --lengths 256 1024 --stride 64
    accelerate launch recipes/long_context/evaluate.py --model runs/tapa_pg19_32k \\
        --source emozilla/pg19 --lengths 8192 16384 32768 65536 --dtype bfloat16

Under accelerate every process holds the whole model and takes a share of the windows. The rows are
printed, kept in `long_context.json` beside the model, and written on its card.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from card import write_card
from evaluation import Scores, summary, window_scores, windows_of
from rich.console import Console
from rich.table import Table
from text import STDLIB, load_texts, name_of
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_ext.parser import StrictParser


@dataclass
class EvaluationOptions:
    """What is measured, and on what."""

    model: str = field(metadata={"help": "folder of a model that train.py made"})
    lengths: list[int] = field(metadata={"help": "contexts in tokens"})
    source: str = field(
        default=STDLIB,
        metadata={"help": "text: stdlib, a folder, a file, or a data set on the Hub"},
    )
    split: str = field(default="test", metadata={"help": "split of the text"})
    stride: int = field(default=256, metadata={"help": "scored tokens per window, its last ones"})
    windows: int = field(default=256, metadata={"help": "at most so many"})
    seed: int = field(default=0, metadata={"help": "of the facts that are hidden"})
    dtype: str = field(default="auto", metadata={"help": "of the weights: auto, float32, bfloat16"})
    attn_implementation: str | None = field(
        default=None, metadata={"help": "by default the best one for method and device"}
    )


def main() -> None:
    (options,) = StrictParser([EvaluationOptions]).parse_args_and_config()
    process = PartialState(cpu=not torch.accelerator.is_available())
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    windows = windows_of(
        load_texts(options.source, options.split), tokenizer, max(options.lengths), options.windows
    )
    if len(windows) < process.num_processes:
        raise ValueError(
            f"windows={options.windows} gave {len(windows)} windows for {process.num_processes} "
            "processes: use fewer processes or more text."
        )
    model = AutoModelForCausalLM.from_pretrained(
        options.model, dtype=options.dtype, attn_implementation=options.attn_implementation
    ).to(process.device)
    with process.split_between_processes(windows) as share:
        scores = window_scores(
            model, tokenizer, share, options.lengths, options.stride, options.seed
        )
    shares = gather_object([scores])
    if process.is_main_process:
        show(summary(joined(shares)), Path(options.model), name_of(options.source))


def joined(shares: list[Scores]) -> Scores:
    """The windows of all processes, in their order."""
    return {
        length: {name: [x for share in shares for x in share[length][name]] for name in names}
        for length, names in shares[0].items()
    }


def show(rows: list[dict], folder: Path, data: str) -> None:
    table = Table("length", "perplexity", "passkey", "recall")
    for row in rows:
        numbers = (
            f"{row[n]:.3f} ± {row[f'{n}_se']:.3f}" for n in ("perplexity", "passkey", "recall")
        )
        table.add_row(str(row["length"]), *numbers)
    Console().print(table)
    (folder / "long_context.json").write_text(json.dumps(rows, indent=1))
    write_card(folder, rows, data)


if __name__ == "__main__":
    main()
