r"""Grades mathematics with math-verify, where a hostile answer costs seconds and never the run.

math-verify stops itself with signals, which end neither C code nor what runs outside the main
thread. Here each answer is graded by a process that the kernel kills. POSIX only.

A reference in `answer` is taken whole. TRL's `accuracy_reward` searches it: there the bare
reference `2\sqrt{3}` is parsed as 2, and the answer `\boxed{2}` is right.
"""

import importlib.util
import logging
import os
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from trl_ext.completions import Completion, completion_texts
from trl_ext.rewards._columns import references
from trl_ext.rewards._pool import Limits, Verdict, shared_pool
from trl_ext.rewards.extract import last_boxed

logger = logging.getLogger(__name__)

MAX_WORKERS = 8


def math_reward(
    completions: Sequence[Completion],
    answer: Sequence[Any] | None = None,
    solution: Sequence[Any] | None = None,
    *,
    limit_s: float = 2.0,
    max_chars: int = 4000,
    memory_mb: int = 512,
    workers: int | None = None,
    log_metric: Callable[[str, float], None] | None = None,
    **kwargs: Any,
) -> list[float | None]:
    r"""Rewards a completion whose answer equals the reference mathematically.

    The last `\boxed{…}` is the answer. Without a box, math-verify looks in the last `max_chars`
    characters for an announced one ("the final answer is $…$").

    Args:
        completions: `B` strings, or `B` conversations whose last assistant message counts.
        answer: `B` bare answers such as `\frac{1}{3}`. If there is a box, its content;
            if there is GSM8K's `####`, what follows.
        solution: `B` worked solutions, used without `answer`: the last box, else what math-verify
            finds in the text.
        limit_s: wall-clock seconds for one answer, > 0; the worker's start is not charged.
        max_chars: longest answer that is parsed, in characters, ≥ 1.
        memory_mb: address space of a worker in MiB, ≥ 256.
        workers: number of processes, ≥ 1. None takes this rank's share of the CPUs, at most 8.
        log_metric: from TRL; receives `math_reward/failed_fraction`.
        **kwargs: other columns and TRL's extras, unused.

    Returns:
        `B` values, 1.0 or 0.0; None where the reference is missing or cannot be parsed, so that
        the row is left out. An answer that is too long, exhausts a limit or crashes its worker is
        given 0.0, counted as failed, and logged.

    Raises:
        ImportError: if math-verify is not installed.
        ValueError: if an option is out of range, or no reference column of `B` values is given.
        RuntimeError: if a worker cannot start. No completion's text raises.
    """
    limits = _limits(limit_s, max_chars, memory_mb, workers)
    _require_math_verify()
    gold = _gold(answer, solution, len(completions))
    found = [_boxed_or_tail(text, max_chars) for text in completion_texts(completions)]
    tasks = [
        (reference, text)
        for reference, text in zip(gold, found, strict=True)
        if reference is not None and text is not None
    ]
    graded = iter(shared_pool(workers or _share_of_cpus(), limits).grade(tasks))
    verdicts = [
        _verdict(reference, text) or next(graded)
        for reference, text in zip(gold, found, strict=True)
    ]
    _report(verdicts, log_metric)
    return [verdict.reward for verdict in verdicts]


def _gold(
    answer: Sequence[Any] | None, solution: Sequence[Any] | None, rows: int
) -> list[str | None]:
    if answer is None and solution is not None:
        return [text and _rebox(text, text) for text in references("solution", solution, rows)]
    bare = (
        text and text.rpartition("####")[2].strip() for text in references("answer", answer, rows)
    )
    return [text and _rebox(text, _box(text)) for text in bare]


def _rebox(text: str, otherwise: str) -> str:
    box = last_boxed(text)
    return otherwise if box is None else _box(box)


def _boxed_or_tail(text: str, max_chars: int) -> str | None:
    """What math-verify is to read; None for a box that is too long."""
    box = last_boxed(text)
    if box is None:
        return text[-max_chars:]
    return _box(box) if len(box) <= max_chars else None


def _box(text: str) -> str:
    return rf"\boxed{{{text}}}"


def _verdict(reference: str | None, text: str | None) -> Verdict | None:
    """The verdict that needs no worker."""
    if reference is None:
        return Verdict(None)
    return Verdict(0.0, "length limit") if text is None else None


def _report(verdicts: list[Verdict], log_metric: Callable[[str, float], None] | None) -> None:
    failures = Counter(verdict.failure for verdict in verdicts if verdict.failure)
    if log_metric is not None and verdicts:
        log_metric("math_reward/failed_fraction", failures.total() / len(verdicts))
    if failures:
        causes = ", ".join(f"{cause} {count}" for cause, count in failures.most_common())
        logger.warning(
            "math_reward gave 0 to %d of %d answers without a verdict: %s.",
            failures.total(),
            len(verdicts),
            causes,
        )


def _share_of_cpus() -> int:
    """The CPUs this process may use, divided among the ranks of this machine."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(MAX_WORKERS, cpus // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def _limits(limit_s: float, max_chars: int, memory_mb: int, workers: int | None) -> Limits:
    options = (
        ("limit_s", limit_s, 0.01),
        ("max_chars", max_chars, 1),
        ("memory_mb", memory_mb, 256),
    )
    for name, value, low in (*options, ("workers", 1 if workers is None else workers, 1)):
        kind = (int, float) if name == "limit_s" else int
        if isinstance(value, bool) or not isinstance(value, kind) or not low <= value < 1e9:
            raise ValueError(
                f"{name}={value!r} is not a number of at least {low}. If the dataset has a column "
                f"{name!r}, rename it, for TRL passes columns by name."
            )
    return Limits(float(limit_s), memory_mb)


def _require_math_verify() -> None:
    if importlib.util.find_spec("math_verify") is None:
        raise ImportError('math_reward needs math-verify: pip install "trl-ext[math]"')
