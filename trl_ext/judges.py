"""Asks a pairwise judge, for training and for evaluation alike."""

import asyncio
import inspect
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

# (prompts, first, second) -> P(first beats second) in [0, 1], or None where it cannot tell. Prompts
# and completions have the dataset's format: texts, or lists of messages.
Judge = Callable[[list, list, list], Sequence[float | None]]


def ask(judge: Judge, prompts: list, first: list, second: list) -> Tensor:
    """P(first beats second) of each pair, by one call of the judge.

    Args:
        judge: a plain or asynchronous function.
        prompts, first, second: N each.

    Returns:
        `(N,)` float64 in [0, 1], NaN where the judge gave None or NaN.

    Raises:
        ValueError: another number of answers than pairs, or an answer outside [0, 1].
    """
    answers: Any = judge(prompts, first, second)
    if inspect.isawaitable(answers):
        answers = wait_for(answers)
    if not hasattr(answers, "__len__") or len(answers) != len(prompts):
        got = len(answers) if hasattr(answers, "__len__") else type(answers).__name__
        raise ValueError(
            f"judge: got {got} answers for {len(prompts)} pairs; it must return one probability "
            "that the first completion is better per pair, or None."
        )
    values = [torch.nan if answer is None else float(answer) for answer in answers]
    for pair, value in enumerate(values):
        if value == value and not 0 <= value <= 1:
            raise ValueError(
                f"judge: answer {value!r} to pair {pair} is no probability; it must lie between "
                "0 and 1 (1: the first completion is better), or be None."
            )
    return torch.tensor(values, dtype=torch.float64)


def wait_for(awaitable: Any) -> Any:
    """Runs to the end in a thread of its own, since a notebook already runs an event loop."""

    async def finish() -> Any:
        return await awaitable

    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(asyncio.run, finish()).result()
