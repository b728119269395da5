"""Trains one model for one stage: pretraining, or going on at a longer context.

    accelerate launch recipes/long_context/train.py --config recipes/long_context/pile_8k.yaml
    python recipes/long_context/train.py --method tapa --length 256 --output_dir runs/tapa \\
        --max_steps 200 --learning_rate 2e-3

Every option of `TrainingArguments` can be given beside those below. The folder holds the model, its
tokenizer, its card, and in `stage.json` what was done.
"""

import itertools
import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from card import write_card
from datasets import Dataset
from methods import ModelOptions, extended, new_model
from retrieval import IGNORED, add_symbols, mixed_in
from text import STDLIB, Texts, load_texts, name_of, segments, train_tokenizer
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import (
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from trl_ext.cards import hub_id, hyperparameters_of
from trl_ext.parser import StrictParser

TAUGHT = 2000  # documents from which a tokenizer is learned
SHUFFLED = 4096  # segments in the buffer of a stream


@dataclass
class StageOptions:
    """What a stage needs to know beside the trainer's options."""

    method: str = field(metadata={"help": "rope, pi, yarn, tapa or stickbreaking"})
    length: int = field(metadata={"help": "context in tokens"})
    source: str = field(
        default=STDLIB,
        metadata={"help": "text: stdlib, a folder, a file, or a data set on the Hub"},
    )
    split: str = field(default="train", metadata={"help": "split of the text"})
    tokenizer: str | None = field(
        default=None,
        metadata={"help": "its name or folder; by default the one of start, else one is trained"},
    )
    vocab_size: int = field(
        default=257, metadata={"help": "of a tokenizer that is trained; 257 is bytes"}
    )
    symbols: int = field(
        default=16, metadata={"help": "tokens of which facts are made; of a fresh model"}
    )
    retrieval_share: float = field(
        default=0.0, metadata={"help": "segments that are turned into retrieval documents"}
    )
    start: str | None = field(default=None, metadata={"help": "folder of the model to go on from"})
    factor: float = field(
        default=8.0, metadata={"help": "PI and YaRN: longest context over the pretrained one"}
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "by default the best one for method and device"}
    )
    license: str | None = field(
        default=None, metadata={"help": "licence of the weights, for the card; such as apache-2.0"}
    )


class DocumentTrainer(Trainer):
    """Every document counts the same, however few of its tokens are learned.

    The answers of a retrieval document are a hundredth of its tokens: in a mean over tokens they
    would be learned as late. Without such documents the two means are equal.
    """

    loss_is_scaled_for_ga = False  # a mean over the micro-batch, so that the host divides

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        outputs = model(input_ids=inputs["input_ids"], use_cache=False)
        loss = document_loss(outputs.logits, inputs["labels"])
        return (loss, outputs) if return_outputs else loss


def document_loss(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """Mean over documents of the mean loss of their learned tokens, nats."""
    logits_BVT, labels_BT = logits_BTV[:, :-1].float().transpose(1, 2), labels_BT[:, 1:]
    losses_BT = cross_entropy(logits_BVT, labels_BT, ignore_index=IGNORED, reduction="none")
    return (losses_BT.sum(1) / (labels_BT != IGNORED).sum(1)).mean()


def main() -> None:
    parser = StrictParser([StageOptions, ModelOptions, TrainingArguments])
    options, size, arguments = parser.parse_args_and_config()
    tokenizer = tokenizer_of(options)
    cut = segments(load_texts(options.source, options.split), tokenizer, options.length)
    train(options, size, arguments, tokenizer, cut)


def tokenizer_of(options: StageOptions) -> PreTrainedTokenizerBase:
    """That of `start`; for a fresh model a named one or one that is trained here, with symbols."""
    if options.start:
        return AutoTokenizer.from_pretrained(options.tokenizer or options.start)
    if options.tokenizer:
        tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    else:
        texts = load_texts(options.source, options.split)
        taught = (document["text"] for document in itertools.islice(texts, TAUGHT))
        tokenizer = train_tokenizer(taught, options.vocab_size)
    add_symbols(tokenizer, options.symbols)
    return tokenizer


def train(
    options: StageOptions,
    size: ModelOptions,
    arguments: TrainingArguments,
    tokenizer: PreTrainedTokenizerBase,
    cut: Texts,
) -> PreTrainedModel:
    """Trains on the segments `cut` and saves the model with all that belongs to it."""
    set_seed(arguments.seed)
    model = model_of(options, size, tokenizer)
    parameters = model.num_parameters()  # of the whole, before it is sharded
    trainer = DocumentTrainer(
        model=model,
        args=arguments,
        train_dataset=rows_of(options, arguments, tokenizer, cut),
        data_collator=default_data_collator,
        processing_class=tokenizer,
    )
    if arguments.disable_tqdm:
        trainer.remove_callback(PrinterCallback)
    started = time.perf_counter()
    trainer.train(resume_from_checkpoint=arguments.resume_from_checkpoint)
    trainer.save_model()
    if trainer.is_world_process_zero():
        seconds = round(time.perf_counter() - started, 1)
        record(trainer, options, {"parameters": parameters, "seconds": seconds})
    return model


def model_of(
    options: StageOptions, size: ModelOptions, tokenizer: PreTrainedTokenizerBase
) -> PreTrainedModel:
    if options.start is None:
        model = new_model(
            options.method, size, len(tokenizer), options.length, tokenizer.eos_token_id
        )
    elif size != ModelOptions():
        raise ValueError(
            f"start={options.start!r} has a size of its own, and {size} would change nothing: "
            "leave the options of the size out."
        )
    else:
        model = extended(options.start, options.method, options.factor)
    if options.attn_implementation:
        model.set_attn_implementation(options.attn_implementation)
    return model


def rows_of(
    options: StageOptions,
    arguments: TrainingArguments,
    tokenizer: PreTrainedTokenizerBase,
    cut: Texts,
) -> Texts:
    """Shuffled segments, as many as the steps use, some of them turned into retrieval documents."""
    seed = arguments.seed
    if isinstance(cut, Dataset):
        shuffled = cut.shuffle(seed=seed)
        used = arguments.max_steps * arguments.train_batch_size
        used *= arguments.gradient_accumulation_steps * arguments.world_size
        shuffled = shuffled.take(min(used, len(cut))) if used > 0 else shuffled
    else:
        shuffled = cut.shuffle(seed=seed, buffer_size=SHUFFLED)
    return mixed_in(shuffled, tokenizer, options.retrieval_share, seed)


def record(trainer: Trainer, options: StageOptions, facts: dict[str, float]) -> None:
    """Writes `stage.json`, `facts` among it, and a card that has no results yet."""
    arguments: Any = trainer.args
    rows = trainer.state.global_step * arguments.train_batch_size
    rows *= arguments.gradient_accumulation_steps * arguments.world_size
    stage = facts | {
        name: getattr(options, name)
        for name in ("method", "length", "split", "retrieval_share", "factor", "license")
    }
    stage |= {
        "text": name_of(options.source),
        "dataset": None if options.source == STDLIB else hub_id(options.source),
        "continued": options.start is not None,
        "tokens": rows * options.length,
        "device": arguments.device.type,
        "hyperparameters": hyperparameters_of(arguments),
    }
    folder = Path(arguments.output_dir)
    (folder / "stage.json").write_text(json.dumps(stage, indent=1))
    write_card(folder)


if __name__ == "__main__":
    main()
