"""Short real runs on the tiny model, for every test that compares one run with another."""

import dataclasses
import math
import os
from collections.abc import Callable
from typing import Any

import torch
import trl
from torch import Tensor
from transformers import TrainerCallback

from tests.tiny import tiny_llama, tiny_prompts, tiny_tokenizer
from trl_ext import (
    AGROConfig,
    AGROTrainer,
    GRPOConfig,
    GRPOTrainer,
    JEPOConfig,
    JEPOTrainer,
    MajorityVoteConfig,
    MajorityVoteTrainer,
    MTPOConfig,
    MTPOTrainer,
    NashConfig,
    NashTrainer,
    OnlineDPOConfig,
    OnlineDPOTrainer,
    PassAtKConfig,
    PassAtKTrainer,
    VinePPOConfig,
    VinePPOTrainer,
)
from trl_ext.rollouts import ProcessSampler, Request, Rollout
from trl_ext.rollouts._snapshot import Snapshot
from trl_ext.rollouts._worker import Job, Worker, training_flags
from trl_ext.trainers._seam import GroupTrainer

TOKENIZER = tiny_tokenizer()
TIMES = ("time", "runtime", "per_second", "profiling", "perf/")


def each_letter(text: str) -> list[int]:
    """Steps of one letter."""
    return list(range(1, len(text) + 1))


def each_second_letter(text: str) -> list[int]:
    """Steps of two letters."""
    return list(range(2, len(text) + 1, 2))


def first_letter(text: str) -> str | None:
    return text[:1] or None


# One row per public trainer: its config and the options under which it does something of its own.
METHODS: dict[type, tuple[type, dict[str, Any]]] = {
    GRPOTrainer: (GRPOConfig, {"beta": 0.1}),
    PassAtKTrainer: (PassAtKConfig, {"k": 2, "beta": 0.1}),
    MajorityVoteTrainer: (
        MajorityVoteConfig,
        {"k": 3, "answer_extractor": first_letter, "beta": 0.1},
    ),
    OnlineDPOTrainer: (OnlineDPOConfig, {"beta": 0.1}),
    NashTrainer: (NashConfig, {"algorithm": "nash_md", "judge": "bradley_terry", "beta": 0.1}),
    AGROTrainer: (AGROConfig, {"beta": 0.1}),
    MTPOTrainer: (MTPOConfig, {"judge": "bradley_terry", "beta": 0.1}),
    VinePPOTrainer: (
        VinePPOConfig,
        {"num_rollouts": 2, "splitter": "tests.runs:each_second_letter", "beta": 0.1},
    ),
    # Rewards for most groups, the bound for those without any.
    JEPOTrainer: (JEPOConfig, {"marker": "", "combine_with_reward": True, "beta": 0.1}),
}
OURS = list(METHODS)
OF_GROUPS = [trainer for trainer in OURS if issubclass(trainer, GroupTrainer)]
JUDGED = [trainer for trainer in OF_GROUPS if trainer is not JEPOTrainer]  # or rewarded alone
OF_TOKENS = [trainer for trainer in OURS if trainer not in OF_GROUPS]

# Further ways of a trainer over groups: each has a state, an opponent or an anchor of its own.
ALGORITHMS: dict[str, tuple[type, dict[str, Any]]] = {
    "nash_mp": (NashTrainer, {"algorithm": "nash_mp", "proximal_steps": 2}),
    "spo": (NashTrainer, {"algorithm": "spo"}),
    "inpo": (NashTrainer, {"algorithm": "inpo", "eta": 0.3}),
    "dno": (NashTrainer, {"algorithm": "dno", "beta": 0.0, "eta": 0.5}),
    "dno_prct": (NashTrainer, {"algorithm": "dno_prct", "beta": 0.0, "eta": 0.5}),
    "mtpo_tau": (MTPOTrainer, {"tau": 0.3, "beta": 0.2}),
    "multi_turn_rlhf": (MTPOTrainer, {"judge": None, "turn_kl": "vocab"}),
    "xpo": (OnlineDPOTrainer, {"loss_type": "xpo", "num_generations": 2, "xpo_alpha": 0.1}),
    "proximal_rloo": (OnlineDPOTrainer, {"loss_type": "proximal_rloo"}),
    "topr": (AGROTrainer, {"loss_type": "topr", "beta": 0.0}),
}


def texts_of(completions: list) -> list[str]:
    return [c if isinstance(c, str) else c[-1]["content"] for c in completions]


def case(value: Any) -> str:
    """Name of a parametrised case, the same in each process: a function's own has its address."""
    if isinstance(value, dict):
        return "-".join(f"{key}={case(part)}" for key, part in value.items()) or "default"
    return getattr(value, "__name__", str(value))


def vowels(completions: list, **_: Any) -> list[float]:
    """Half of a tiny random model's completions earn something: every group has a signal."""
    return [
        float(sum(letter in "aeiouAEIOU02468" for letter in text) % 2)
        for text in texts_of(completions)
    ]


def by_letters(prompts: list, first: list, second: list) -> list[float]:
    """A judge of texts: hardly ever a tie, and consistent between the two orders."""
    scores = [[sum(map(ord, text)) % 7 for text in texts_of(side)] for side in (first, second)]
    return [1 / (1 + math.exp(b - a)) for a, b in zip(*scores, strict=True)]


def settings(**options: Any) -> dict[str, Any]:
    return {
        "max_steps": 2,
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 6,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "disable_tqdm": True,
        **options,
    }


def build(trainer: type, folder: Any, *, model: Any = None, arguments=None, **options: Any) -> Any:
    """A trainer, ours or TRL's, on the tiny model."""
    config, own = METHODS.get(trainer, (trl.GRPOConfig, {}))
    given = {"processing_class": TOKENIZER, "train_dataset": tiny_prompts(16), **(arguments or {})}
    options = {**own, **options}
    judged = options.get("judge") not in (None, "bradley_terry")
    source = options.get("pair_source", options.get("data_source", "online"))
    scored = not judged and source in ("online", "mixed")
    scored = scored and options.get("combine_with_reward", True)
    return trainer(
        tiny_llama(len(TOKENIZER)) if model is None else model,
        given.pop("reward_funcs", vowels if scored else None),
        config(str(folder), **settings(**options)),
        **given,
    )


def lacking(trainer: type, options: dict[str, Any]) -> list[str]:
    """Those of the options that this trainer's config does not have at all."""
    known = {field.name for field in dataclasses.fields(METHODS[trainer][0])}
    return [name for name in options if name not in known]


def parameters(trainer: Any) -> Tensor:
    model = trainer.accelerator.unwrap_model(trainer.model)
    return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])


def logged(trainer: Any, without: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """Logged rows without what a clock wrote."""
    return [
        {key: value for key, value in row.items() if not any(t in key for t in TIMES + without)}
        for row in trainer.state.log_history
    ]


class Inline(ProcessSampler):
    """The background sampler with this process for a child: the same work on the same snapshot,
    without the seconds in which an interpreter starts."""

    _worker: Worker | None = None
    _rollout: Rollout | None = None

    def submit(self, request: Request) -> None:
        assert self._rollout is None
        self._snapshot = self._snapshot or Snapshot(self.models)
        self._snapshot.take()
        if self._worker is None:
            setup = self._setup(self._snapshot)
            setup = dataclasses.replace(setup, memory_file=os.dup(setup.memory_file))
            self._worker = Worker(setup)
        with torch.random.fork_rng(devices=[]):
            self._rollout = self._worker.answer(Job(request, training_flags(self.models)))

    def collect(self) -> Rollout:
        rollout, self._rollout = self._rollout, None
        assert rollout is not None
        return rollout

    def close(self) -> None:
        self._worker = self._rollout = None


class Gradients(TrainerCallback):
    """Keeps the gradient of each optimizer step, before clipping."""

    def __init__(self) -> None:
        self.steps: list[Tensor] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        self.steps.append(torch.cat(grads).clone())


def speak(texts: Callable[[str, int], str]) -> Callable[[list, Any], dict]:
    """A `rollout_func` that gives the i-th completion of a prompt a fixed text, on any rank."""

    def rollout(prompts: list[str], trainer: Any) -> dict[str, Any]:
        start = trainer.accelerator.process_index * len(prompts)
        G = trainer.num_generations
        spoken = [texts(p, (start + row) % G) for row, p in enumerate(prompts)]
        completions = [[*TOKENIZER(t).input_ids, TOKENIZER.eos_token_id] for t in spoken]
        return {
            "prompt_ids": TOKENIZER(list(prompts)).input_ids,
            "completion_ids": completions,
            "logprobs": None,
        }

    return rollout


def told_rollouts(prefix_ids: list, max_new_tokens: list[int], K: int) -> list[list[list[int]]]:
    """In place of rollouts: continuations that their prefix decides, on any rank."""

    def continuation(ids: list[int], budget: int, k: int) -> list[int]:
        letters = TOKENIZER("abcdefgh"[(sum(ids) + 3 * k) % 6 :]).input_ids
        return [*letters, TOKENIZER.eos_token_id][:budget]

    rows = zip(prefix_ids, max_new_tokens, strict=True)
    return [[continuation(ids, budget, k) for k in range(K)] for ids, budget in rows]


def different(prompt: str, i: int) -> str:
    """Completions of several lengths, different for each prompt and place in the group."""
    return "abcdefgh"[len(prompt) % 3 : 1 + len(prompt) % 3 + i]


def relative(left: Tensor, right: Tensor) -> float:
    return float((left - right).norm() / right.norm())
