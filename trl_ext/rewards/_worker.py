"""The program of one grading process: math-verify behind a pipe. It knows neither torch nor TRL.

A supervisor imports math-verify once and forks the child that grades. Whatever kills the child (its
timer, its memory limit, a crash) costs one answer and one fork, not a new import. The timer is the
kernel's: SIGALRM is left at its default action, so it ends even C code that never returns to the
interpreter, and does so when the trainer is dead.

Requests are JSON lines `{"id", "reference", "answer"}` on standard input, one at a time; replies
are `{"id", "reward"}`, or the supervisor's `{"id", "failed"}`: the request that its child had taken
last, and why it ended. A child that ends before it takes the next request leaves it to its
successor. End of input ends both processes.
"""

import contextlib
import json
import logging
import mmap
import os
import resource
import signal
import sys
from typing import Any, BinaryIO

# Graded once by the supervisor: it imports, and fills the grammar's and sympy's tables, so that the
# first answers of a new child take milliseconds and not a good part of their time limit.
WARM_UP = (
    r"\frac{1}{2}",
    r"-3\sqrt{2} + 10\%",
    r"x^2 + 3x - \pi",
    r"(1, \frac{\pi}{2})",
    r"[0, 1) \cup (2, \infty)",
    r"\{1, 2\}",
)
CAUSE_OF_EXIT = {3: "memory limit", 4: "recursion limit", 5: "error"}


def main(limit_s: float, memory_mb: int) -> None:
    """Serves requests until the input ends."""
    requests, replies = sys.stdin.buffer, _private_stdout()
    # Both could have been inherited otherwise, and would switch the timer off.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    # macOS refuses this limit; the time limit still holds there.
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (memory_mb << 20, memory_mb << 20))
    for answer in WARM_UP:
        grade(rf"\boxed{{{answer}}}", rf"\boxed{{{answer} + 1}}")
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
    _send(replies, {"ready": True})
    taken = memoryview(mmap.mmap(-1, 8)).cast("q")  # shared: the child may leave no other word
    while True:
        child = os.fork()
        if child == 0:
            _serve(requests, replies, limit_s, taken)
        status = os.waitpid(child, 0)[1]
        if status == 0:
            return
        _send(replies, {"id": taken[0], "failed": _cause(status)})


def grade(reference: str, answer: str) -> float | None:
    """Gives 1.0 if the answer equals the reference, 0.0 if not, None if no reference is found."""
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse, verify

    logging.disable(logging.CRITICAL)
    # The kernel's timer replaces math-verify's own, which need the main thread and Python code.
    gold = parse(reference, parsing_timeout=None)  # pyright: ignore[reportArgumentType]
    if not gold:
        return None
    config = LatexExtractionConfig(
        normalization_config=NormalizationConfig(units=True),
        boxed_match_priority=0,
        try_extract_without_anchor=False,
    )
    found = parse(
        answer,
        extraction_config=[config],
        extraction_mode="first_match",
        parsing_timeout=None,  # pyright: ignore[reportArgumentType]
    )
    return float(verify(gold, found, timeout_seconds=None))


def _serve(requests: BinaryIO, replies: BinaryIO, limit_s: float, taken: memoryview) -> None:
    code = 0
    try:
        while line := requests.readline():
            request = json.loads(line)
            taken[0] = request["id"]
            signal.setitimer(signal.ITIMER_REAL, limit_s)
            reward = grade(request["reference"], request["answer"])
            signal.setitimer(signal.ITIMER_REAL, 0)
            _send(replies, {"id": request["id"], "reward": reward})
    except MemoryError:
        code = 3
    except RecursionError:
        code = 4
    except BaseException:
        code = 5
    os._exit(code)


def _cause(status: int) -> str:
    if os.WIFSIGNALED(status):
        return "time limit" if os.WTERMSIG(status) == signal.SIGALRM else "crash"
    return CAUSE_OF_EXIT.get(os.WEXITSTATUS(status), "crash")


def _private_stdout() -> BinaryIO:
    """Keeps the reply pipe for us alone; what a library prints goes nowhere."""
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "wb", buffering=0)
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return replies  # pyright: ignore[reportReturnType]


def _send(replies: BinaryIO, message: dict[str, Any]) -> None:
    replies.write(json.dumps(message).encode() + b"\n")


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]))
