"""All methods at one size, on the same data and tokens, over seeds; measured after both stages.

Stage one pretrains on short contexts; PI and YaRN rescale the RoPE model of it. Stage two goes on
for a few steps at a longer context.
"""

import json
import multiprocessing
import shutil
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path

import datasets
import torch
import transformers
from card import write_card
from datasets import Dataset
from evaluation import Result, evaluate, windows_of
from methods import NAMES, STARTS_FROM, ModelOptions, extended
from retrieval import add_symbols
from rich.progress import track
from text import STDLIB, load_texts, name_of, segments, train_tokenizer
from train import StageOptions, train
from transformers import AutoTokenizer, PreTrainedModel, TrainingArguments

EVERY = 4  # document of which a tokenizer is taught
# TAPA's was chosen on seed 0 among 1e-3, 2e-3 and 4e-3: README.md.
RATES = {"rope": 4e-3, "tapa": 2e-3, "stickbreaking": 4e-3}
LONG_RATE = 0.2  # of stage one's: what the TAPA paper has for RoPE


@dataclass
class StudyOptions:
    """What the command line can change; the defaults are the run that the README reports."""

    seeds: list[int] = field(
        default_factory=lambda: [0], metadata={"help": "of weights, order and retrieval documents"}
    )
    methods: list[str] = field(
        default_factory=lambda: list(NAMES), metadata={"help": f"some of {', '.join(NAMES)}"}
    )
    source: str = field(
        default=STDLIB, metadata={"help": "Python's own sources, or a folder of text"}
    )
    documents: int = field(default=200, metadata={"help": "files to train on, at most"})
    folder: str = field(default="runs/long_context", metadata={"help": "results"})
    vocab_size: int = field(default=257, metadata={"help": "tokens; 257 is bytes"})
    length: int = field(default=128, metadata={"help": "context of stage one, tokens"})
    multiples: list[int] = field(
        default_factory=lambda: [1, 2, 4, 8], metadata={"help": "of it, at which is measured"}
    )
    steps: int = field(default=1200, metadata={"help": "of stage one"})
    rows: int = field(default=16, metadata={"help": "contexts per step of stage one"})
    long_multiple: int = field(default=4, metadata={"help": "context of stage two, of stage one's"})
    long_steps: int = field(default=25, metadata={"help": "of stage two; 0 leaves it out"})
    symbols: int = field(default=16, metadata={"help": "tokens of which facts are made"})
    retrieval_share: float = field(
        default=0.5, metadata={"help": "segments that are turned into retrieval documents"}
    )
    windows: int = field(default=32, metadata={"help": "held-out windows, at most"})
    stride: int = field(default=64, metadata={"help": "scored tokens per window"})
    processes: int = field(default=2, metadata={"help": "models at a time, one core each"})

    def __post_init__(self) -> None:
        if unknown := set(self.methods) - set(NAMES):
            raise ValueError(
                f"methods={self.methods}: {', '.join(sorted(unknown))} does not exist. Choose from "
                f"{', '.join(NAMES)}."
            )
        if min(self.multiples, default=0) < 1 or self.long_multiple < 1:
            raise ValueError(
                f"multiples={self.multiples} and long_multiple={self.long_multiple} are multiples "
                "of the training length: use whole numbers from 1."
            )

    @property
    def lengths(self) -> list[int]:
        return [self.length * multiple for multiple in sorted(self.multiples)]


@dataclass(frozen=True)
class Job:
    """A model to be trained: `stage` is "short" or "long"."""

    options: StudyOptions
    size: ModelOptions
    seed: int
    method: str
    stage: str

    @property
    def length(self) -> int:
        return self.options.length * (1 if self.stage == "short" else self.options.long_multiple)

    @property
    def home(self) -> Path:
        return model_folder(self.options, self.seed, self.method, self.stage)


def study(options: StudyOptions, size: ModelOptions) -> list[Result]:
    """Runs all jobs; each adds its rows to `<folder>/long_context.json`.

    Returns:
        One row per seed, method, stage and length, as of `evaluation.summary`.
    """
    folder = Path(options.folder)
    prepare(options)
    rows: list[Result] = []
    with pool_of(options.processes) as pool:
        for stage, methods in stages(options).items():
            jobs = [Job(options, size, s, m, stage) for s in options.seeds for m in methods]
            found = pool.map(trained, jobs) if pool else map(trained, jobs)
            done = track(found, f"stage {stage}", len(jobs), transient=True)
            for some in done:
                rows += some
                kept = {"options": asdict(options), "size": asdict(size), "rows": rows}
                (folder / "long_context.json").write_text(json.dumps(kept, indent=1))
    return rows


def pool_of(processes: int) -> AbstractContextManager[ProcessPoolExecutor | None]:
    """Processes of their own, or this one."""
    if processes == 1:
        return nullcontext()
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(processes, context, set_up_process)


def stages(options: StudyOptions) -> dict[str, list[str]]:
    """What is trained in each stage; PI and YaRN start from RoPE's model."""
    bases = list(dict.fromkeys(STARTS_FROM[method] for method in options.methods))
    return {"short": bases} | ({"long": options.methods} if options.long_steps else {})


def prepare(options: StudyOptions) -> None:
    """Tokenizer, segments and held-out windows, once for all seeds and methods."""
    home = data_folder(options)
    texts = load_texts(options.source, "train")
    if not isinstance(texts, Dataset):
        raise ValueError(
            f"source={options.source!r} is read as it comes: the study takes a folder. For a data "
            "set use train.py and evaluate.py."
        )
    texts = texts.shuffle(seed=0).take(min(options.documents, len(texts)))
    shutil.rmtree(home, ignore_errors=True)
    tokenizer = train_tokenizer(texts["text"][::EVERY], options.vocab_size)
    add_symbols(tokenizer, options.symbols)
    tokenizer.save_pretrained(home / "tokenizer")
    lengths = {options.length, options.length * options.long_multiple}
    for length in lengths:
        segments(texts, tokenizer, length).save_to_disk(home / str(length))
    longest = max(*options.lengths, *lengths)
    held_out = load_texts(options.source, "test").shuffle(seed=0)
    windows = windows_of(held_out, tokenizer, longest, options.windows)
    (home / "windows.json").write_text(json.dumps(windows))


def trained(job: Job) -> list[Result]:
    """Trains, measures and writes the card; PI and YaRN are ready after the short stage of RoPE."""
    options = job.options
    short = job.stage == "short"
    stage = StageOptions(
        method=job.method,
        length=job.length,
        source=options.source,
        retrieval_share=options.retrieval_share,
        start=None if short else str(start_of(job)),
        factor=factor_of(options),
        license="apache-2.0",
    )
    data = data_folder(options)
    tokenizer = AutoTokenizer.from_pretrained(data / "tokenizer")
    cut = datasets.load_from_disk(data / str(job.length))
    size = job.size if short else ModelOptions()  # a start has its own
    model = train(stage, size, arguments_of(job), tokenizer, cut)
    rows = measured(job, job.method, model)
    write_card(job.home, rows, name_of(options.source))
    for method in options.methods if short else ():
        if STARTS_FROM[method] == job.method != method:
            rows += measured(job, method, extended(str(job.home), method, factor_of(options)))
    return rows


def measured(job: Job, method: str, model: PreTrainedModel) -> list[Result]:
    options = job.options
    data = data_folder(options)
    tokenizer = AutoTokenizer.from_pretrained(data / "tokenizer")
    windows = json.loads((data / "windows.json").read_text())
    rows = evaluate(model, tokenizer, windows, options.lengths, options.stride)
    run = {"seed": job.seed, "method": method, "stage": job.stage, "trained_length": job.length}
    return [run | row for row in rows]


def arguments_of(job: Job) -> TrainingArguments:
    """AdamW and cosine schedule as in the papers; stage two has fewer steps of as many tokens."""
    options, short = job.options, job.stage == "short"
    rate = RATES[STARTS_FROM[job.method]]
    steps = options.steps if short else options.long_steps
    rows = options.rows if short else max(1, options.rows // options.long_multiple)
    return TrainingArguments(
        output_dir=str(job.home),
        seed=job.seed,
        max_steps=steps,
        per_device_train_batch_size=rows,
        learning_rate=rate if short else LONG_RATE * rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.1},
        warmup_steps=max(1, steps // 20),
        adam_beta2=0.95,
        weight_decay=0.0,
        bf16=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def start_of(job: Job) -> Path:
    return model_folder(job.options, job.seed, STARTS_FROM[job.method], "short")


def model_folder(options: StudyOptions, seed: int, method: str, stage: str) -> Path:
    return Path(options.folder) / f"seed-{seed}" / f"{method}-{stage}"


def data_folder(options: StudyOptions) -> Path:
    return Path(options.folder) / "data"


def factor_of(options: StudyOptions) -> float:
    """As in the TAPA paper: the longest context that is measured, over the pretrained one."""
    return float(max(options.multiples))


def set_up_process() -> None:
    """Leaves the screen to the recipe's own lines, and a core to each process."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
