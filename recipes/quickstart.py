"""Quickstart: one warm start, three ways to go on, and what each does to pass@1 and pass@16.

    python recipes/quickstart.py [--seed 0] [--output-dir quickstart_output]

Makes a task (calculator puzzles: which keys take both displays to their targets?), a tokenizer and
a Llama of about a million parameters; teaches it to press keys by SFT on worked solutions that
favour some keys more than the puzzles do; then trains three copies with the same prompts, samples,
steps and learning rate: TRL's GRPO, pass@k and majority vote. What differs is the credit of a
sample, and with it the normaliser that each method prescribes.

GRPO settles on the one program that is most often right: a little better with one try, and nothing
gained by sixteen. Pass@k training learns to try the rarer keys too.

It writes `quickstart.png` and `pass-at-k/`: weights, tokenizer and model card. See
`quickstart_seeds.py` for the same over several seeds.
"""

import argparse
import logging
import time
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
import trl
from quickstart_report import draw_curves, print_table, write_card
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    PrinterCallback,
    TrainerCallback,
    set_seed,
)

from trl_ext import (
    GenerationEvaluator,
    MajorityVoteConfig,
    MajorityVoteTrainer,
    PassAtKConfig,
    PassAtKTrainer,
)
from trl_ext.data import calculator_puzzles
from trl_ext.evals import EvaluationResult, evaluate_generations
from trl_ext.rewards.calculator import calculator_reward, keys_pressed

K = 8
# Worked solutions show some keys less often than puzzles need them.
DEMONSTRATED = {"+7": 0.7, "*3": 0.2, "rev": 0.07, "-1": 0.03}
METHODS: dict[str, tuple[type, type, dict[str, Any]]] = {
    "GRPO": (trl.GRPOTrainer, trl.GRPOConfig, {}),
    "pass@k": (PassAtKTrainer, PassAtKConfig, {"k": K}),
    "majority": (
        MajorityVoteTrainer,
        MajorityVoteConfig,
        {"k": K, "answer_extractor": keys_pressed},
    ),
}
MOST_TOKENS = 10  # three keys, each with two displays, and the end


@dataclass
class Options:
    """What the command line can change; the defaults are the run that the README reports."""

    seed: int = field(default=0, metadata={"help": "seed of puzzles, weights and sampling"})
    output_dir: Path = field(default=Path("quickstart_output"), metadata={"help": "results"})
    train_size: int = field(default=12_000, metadata={"help": "training puzzles"})
    held_out_size: int = field(default=256, metadata={"help": "puzzles to evaluate on"})
    warm_start_steps: int = field(default=200, metadata={"help": "steps of SFT, 64 rows each"})
    steps: int = field(default=60, metadata={"help": "steps of each method, 16 prompts each"})
    eval_steps: int = field(default=20, metadata={"help": "steps between points of the curve"})
    samples: int = field(default=32, metadata={"help": "completions per held-out puzzle"})


@dataclass
class Run:
    """What one seed gave: `results` and `curves` by policy, the start under the name `start`."""

    options: Options
    data: datasets.DatasetDict
    demonstrations: datasets.Dataset
    tokenizer: PreTrainedTokenizerFast
    policies: dict[str, PreTrainedModel] = field(default_factory=dict)
    results: dict[str, EvaluationResult] = field(default_factory=dict)
    curves: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    arguments: dict[str, transformers.TrainingArguments] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


def main(options: Options, console: Console | None = None) -> Run:
    quieten()
    console = console or Console()
    started = time.perf_counter()
    run = train_and_evaluate(options, METHODS, console)
    run.seconds["everything"] = time.perf_counter() - started
    print_table(run, console)
    figure = draw_curves(run, options.output_dir / "quickstart.png")
    folder = save(run, figure)
    ask_three(folder, run.data["held_out"], console)
    seconds = time.perf_counter() - started
    console.print(f"\nFigure: {figure}\nModel and card: {folder}\nTime: {seconds:.0f} s")
    return run


def train_and_evaluate(options: Options, methods: dict, console: Console) -> Run:
    """The experiment: one start, every method from it, all judged on the same held-out puzzles."""
    data = calculator_puzzles(options.train_size, options.held_out_size, seed=options.seed)
    shown = demonstrations(options, data["held_out"])
    run = Run(options, data, shown, make_tokenizer(shown))
    with progress_bars(console) as progress:
        bars = {"warm start": progress.add_task("warm start", total=options.warm_start_steps)}
        bars |= {name: progress.add_task(name, total=options.steps) for name in methods}
        bars["evaluation"] = progress.add_task("evaluation", total=len(methods) + 1)
        start = warm_start(run, Bar(progress, bars["warm start"]))
        for name in ("start", *methods):
            policy = make_model(run.tokenizer)
            policy.load_state_dict(start.state_dict())
            if name != "start":
                train(run, name, policy, methods[name], Bar(progress, bars[name]))
            run.policies[name] = policy
            run.results[name] = evaluate(run, policy)
            progress.advance(bars["evaluation"])
    return run


def demonstrations(options: Options, held_out: datasets.Dataset) -> datasets.Dataset:
    """Other puzzles with their solutions; none of them is held out."""
    shown = calculator_puzzles(
        options.train_size, 1, frequencies=DEMONSTRATED, seed=options.seed + 1000
    )
    secret = set(held_out["prompt"])
    return shown["train"].filter(lambda puzzle: puzzle["prompt"] not in secret)


def make_tokenizer(puzzles: datasets.Dataset) -> PreTrainedTokenizerFast:
    """A BPE tokenizer in which every word of the task, numbers included, becomes one token."""
    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), words])
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    tokenizer.train_from_iterator(
        (row["prompt"] + row["completion"] for row in puzzles),
        trainers.BpeTrainer(vocab_size=512, special_tokens=["<pad>", "<eos>"], show_progress=False),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama of 0.9 million parameters; a step of work needs only the step before: one layer."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        initializer_range=0.06,  # with the usual 0.02 so small a model needs three times the steps
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


def warm_start(run: Run, bar: "Bar") -> LlamaForCausalLM:
    """Teaches the keys by worked solutions: right arithmetic, and a broad idea of what to press."""
    set_seed(run.options.seed)
    model = make_model(run.tokenizer)
    arguments = trl.SFTConfig(
        **shared_arguments(run.options),
        max_steps=run.options.warm_start_steps,
        per_device_train_batch_size=64,
        learning_rate=3e-3,
        lr_scheduler_type="cosine",
        warmup_steps=10,
        adam_beta2=0.98,
    )
    trainer = trl.SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=run.demonstrations.select_columns(["prompt", "completion"]),
        processing_class=run.tokenizer,
        callbacks=[bar],
    )
    fit(run, "warm start", trainer)
    return model


def train(run: Run, name: str, policy: PreTrainedModel, method: tuple, bar: "Bar") -> None:
    """Trains `policy` with one method; all get the same prompts, samples, steps and rates."""
    trainer_class, config_class, own = method
    options, held_out = run.options, run.data["held_out"]
    arguments = config_class(
        **shared_arguments(options),
        max_steps=options.steps,
        per_device_train_batch_size=16 * 16,
        num_generations=16,
        max_completion_length=MOST_TOKENS,
        learning_rate=2e-4,
        lr_scheduler_type="constant",
        eval_strategy="steps",
        eval_steps=options.eval_steps,
        eval_on_start=True,
        per_device_eval_batch_size=16,
        **own,
    )
    evaluator = GenerationEvaluator(
        calculator_reward,
        held_out,
        **evaluation_options(options) | {"num_generations": 16, "max_prompts": 128},
    )
    trainer = trainer_class(
        model=policy,
        reward_funcs=calculator_reward,
        args=arguments,
        train_dataset=run.data["train"].remove_columns("completion"),
        # The evaluator samples by itself: TRL's own evaluation gets the least it accepts.
        eval_dataset=held_out.remove_columns("completion").take(1),
        processing_class=run.tokenizer,
        callbacks=[bar, evaluator],
    )
    fit(run, name, trainer)
    run.curves[name] = [row for row in trainer.state.log_history if "eval_pass@1" in row]


def fit(run: Run, name: str, trainer: transformers.Trainer) -> None:
    trainer.remove_callback(PrinterCallback)  # prints every log line over the progress bars
    started = time.perf_counter()
    trainer.train()
    run.seconds[name] = time.perf_counter() - started
    run.arguments[name] = trainer.args


def shared_arguments(options: Options) -> dict[str, Any]:
    return {
        "output_dir": str(options.output_dir / "trainer"),
        "seed": options.seed,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def evaluation_options(options: Options) -> dict[str, Any]:
    return {
        "num_generations": options.samples,
        "ks": [k for k in (1, 2, 4, 8, 16) if k <= options.samples],
        "answer_extractor": keys_pressed,
        "max_completion_length": MOST_TOKENS,
        "batch_size": 2048,
        "seed": options.seed,
        "disable_tqdm": True,
    }


def evaluate(run: Run, policy: PreTrainedModel) -> EvaluationResult:
    return evaluate_generations(
        policy,
        run.tokenizer,
        run.data["held_out"],
        calculator_reward,
        **evaluation_options(run.options),
    )


def save(run: Run, figure: Path) -> Path:
    """Writes the pass@k policy as any Hugging Face model, with a card that shows these numbers."""
    folder = run.options.output_dir / "pass-at-k"
    run.policies["pass@k"].save_pretrained(folder)
    run.tokenizer.save_pretrained(folder)
    write_card(run, folder, figure)
    return folder


def ask_three(folder: Path, held_out: datasets.Dataset, console: Console) -> None:
    """Reloads the model as a stranger would and lets it try one puzzle of each level."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    console.print("\n[bold]The saved model, reloaded, on three held-out puzzles: 16 tries each")
    for level in sorted(set(held_out["level"])):
        puzzle = next(row for row in held_out if row["level"] == level)
        inputs = tokenizer(puzzle["prompt"], return_tensors="pt")
        tokens = model.generate(
            **inputs,
            do_sample=True,
            num_return_sequences=16,
            max_new_tokens=MOST_TOKENS,
        )
        tries = tokenizer.batch_decode(tokens[:, inputs.input_ids.size(1) :], True)
        columns = {name: [puzzle[name]] * 16 for name in ("start", "target", "level", "keys")}
        rewards = calculator_reward(tries, **columns)
        shown = tries[rewards.index(max(rewards))]
        verdict = f"[green]right, {sum(rewards):.0f} of 16" if any(rewards) else "[red]not found"
        console.print(f"  {puzzle['prompt'].strip():<28} {shown:<30} {verdict}", highlight=False)


class Bar(TrainerCallback):
    """Moves a progress bar by one for each step of a trainer."""

    def __init__(self, progress: Progress, task: Any):
        self.progress, self.task = progress, task

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress.advance(self.task)


def progress_bars(console: Console) -> AbstractContextManager[Progress]:
    columns = TextColumn("{task.description:>12}"), BarColumn(), MofNCompleteColumn()
    return Progress(*columns, TimeElapsedColumn(), console=console)


def quieten() -> None:
    """Leaves the screen to the progress bars and the results."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()


def parse_options(arguments: Sequence[str] | None = None) -> Options:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name, about in Options.__dataclass_fields__.items():
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=type(about.default),
            default=about.default,
            help=f"{about.metadata['help']} (%(default)s)",
        )
    return Options(**vars(parser.parse_args(arguments)))


if __name__ == "__main__":
    torch.set_num_threads(min(2, torch.get_num_threads()))
    main(parse_options())
