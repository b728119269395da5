"""What a study on a CPU needs besides its method: words, a small Llama, a quiet process, seeds.

The recipes compare methods in toy worlds, which all stand on these pieces:

    words = word_tokenizer("which words there are".split())
    model = LlamaForCausalLM(word_llama(words))
    args = PassAtKConfig(**cpu_arguments("out", seed=0), k=4)
    fit(PassAtKTrainer(model, reward, args, prompts, processing_class=words)).save_model()
"""

import argparse
import logging
import math
import statistics
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast, PrinterCallback


def study_options(doc: str | None, folder: str) -> argparse.ArgumentParser:
    """What every study's command line can change.

    Args:
        doc: docstring of the command, whose first line says what it does.
        folder: where results go unless told otherwise.

    Returns:
        A parser of `--seeds`, `--folder`, `--processes` and `--quick`; more can be added.
    """
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--folder", type=Path, default=Path(folder))
    parser.add_argument("--processes", type=int, default=2, help="training runs at a time")
    parser.add_argument("--quick", action="store_true", help="only see that everything runs")
    return parser


def quiet_process() -> None:
    """Leaves the screen to the study's own lines, and a core to each of its processes."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    torch.set_num_threads(1)


def word_tokenizer(
    words: Iterable[str], special: Sequence[str] = ("<pad>", "<eos>")
) -> PreTrainedTokenizerFast:
    """A tokenizer with one token per word, which pads on the left.

    Args:
        words: distinct, in the order of their token ids.
        special: ids before them; `<pad>` and `<eos>` have to be among them. `<unk>`, where there is
            one, stands for words that are not listed, else `<pad>` does.
    """
    ids = {word: i for i, word in enumerate([*special, *words])}
    unknown = "<unk>" if "<unk>" in ids else "<pad>"
    tokenizer = Tokenizer(models.WordLevel(ids, unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    named = {"unk_token": unknown} if unknown == "<unk>" else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        **named,
    )


def words_of(data: datasets.DatasetDict) -> list[str]:
    """All words of all splits, whose columns are texts, in order."""
    columns = [data[split][name] for split in data for name in data[split].column_names]
    return sorted({word for column in columns for text in column for word in text.split()})


def word_llama(
    tokenizer: PreTrainedTokenizerFast, *, width: int = 128, layers: int = 1, context: int = 64
) -> LlamaConfig:
    """A Llama that a CPU trains in a minute: 0.2 million parameters by default.

    Args:
        tokenizer: whose vocabulary and special tokens it has.
        width: of its hidden states, a multiple of 8.
        layers: one looks a word up; two can look up where to look.
        context: the most tokens of a row.
    """
    special: Any = tokenizer
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        initializer_range=0.06,  # with the usual 0.02 so small a model needs three times the steps
        pad_token_id=special.pad_token_id,
        bos_token_id=None,
        eos_token_id=special.eos_token_id,
    )


def cpu_arguments(folder: str | Path, seed: int, **changes: Any) -> dict[str, Any]:
    """Arguments that every trainer of a study shares, TRL's and ours; `changes` win."""
    arguments = {
        "output_dir": str(folder),
        "seed": seed,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    return arguments | changes


def fit(trainer: Any) -> Any:
    """Trains without a line for every log entry, and hands the trainer back."""
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer


def mean_and_error(values: Iterable[float | None]) -> tuple[float, float]:
    """Mean over seeds and its standard error; both over the values that are known.

    Returns:
        NaN for the mean without a value, and for the error with fewer than two.
    """
    known = [value for value in values if value is not None and not math.isnan(value)]
    if not known:
        return math.nan, math.nan
    mean = statistics.mean(known)
    several = len(known) > 1 and math.isfinite(mean)
    return mean, statistics.stdev(known) / len(known) ** 0.5 if several else math.nan


def over_seeds(values: Iterable[float | None], form: str = ".3f") -> str:
    """Mean ± standard error as text; without an error the mean alone, without a value "–"."""
    mean, error = mean_and_error(values)
    if math.isnan(mean):
        return "–"
    return f"{mean:{form}}" + ("" if math.isnan(error) else f" ± {error:{form.lstrip('+')}}")
