"""Rollouts per second from branched caches, against prefilling each prefix K times.

    python recipes/bench_vineppo.py [--prefixes 64 256 1024] [--tokens 8 16 32 64] [--rounds 5]

Both sample K = 9 continuations of the same prefixes with the same options: `branch`, which prefills
each prefix once and branches its cache, and `model.generate` on every prefix K times, as TRL's own
engine would do it without a server. No continuation ends early, so that both do the same work.
Within a round the two follow each other, in alternating order; shown are medians over rounds, and
the median of the rounds' ratios: this machine may be shared. A Llama of 5 million parameters.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import torch
import transformers
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from trl_ext.rollouts import branch

K, PREFIXES, VOCABULARY = 9, 4, 2048
Sampler = Callable[[list[list[int]], int], object]


def main(argv: Sequence[str] | None = None) -> None:
    given = parse_options(argv)
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(given.threads)
    samplers = {"branched": branched(model := make_model()), "prefilled K times": naive(model)}
    table = Table("prefix", "new tokens", *[f"{name}, rollouts/s" for name in samplers], "ratio")
    cases = [(length, new) for length in given.prefixes for new in given.tokens]
    for length, new in track(cases, "Sampling"):
        seconds = measure(samplers, length, new, given.rounds)
        speeds = [K * PREFIXES / statistics.median(of_one) for of_one in seconds.values()]
        ours, theirs = seconds.values()
        ratio = statistics.median(b / a for a, b in zip(ours, theirs, strict=True))
        table.add_row(f"{length}", f"{new}", *[f"{speed:.1f}" for speed in speeds], f"{ratio:.2f}")
    size = f"{model.num_parameters() / 1e6:.1f} million parameters, K = {K}, {PREFIXES} prefixes"
    console = Console()
    console.print(table)
    console.print(f"{size}, {given.threads} thread(s), {given.rounds} rounds")


def parse_options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--prefixes", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--tokens", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args(argv)


def make_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def options(new: int) -> GenerationConfig:
    return GenerationConfig(
        max_new_tokens=new, do_sample=True, top_k=0, pad_token_id=0, disable_compile=True
    )


def branched(model: LlamaForCausalLM) -> Sampler:
    def sample(prefixes: list[list[int]], new: int) -> object:
        budgets = [new] * len(prefixes)
        many = {"branches": K, "max_new_tokens": budgets, "rows_per_pass": K * len(prefixes)}
        return branch(model, prefixes, options(new), eos_token_ids=[], **many)

    return sample


def naive(model: LlamaForCausalLM) -> Sampler:
    def sample(prefixes: list[list[int]], new: int) -> object:
        ids = torch.tensor(prefixes).repeat_interleave(K, 0)
        mask = torch.ones_like(ids)
        return model.generate(ids, attention_mask=mask, generation_config=options(new))

    return sample


def measure(
    samplers: dict[str, Sampler], length: int, new: int, rounds: int
) -> dict[str, list[float]]:
    """Seconds of each sampler in each round; a first one, not counted, warms both up."""
    seconds: dict[str, list[float]] = {name: [] for name in samplers}
    for turn in range(rounds + 1):
        prefixes = torch.randint(1, VOCABULARY, (PREFIXES, length)).tolist()
        for name in list(samplers)[:: 1 if turn % 2 else -1]:
            started = time.perf_counter()
            samplers[name](prefixes, new)
            if turn:
                seconds[name].append(time.perf_counter() - started)
    return seconds


if __name__ == "__main__":
    main()
