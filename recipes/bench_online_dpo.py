"""Online DPO side by side with TRL's: time, memory, and what accumulation, pads and ties change.

    python recipes/bench_online_dpo.py [--rounds 5] [--steps 4] [--only time memory faults]

Both trainers get the same Llama, prompts, reward function and number of sampled tokens; sampling
never ends early. Times are those of an optimizer step, the first left out; rounds alternate the
order, because machines are shared, and each round's time is divided by TRL's of the same round.
Processor time says the same on a machine with other work. Memory is what a step needs above what
is held between steps, weights and Adam's state, in a fresh process each: the kernel's peak, on a
GPU the allocator's. The rest compares fixed completions, which need no sampling.
"""

import argparse
import math
import multiprocessing
import os
import re
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from datasets import Dataset, disable_progress_bars
from rich.console import Console
from rich.progress import track
from rich.table import Table
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    PrinterCallback,
    TrainerCallback,
)

from trl_ext import OnlineDPOConfig, OnlineDPOTrainer

SIDES = ("TRL", "trl_ext")
PAD, EOS = 0, 1
MEBIBYTE = 2**20


@dataclass(frozen=True)
class Work:
    """An optimizer step: `prompts_per_pass` · `accumulation` prompts, two completions of each."""

    name: str
    vocabulary: int = 2048
    prompts_per_pass: int = 2
    accumulation: int = 4
    prompt_tokens: int = 16
    tokens: int = 64
    checkpointing: bool = False
    hidden: int = 256
    layers: int = 4

    @property
    def prompts(self) -> int:
        return self.prompts_per_pass * self.accumulation


TIMED = (
    Work("8 prompts at once", prompts_per_pass=8, accumulation=1),
    Work("4 passes of 2 prompts"),
    Work("8 passes of 1 prompt", prompts_per_pass=1, accumulation=8),
    Work("8 passes of 1, 32k words", vocabulary=32_768, prompts_per_pass=1, accumulation=8),
    Work("8 passes of 1, checkpointing", prompts_per_pass=1, accumulation=8, checkpointing=True),
)
WEIGHED = (
    Work("2 prompts in a pass", vocabulary=32_768, prompts_per_pass=2, tokens=128),
    Work("8 prompts in a pass", vocabulary=32_768, prompts_per_pass=8, tokens=128),
)
SCRIPTED = Work("fixed completions", vocabulary=64, tokens=12, hidden=32, layers=2)


class ScriptedLlama(LlamaForCausalLM):
    """Answers each prompt with completions that only the prompt decides, and some pads too many."""

    extra_pads = 0

    def generate(self, input_ids: Any = None, attention_mask: Any = None, **_: Any) -> Tensor:  # type: ignore[override]
        seen: Counter[int] = Counter()
        width = SCRIPTED.tokens + self.extra_pads
        completions_BT = torch.full((len(input_ids), width), PAD)
        for row, (ids, mask) in enumerate(zip(input_ids, attention_mask, strict=True)):
            number = int(ids[mask.bool()].sum())
            draw = torch.Generator().manual_seed(2 * number + seen[number])
            length = int(torch.randint(3, SCRIPTED.tokens, (), generator=draw))
            completions_BT[row, :length] = torch.randint(
                EOS + 1, SCRIPTED.vocabulary, (length,), generator=draw
            )
            completions_BT[row, length] = EOS
            seen[number] += 1
        return torch.cat([input_ids, completions_BT.to(input_ids.device)], dim=1)


class Clock(TrainerCallback):
    """When each optimizer step ended."""

    def __init__(self) -> None:
        self.ends: list[tuple[float, float]] = []

    def on_step_end(self, args, state, control, **kwargs):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append((time.perf_counter(), time.process_time()))

    @property
    def seconds_per_step(self) -> tuple[float, float]:
        """By the wall's clock, and of the processor."""
        steps, ends = len(self.ends) - 1, zip(self.ends[0], self.ends[-1], strict=True)
        wall_s, processor_s = ((last - first) / steps for first, last in ends)
        return wall_s, processor_s


class Gradient(TrainerCallback):
    """The gradient that the optimizer is given."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.value = torch.cat([p.grad.flatten() for p in model.parameters()]).clone()


def main() -> None:
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    disable_progress_bars()
    console = Console()
    for part in options.only:
        console.print(PARTS[part](options))
    load = " ".join(f"{value:.1f}" for value in os.getloadavg())
    console.print(f"Load of the machine over 1, 5 and 15 minutes: {load}; {os.cpu_count()} cores.")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="paired runs of each time")
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps of a run, 2 or more")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch on the CPU")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    return parser.parse_args()


def times(options: argparse.Namespace) -> Table:
    """Seconds per optimizer step at equal work."""
    title = "Time of an optimizer step, 16 completions"
    columns = ("Work", "TRL, s", "trl_ext, s", "ratio", "range", "ratio of CPU time")
    table = Table(*columns, title=title)
    for work in TIMED:
        rounds = []
        for i in track(range(-1, options.rounds), work.name, transient=True):
            order = SIDES[:: 1 if i % 2 else -1]
            timed = {side: seconds_per_step(side, work, options) for side in order}
            if i >= 0:  # the first round warms the caches
                rounds.append(timed)
        walls, processors = (
            [timed["trl_ext"][clock] / timed["TRL"][clock] for timed in rounds] for clock in (0, 1)
        )
        table.add_row(
            work.name,
            *(f"{statistics.median(timed[side][0] for timed in rounds):.2f}" for side in SIDES),
            f"{statistics.median(walls):.2f}",
            f"{min(walls):.2f}-{max(walls):.2f}",
            f"{statistics.median(processors):.2f}",
        )
    return table


def seconds_per_step(side: str, work: Work, options: argparse.Namespace) -> tuple[float, float]:
    clock = Clock()
    run = build(side, work, device=options.device, max_steps=options.steps)
    run.add_callback(clock)
    run.train()
    return clock.seconds_per_step


def memory(options: argparse.Namespace) -> Table:
    """Peak memory of a step above what is held between steps."""
    title = "Peak memory of a step, vocabulary 32k"
    table = Table("Work", "TRL, MiB", "trl_ext, MiB", "ratio", title=title)
    for work in track(WEIGHED, "Memory", transient=True):
        peaks = [in_fresh_process(peak_growth, side, work, options.device) for side in SIDES]
        shown = [f"{peak / MEBIBYTE:.0f}" for peak in peaks]
        table.add_row(work.name, *shown, f"{peaks[1] / peaks[0]:.2f}")
    return table


def in_fresh_process(measure: Callable[..., Any], *arguments: Any) -> Any:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(measure, *arguments).result()


class Peak(TrainerCallback):
    """Bytes by which the second step raises the peak; Adam's state is there since the first."""

    def __init__(self, device: str) -> None:
        self.device, self.growth = device, 0

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 1:
            self.before = peak_bytes(self.device, anew=True)
        else:
            self.growth = peak_bytes(self.device) - self.before


def peak_growth(side: str, work: Work, device: str) -> int:
    torch.set_num_threads(1)
    disable_progress_bars()
    peak = Peak(device)
    run = build(side, replace(work, accumulation=1), device=device, max_steps=2)
    run.add_callback(peak)
    run.train()
    return peak.growth


def peak_bytes(device: str, anew: bool = False) -> int:
    """Most memory held since the last call with `anew`."""
    if device == "cuda":
        if anew:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    if anew:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: resets VmHWM
    status = Path("/proc/self/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert found is not None, status
    return 1024 * int(found[1])


def faults(options: argparse.Namespace) -> Table:
    """What must not change a gradient or a metric, and whether it does."""
    table = Table("On fixed completions", *SIDES, title="Invariances")
    for name, measure in FAULTS.items():
        table.add_row(name, *(measure(side, options.device) for side in SIDES))
    return table


def accumulation_ratio(side: str, device: str) -> str:
    whole, parts = (
        gradient(side, replace(SCRIPTED, prompts_per_pass=size, accumulation=16 // size), device)
        for size in (16, 4)
    )
    return f"{parts.norm() / whole.norm():.3f}"


def tie_gradient(side: str, device: str) -> str:
    return f"{gradient(side, SCRIPTED, device, reward=constant).norm():.3g}"


def gradient(side: str, work: Work, device: str, **given: Any) -> Tensor:
    kept = Gradient()
    run = build(side, work, device=device, max_steps=1, max_grad_norm=0.0, **given)
    run.add_callback(kept)
    run.train()
    return kept.value


def padded_metric(metric: dict[str, str]) -> Callable[[str, str], str]:
    """The metric of the third step without pads, and with 20 pads behind every completion."""

    def measure(side: str, device: str) -> str:
        values = []
        for extra_pads in (0, 20):
            work = replace(SCRIPTED, accumulation=1, prompts_per_pass=8)
            run = build(side, work, device=device, max_steps=3, learning_rate=1e-2, logging_steps=1)
            run.accelerator.unwrap_model(run.model).extra_pads = extra_pads
            run.train()
            values.append([row for row in run.state.log_history if metric[side] in row][-1])
        return " -> ".join(f"{row[metric[side]]:.4f}" for row in values)

    return measure


def evaluation(side: str, device: str) -> str:
    run = build(side, SCRIPTED, device=device, max_steps=1)
    try:
        metrics = run.evaluate()
    except Exception as error:  # what it raises is the result
        return f"{type(error).__name__}"
    return f"loss {metrics['eval_loss']:.4f}"


def build(
    side: str,
    work: Work,
    *,
    reward: Callable[..., list[float]] | None = None,
    **options: Any,
) -> Any:
    """A trainer, TRL's or ours, for this work."""
    prompts, tokenizer = make_prompts(work), make_tokenizer(work.vocabulary)
    trainer, config = trainer_and_config(side)
    per_pass, length = names_of_sizes(side, work)
    arguments = config(
        tempfile.mkdtemp(prefix="bench_online_dpo_"),
        gradient_accumulation_steps=work.accumulation,
        gradient_checkpointing=work.checkpointing,
        generation_kwargs={"min_new_tokens": work.tokens},
        use_cpu=options.pop("device") == "cpu",
        temperature=1.0,
        bf16=False,
        **({"logging_steps": 1000} | per_pass | length | options),
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    run = trainer(
        model=make_model(work),
        reward_funcs=reward or distinct_words,
        args=arguments,
        train_dataset=prompts,
        eval_dataset=prompts,
        processing_class=tokenizer,
    )
    run.remove_callback(PrinterCallback)
    return run


def trainer_and_config(side: str) -> tuple[Any, Any]:
    if side == "trl_ext":
        return OnlineDPOTrainer, OnlineDPOConfig
    # Only ever compared with: nothing of trl_ext rests on `trl.experimental`.
    from trl.experimental.online_dpo import OnlineDPOConfig as TheirConfig
    from trl.experimental.online_dpo import OnlineDPOTrainer as TheirTrainer

    return TheirTrainer, TheirConfig


def names_of_sizes(side: str, work: Work) -> tuple[dict[str, int], dict[str, int]]:
    """TRL counts prompts per device, GRPO and we count completions."""
    if side == "TRL":
        return {"per_device_train_batch_size": work.prompts_per_pass}, {
            "max_new_tokens": work.tokens
        }
    return {"per_device_train_batch_size": 2 * work.prompts_per_pass}, {
        "max_completion_length": work.tokens
    }


def make_model(work: Work) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=work.vocabulary,
        hidden_size=work.hidden,
        intermediate_size=3 * work.hidden,
        num_hidden_layers=work.layers,
        num_attention_heads=4,
        max_position_embeddings=512,
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=EOS,
        tie_word_embeddings=True,
    )
    return (ScriptedLlama if work.name == SCRIPTED.name else LlamaForCausalLM)(config)


@cache
def make_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    words = {"<pad>": PAD, "<eos>": EOS} | {f"w{i}": i for i in range(2, vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )


def make_prompts(work: Work) -> Dataset:
    """Prompts for exactly one optimizer step, so that any order gives the same step."""
    draw = torch.Generator().manual_seed(0)
    shape = (work.prompts, work.prompt_tokens)
    ids = torch.randint(EOS + 1, work.vocabulary, shape, generator=draw).tolist()
    return Dataset.from_dict({"prompt": [" ".join(f"w{i}" for i in row) for row in ids]})


def distinct_words(completions: list[str], **_: Any) -> list[float]:
    return [len(set(text.split())) + math.sin(len(text)) for text in completions]


def constant(completions: list[str], **_: Any) -> list[float]:
    return [1.0] * len(completions)


FAULTS: dict[str, Callable[[str, str], str]] = {
    "gradient, 4 passes of 4 prompts / 1 pass of 16": accumulation_ratio,
    "gradient norm where all rewards are equal": tie_gradient,
    "logged KL, 0 -> 20 pads": padded_metric({"TRL": "objective/kl", "trl_ext": "kl"}),
    "logged entropy, 0 -> 20 pads": padded_metric(
        {"TRL": "objective/entropy", "trl_ext": "entropy"}
    ),
    "evaluate()": evaluation,
}
PARTS = {"time": times, "memory": memory, "faults": faults}

if __name__ == "__main__":
    main()
