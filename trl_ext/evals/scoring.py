"""Calls reward functions by TRL's contract and turns answers into labels.

Reward models are left out: a correct answer is judged by a function, and wrapping a model in one
is three lines for those who need it.
"""

import inspect
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trl_ext.judges import wait_for

RewardFunc = Callable[..., Any]
AnswerExtractor = Callable[[str], Hashable | None]


def checked_reward_funcs(reward_funcs: RewardFunc | Sequence[RewardFunc]) -> list[RewardFunc]:
    """A list of plain or asynchronous functions."""
    funcs = [reward_funcs] if callable(reward_funcs) else list(reward_funcs)
    if not funcs:
        raise ValueError(
            "reward_funcs=[] leaves nothing to judge completions by. Give at least one."
        )
    for func in funcs:
        if isinstance(func, nn.Module) or not callable(func):
            raise ValueError(
                f"reward_funcs contains {type(func).__name__!r}: evaluation needs functions, since "
                "a reward model has no notion of a correct answer. Wrap it in a function that "
                "returns one number per completion, or pass reward_funcs explicitly."
            )
    return funcs


def checked_weights(weights: Sequence[float] | None, funcs: list[RewardFunc]) -> list[float]:
    """One weight per reward function; 1 by default."""
    if weights is None:
        return [1.0] * len(funcs)
    if len(weights) != len(funcs):
        raise ValueError(
            f"reward_weights={list(weights)} has {len(weights)} entries for {len(funcs)} reward "
            "functions. Give one weight per function."
        )
    return list(weights)


def score(
    funcs: list[RewardFunc],
    weights: list[float],
    prompts: list[Any],
    completions: list[Any],
    completion_ids: list[list[int]],
    columns: dict[str, list[Any]],
    trainer_state: Any = None,
) -> list[float]:
    """Weighted sum of the rewards of each completion; NaN where no function returned a number."""
    arguments = {
        **columns,
        "prompts": prompts,
        "completions": completions,
        "completion_ids": completion_ids,
        "trainer_state": trainer_state,
        "log_extra": _discard,
        "log_metric": _discard,
    }
    rewards = [_rewards_of(func, arguments, len(prompts)) for func in funcs]
    return [_weighted_sum([each[i] for each in rewards], weights) for i in range(len(prompts))]


def _discard(name: str, value: Any) -> None:
    """Takes what a reward function logs: tables and metrics of training are not ours to write."""


def _rewards_of(func: RewardFunc, arguments: dict[str, Any], rows: int) -> list[float]:
    name = getattr(func, "__name__", type(func).__name__)
    output = func(**arguments)
    if inspect.isawaitable(output):
        output = wait_for(output)
    if len(output) != rows:
        raise ValueError(
            f"reward function {name!r} returned {len(output)} rewards for {rows} completions. "
            "Return one per completion, None where a completion cannot be scored."
        )
    rewards = [math.nan if reward is None else float(reward) for reward in output]
    for row, reward in enumerate(rewards):
        if math.isinf(reward):
            raise ValueError(
                f"reward function {name!r} returned {reward} for row {row}: no mean exists. "
                "Return a finite number, or None where a completion cannot be scored."
            )
    return rewards


def _weighted_sum(rewards: list[float], weights: list[float]) -> float:
    scored = [w * r for w, r in zip(weights, rewards, strict=True) if not math.isnan(r)]
    return sum(scored) if scored else math.nan


def extract(extractor: AnswerExtractor | None, text: str) -> Hashable | None:
    """The answer in a completion, `None` without one or without an extractor."""
    answer = None if extractor is None else extractor(text)
    if not isinstance(answer, Hashable):
        raise ValueError(
            f"answer_extractor returned a {type(answer).__name__}, which cannot be compared by "
            "vote. Return a hashable value such as a string, or None."
        )
    return answer


def label_answers(answers: Sequence[Sequence[Hashable | None]]) -> Tensor:
    """Numbers the different answers of each prompt in order of appearance.

    Args:
        answers: P sequences of G answers, `None` where none was found.

    Returns:
        `(P, G)` int64, -1 for `None`.
    """
    labels = []
    for group in answers:
        seen: dict[Hashable, int] = {}
        labels.append([-1 if a is None else seen.setdefault(a, len(seen)) for a in group])
    return torch.tensor(labels)
