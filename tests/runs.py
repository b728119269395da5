"""Short real runs on the tiny model, for every test that compares one run with another."""

from collections.abc import Callable
from typing import Any

import torch
import trl
from torch import Tensor
from transformers import TrainerCallback

from tests.tiny import tiny_llama, tiny_prompts, tiny_tokenizer
from trl_ext import (
    GRPOConfig,
    GRPOTrainer,
    MajorityVoteConfig,
    MajorityVoteTrainer,
    PassAtKConfig,
    PassAtKTrainer,
)

TOKENIZER = tiny_tokenizer()
TIMES = ("time", "runtime", "per_second", "profiling")


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
}
OURS = list(METHODS)


def vowels(completions: list, **_: Any) -> list[float]:
    """Half of a tiny random model's completions earn something: every group has a signal."""
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    return [float(sum(letter in "aeiouAEIOU02468" for letter in text) % 2) for text in texts]


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
    return trainer(
        tiny_llama(len(TOKENIZER)) if model is None else model,
        given.pop("reward_funcs", vowels),
        config(str(folder), **settings(**{**own, **options})),
        **given,
    )


def parameters(trainer: Any) -> Tensor:
    model = trainer.accelerator.unwrap_model(trainer.model)
    return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])


def logged(trainer: Any) -> list[dict[str, Any]]:
    """Logged rows without what a clock wrote."""
    return [
        {key: value for key, value in row.items() if not any(t in key for t in TIMES)}
        for row in trainer.state.log_history
    ]


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


def different(prompt: str, i: int) -> str:
    """Completions of several lengths, different for each prompt and place in the group."""
    return "abcdefgh"[len(prompt) % 3 : 1 + len(prompt) % 3 + i]


def relative(left: Tensor, right: Tensor) -> float:
    return float((left - right).norm() / right.norm())
