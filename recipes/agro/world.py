"""The world of the studies on a task: stories that must use given words, a policy, and its samples.

A story is right if its nouns are the words of the prompt, all of them and no other. The policy that
SFT leaves writes as the writers of the stories do, who forget words and add some. It is the start
of every run, the reference of every KL, and the older policy of the fixed data: it wrote several
stories for each of some prompts, and all of them are scored.
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
    AutoTokenizer,
    GenerationConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    set_seed,
)

from trl_ext import evaluate_generations, policy_drift
from trl_ext.completions import completion_token_ids
from trl_ext.data.stories import NOUNS, demonstrations, keyword_stories, vocabulary
from trl_ext.rollouts import sample, sampled_logps
from trl_ext.studies import cpu_arguments, fit, word_llama, word_tokenizer

MOST_TOKENS = 16  # the longest written story has 13 words
ROWS_AT_ONCE = 1024


@dataclass(frozen=True)
class Size:
    """How much of a world is made; the smoke test makes little.

    Attributes:
        written: pairs of stories, of which SFT learns both.
        held_out: prompts to measure on, of other words.
        scored: prompts of the fixed data.
        completions: per prompt, of the fixed data and of the on-policy runs.
        prompts: of a training step, each with all of its completions.
        sft_steps: of 64 rows.
    """

    written: int = 8000
    held_out: int = 256
    scored: int = 1024
    completions: int = 8
    prompts: int = 32
    sft_steps: int = 300


# Enough SFT that some of the stories are right: without, there would be no pair.
SMALL = Size(written=1000, held_out=8, scored=64, completions=4, prompts=16, sft_steps=150)


@dataclass(frozen=True)
class World:
    """What the runs of one seed share.

    Attributes:
        size: of the world.
        prompts: splits `train` and `held_out`, with the column `keywords` that the reward reads.
        scored: the fixed data: `prompt`, `responses`, `scores` in {0, 1} and `logps`, the latter
            three lists per row.
        tokenizer: one token per word.
        policy: folder of the SFT policy.
    """

    size: Size
    prompts: datasets.DatasetDict
    scored: datasets.Dataset
    tokenizer: PreTrainedTokenizerFast
    policy: str


def right(completions: Sequence[str], keywords: Sequence[Sequence[str]], **_: Any) -> list[float]:
    """Reward: 1 if the nouns of a story are those asked for, else 0."""
    told = [{word for word in story.split() if word in NOUNS} for story in completions]
    return [float(nouns == set(asked)) for nouns, asked in zip(told, keywords, strict=True)]


def make_world(folder: Path, seed: int, size: Size) -> World:
    """Makes the world of a seed, or loads it where `folder` holds it already."""
    home, made = folder / f"world-{seed}", {**vars(size), "seed": seed}
    stories = keyword_stories(size.written, size.held_out, seed=seed)
    record, policy, scored = home / "world.json", home / "policy", home / "scored"
    if not record.exists() or json.loads(record.read_text()) != made:
        record.unlink(missing_ok=True)
        train_policy(stories["train"], policy, seed, size)
        sample_scored(stories["train"], policy, seed, size).save_to_disk(scored)
        record.write_text(json.dumps(made))  # last: a world without it is made again
    fixed = datasets.load_from_disk(scored)
    assert isinstance(fixed, datasets.Dataset)
    prompts = stories.select_columns(["prompt", "keywords"])
    return World(size, prompts, fixed, AutoTokenizer.from_pretrained(policy), str(policy))


def train_policy(stories: datasets.Dataset, home: Path, seed: int, size: Size) -> None:
    """SFT on all stories, right or wrong."""
    tokenizer = word_tokenizer(vocabulary())
    set_seed(seed)
    trainer = trl.SFTTrainer(
        model=LlamaForCausalLM(word_llama(tokenizer)),
        args=trl.SFTConfig(
            **cpu_arguments(home, seed),
            max_steps=size.sft_steps,
            per_device_train_batch_size=64,
            learning_rate=3e-3,
            lr_scheduler_type="cosine",
            warmup_steps=10,
            adam_beta2=0.98,
        ),
        train_dataset=demonstrations(stories),
        processing_class=tokenizer,
    )
    fit(trainer).save_model()


def sample_scored(
    stories: datasets.Dataset, policy: Path, seed: int, size: Size
) -> datasets.Dataset:
    """Stories of the policy for distinct prompts, their scores and their log-probabilities."""
    model = AutoModelForCausalLM.from_pretrained(policy).eval()
    tokenizer, G = AutoTokenizer.from_pretrained(policy), size.completions
    keywords = dict(zip(stories["prompt"], stories["keywords"], strict=True))
    prompts = list(keywords)[: size.scored]
    repeated = [prompt for prompt in prompts for _ in range(G)]
    prompt_ids: list[list[int]] = tokenizer(repeated).input_ids
    set_seed(seed)
    config = GenerationConfig(
        do_sample=True,
        top_k=0,
        max_new_tokens=MOST_TOKENS,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    ends, ids = [tokenizer.eos_token_id], []
    for start in range(0, len(prompt_ids), ROWS_AT_ONCE):
        some = prompt_ids[start : start + ROWS_AT_ONCE]
        ids += sample(model, some, config, eos_token_ids=ends)
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    # What stands in a data set is text: it is scored as the trainers will read it.
    known = zip(repeated, texts, prompt_ids, strict=True)
    read = [completion_token_ids(tokenizer, prompt, text, p) for prompt, text, p in known]
    logps = [sum(row) for row in sampled_logps(model, prompt_ids, read, 1.0, ROWS_AT_ONCE)]
    scores = right(texts, [keywords[prompt] for prompt in repeated])
    columns = {"responses": texts, "scores": scores, "logps": logps}
    groups = {
        name: [values[i : i + G] for i in range(0, len(values), G)]
        for name, values in columns.items()
    }
    asked = [keywords[prompt] for prompt in prompts]
    return datasets.Dataset.from_dict({"prompt": prompts, "keywords": asked, **groups})


def load_policy(world: World) -> PreTrainedModel:
    """A fresh copy of the SFT policy."""
    return AutoModelForCausalLM.from_pretrained(world.policy)


def measure(world: World, model: PreTrainedModel, *, samples: int, seed: int) -> dict[str, float]:
    """Held-out figures of a policy, each with its standard error over prompts.

    Args:
        world: its held-out prompts.
        model: the policy.
        samples: stories per prompt.
        seed: of the samples.

    Returns:
        `accuracy`, the probability that a sample is right; `kl` to the SFT policy in nats per
        story, exact for each step; each name with `_se` is its standard error.
    """
    known = {"max_completion_length": MOST_TOKENS, "batch_size": 2048, "seed": seed}
    known |= {"num_generations": samples, "disable_tqdm": True}
    held_out = world.prompts["held_out"]
    judged = evaluate_generations(model, world.tokenizer, held_out, right, **known)
    drift = policy_drift(model, world.tokenizer, held_out, reference=load_policy(world), **known)
    found = {"accuracy": (judged.metrics(""), "pass@1"), "kl": (drift.metrics(""), "kl_exact")}
    return {
        name + suffix: numbers[key + suffix]
        for name, (numbers, key) in found.items()
        for suffix in ("", "_se")
    }
