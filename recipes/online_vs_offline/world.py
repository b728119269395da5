"""The toy world of both studies: stories, a policy taught by SFT, and a reward learned from pairs.

What is trained never sees the gold reward: the policy learns to write like the writers of the
stories, the proxy learns from a few labelled pairs which of two stories was preferred, and online
methods ask the proxy. The gold reward labels the pairs and judges the results.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
import trl
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    set_seed,
)

from trl_ext import evaluate_preferences, evaluate_win_rate, policy_drift
from trl_ext.data.stories import demonstrations, keyword_stories, story_quality, vocabulary
from trl_ext.studies import cpu_arguments, fit, word_llama, word_tokenizer

NO_END = -3.0  # reward of a story without end: the proxy gives next to no story less
MOST_TOKENS = 16  # the longest written story has 13 words
PAIR = ["prompt", "chosen", "rejected"]


@dataclass(frozen=True)
class World:
    """What both studies share, for one seed.

    Attributes:
        data: splits `written`, of which SFT learns and whose labels nobody sees; its first rows
            `train`, the labelled pairs; and `held_out`, of other keywords. Columns `prompt`,
            `chosen`, `rejected`, `keywords`.
        tokenizer: one token per word.
        policy: folder of the SFT policy, start and reference of every run.
        proxy: folder of the reward model.
    """

    data: datasets.DatasetDict
    tokenizer: PreTrainedTokenizerFast
    policy: str
    proxy: str


@dataclass(frozen=True)
class Size:
    """How much of a world is made; the smoke test makes little."""

    written: int = 8000
    labelled: int = 1000
    held_out: int = 256
    sft_steps: int = 300
    proxy_epochs: int = 4


SMALL = Size(written=64, labelled=48, held_out=8, sft_steps=4, proxy_epochs=1)


def make_world(folder: Path, seed: int = 0, size: Size | None = None) -> World:
    """Makes the world of a seed, or loads it where `folder` holds it already."""
    size = size or Size()
    home, made = folder / f"world-{seed}", {**vars(size), "seed": seed}
    stories = keyword_stories(size.written, size.held_out, seed=seed)
    data = datasets.DatasetDict(
        written=stories["train"],
        train=stories["train"].take(size.labelled),
        held_out=stories["held_out"],
    )
    tokenizer = word_tokenizer(vocabulary())
    world = World(data, tokenizer, str(home / "policy"), str(home / "proxy"))
    record = home / "world.json"
    if not record.exists() or json.loads(record.read_text()) != made:
        record.unlink(missing_ok=True)
        train_policy(world, seed, size)
        train_proxy(world, seed, size)
        record.write_text(json.dumps(made))  # last: a world without it is made again
    return world


def train_policy(world: World, seed: int, size: Size) -> None:
    """SFT on both stories of each pair, whatever its label: the policy writes as all writers do."""
    set_seed(seed)
    trainer = trl.SFTTrainer(
        model=LlamaForCausalLM(word_llama(world.tokenizer)),
        args=trl.SFTConfig(
            **cpu_arguments(world.policy, seed),
            max_steps=size.sft_steps,
            per_device_train_batch_size=64,
            learning_rate=3e-3,
            lr_scheduler_type="cosine",
            warmup_steps=10,
            adam_beta2=0.98,
        ),
        train_dataset=demonstrations(world.data["written"]),
        processing_class=world.tokenizer,
    )
    fit(trainer).save_model()


def train_proxy(world: World, seed: int, size: Size) -> None:
    """A reward model on the labelled pairs, grown from the policy."""
    set_seed(seed)
    trainer = trl.RewardTrainer(
        model=LlamaForSequenceClassification.from_pretrained(world.policy, num_labels=1),
        args=trl.RewardConfig(
            **cpu_arguments(world.proxy, seed),
            num_train_epochs=size.proxy_epochs,
            per_device_train_batch_size=64,
            learning_rate=1e-3,
            lr_scheduler_type="cosine",
            max_length=64,
            center_rewards_coefficient=0.01,  # pairs leave the zero of the scores open
        ),
        train_dataset=world.data["train"].select_columns(PAIR),
        processing_class=world.tokenizer,
    )
    fit(trainer).save_model()


def load_policy(world: World) -> PreTrainedModel:
    """A fresh copy of the SFT policy."""
    return AutoModelForCausalLM.from_pretrained(world.policy)


def proxy_reward(world: World) -> Callable[..., list[float]]:
    """The proxy as a reward function. It reads the score at the end of sequence, as it was trained;
    a reward model in `reward_funcs` would be shown the text without it.
    """
    model = AutoModelForSequenceClassification.from_pretrained(world.proxy).eval()

    @torch.no_grad()
    def proxy(completions: Sequence[str], prompts: Sequence[str], **kwargs: Any) -> list[float]:
        end = world.tokenizer.eos_token
        texts = [f"{p}{c} {end}" for p, c in zip(prompts, completions, strict=True)]
        inputs = world.tokenizer(
            texts, return_tensors="pt", padding=True, return_token_type_ids=False
        )
        return model(**inputs).logits[:, 0].tolist()

    return proxy


def measure(
    world: World,
    model: PreTrainedModel,
    *,
    samples: int = 4,
    temperature: float = 1.0,
    seed: int = 0,
) -> dict[str, float]:
    """Held-out figures of a policy, each with its standard error over prompts.

    Args:
        world: its held-out prompts; the chosen story of each is the opponent.
        model: the policy.
        samples: completions per prompt.
        temperature: of win rate and rewards; the KL is always that of the policy itself.
        seed: of the samples.

    Returns:
        `win_rate` and `gold` by the gold reward, `proxy_win_rate` and `proxy` by the learned one,
        on the same samples; `kl` in nats per story, exact for each step; `sft_perplexity`;
        `length` in tokens; `truncated`; `accuracy` and `chosen_log_ratio` of the policy as a
        classifier of the held-out pairs. Each name with `_se` is its standard error.
    """
    held_out, reference = world.data["held_out"], load_policy(world)
    sampling = {
        "num_generations": samples,
        "max_completion_length": MOST_TOKENS,
        "batch_size": 1024,
        "seed": seed,
        "disable_tqdm": True,
    }
    judged = {"opponent": "chosen", "temperature": temperature, **sampling}
    gold, proxy = (
        evaluate_win_rate(model, world.tokenizer, held_out, reward_func=reward, **judged).metrics(
            ""
        )
        for reward in (story_quality, proxy_reward(world))
    )
    drift = policy_drift(model, world.tokenizer, held_out, reference=reference, **sampling)
    pairs = evaluate_preferences(
        model, world.tokenizer, held_out, reference=reference, batch_size=512, disable_tqdm=True
    )
    return named(gold, proxy, drift.metrics(""), pairs.metrics(""))


def named(
    gold: dict[str, float],
    proxy: dict[str, float],
    drift: dict[str, float],
    pairs: dict[str, float],
) -> dict[str, float]:
    """The figures of `measure`, with their standard errors, under the studies' names."""
    found = {
        "win_rate": (gold, "win_rate"),
        "gold": (gold, "gold_score"),
        "proxy_win_rate": (proxy, "win_rate"),
        "proxy": (proxy, "gold_score"),
        "length": (gold, "mean_length"),
        "truncated": (gold, "truncation_rate"),
        "kl": (drift, "kl_exact"),
        "sft_perplexity": (drift, "reference_perplexity"),
        "accuracy": (pairs, "accuracy"),
        "chosen_log_ratio": (pairs, "chosen_log_ratio"),
    }
    return {
        name + suffix: numbers[key + suffix]
        for name, (numbers, key) in found.items()
        for suffix in ("", "_se")
    }
