"""Perplexity and retrieval at every context length, on the same ends of the same documents.

Each window is as long as the longest context. At a shorter one its end alone is shown, so that all
lengths are judged on the same tokens: a better number at a longer context means that more context
helped, and nothing else.
"""

import math
import random
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from retrieval import IGNORED, TASKS, Row, symbols_of
from text import Texts, encoded
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

WINDOWS_PER_DOCUMENT = 4  # so that no long document outweighs the others
TOKENS_AT_ONCE = 8192
Scores = dict[int, dict[str, list[float]]]
Result = dict[str, Any]


def windows_of(
    texts: Texts, tokenizer: PreTrainedTokenizerBase, length: int, count: int
) -> list[list[int]]:
    """At most `count` stretches of `length` tokens, each within one document.

    Raises:
        ValueError: no document is that long.
    """
    found: list[list[int]] = []
    for document in texts:
        (ids,) = encoded(tokenizer, [document["text"]])
        whole = len(ids) // length
        for place in range(min(whole, WINDOWS_PER_DOCUMENT)):
            start = length * (place * whole // min(whole, WINDOWS_PER_DOCUMENT))
            found.append(ids[start : start + length])
        if len(found) >= count:
            return found[:count]
    if not found:
        raise ValueError(
            f"no held-out document has the {length} tokens of the longest context: use shorter "
            "lengths, or longer documents."
        )
    return found


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    windows: Sequence[list[int]],
    lengths: Sequence[int],
    stride: int,
    seed: int = 0,
) -> list[Result]:
    """One row for each length, of a model on one device; arguments as in `window_scores`."""
    return summary(window_scores(model, tokenizer, windows, lengths, stride, seed))


@torch.no_grad()
def window_scores(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    windows: Sequence[list[int]],
    lengths: Sequence[int],
    stride: int,
    seed: int = 0,
) -> Scores:
    """What each window gives at each length, so that processes can share the windows.

    Args:
        model: any causal model; it is left in evaluation mode.
        tokenizer: of the model.
        windows: from `windows_of`, at least as long as the longest length.
        lengths: context lengths, in tokens.
        stride: how many tokens of a window are scored, the last ones; each has at least
            `length - stride` tokens before it. A sliding window that moves by as many.
        seed: of the facts that are hidden.

    Returns:
        For each length `loss`, the mean over the scored tokens in nats; `passkey`, 1 if the key was
        found; `recall`, the share of questions answered. One number per window.
    """
    check_lengths(windows, lengths, stride)
    model.eval()
    scores: Scores = {}
    for length in lengths:
        ends = [window[-length:] for window in windows]
        tasks = {name: task_scores(model, tokenizer, name, ends, seed) for name in TASKS}
        scores[length] = {"loss": text_losses(model, ends, stride), **tasks}
    return scores


def summary(scores: Scores) -> list[Result]:
    """`length`, `perplexity`, `passkey`, `recall`, and their standard errors over windows."""
    rows = []
    for length, values in scores.items():
        means = {name: mean_and_error(found) for name, found in values.items()}
        loss, error = means.pop("loss")
        means["perplexity"] = (math.exp(loss), math.exp(loss) * error)
        row: Result = {"length": length, "windows": len(values["loss"])}
        for name, (mean, error) in means.items():
            row |= {name: mean, f"{name}_se": error}
        rows.append(row)
    return rows


def check_lengths(windows: Sequence[list[int]], lengths: Sequence[int], stride: int) -> None:
    shortest = min(map(len, windows))
    if not lengths or max(lengths) > shortest:
        raise ValueError(
            f"lengths={list(lengths)} do not fit windows of {shortest} tokens: give at least one "
            "length, none longer than the windows."
        )
    if not 0 < stride < min(lengths):
        raise ValueError(
            f"stride={stride} leaves no context in lengths={list(lengths)}: use a number from 1 to "
            f"{min(lengths) - 1}."
        )


def text_losses(model: PreTrainedModel, windows: list[list[int]], stride: int) -> list[float]:
    """Mean loss of the last `stride` tokens of each window, nats."""
    rows = [{"input_ids": window, "labels": window} for window in windows]
    return [
        cross_entropy(logits_TV.float(), labels_T).item()
        for logits_TV, labels_T in predictions(model, rows, stride)
    ]


def task_scores(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    windows: list[list[int]],
    seed: int,
) -> list[float]:
    """What share of each document's questions is answered; a passkey is one question."""
    symbols = symbols_of(tokenizer)
    rows = [
        TASKS[name](window, tokenizer, symbols, random.Random(f"{seed} {name} {window}"))
        for window in windows
    ]
    asked = max(len(row["labels"]) - first_answer(row) for row in rows)
    return [
        (logits_TV.argmax(-1) == labels_T)[labels_T != IGNORED].float().mean().item()
        for logits_TV, labels_T in predictions(model, rows, asked)
    ]


def first_answer(row: Row) -> int:
    return next(place for place, label in enumerate(row["labels"]) if label != IGNORED)


def predictions(
    model: PreTrainedModel, rows: Sequence[Row], last: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """For each row the logits before its `last` tokens, `(last, V)`, and their labels."""
    at_once = max(1, TOKENS_AT_ONCE // len(rows[0]["input_ids"]))
    for start in range(0, len(rows), at_once):
        batch = rows[start : start + at_once]
        ids_BT = torch.tensor([row["input_ids"] for row in batch], device=model.device)
        labels_BT = torch.tensor([row["labels"][-last:] for row in batch], device=model.device)
        logits_BTV = model(input_ids=ids_BT, logits_to_keep=last + 1, use_cache=False).logits[
            :, :-1
        ]
        yield from zip(logits_BTV, labels_BT, strict=True)


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and its standard error over windows; one window shows none."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else math.nan
    return statistics.mean(values), error
