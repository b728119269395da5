r"""Times `math_reward` against TRL's `accuracy_reward` on twelve hostile answers.

    python recipes/bench_math_reward.py [--give-up 40] [--limit 2] [--skip-trl]

TRL scores each answer in a fresh process, which is killed after `--give-up` seconds: once in its
main thread and once in another thread, where math-verify's own time limits are off. Ours scores all
in one process, from a thread. Start-up and imports are counted in neither. Two cores, default
settings: about seven minutes, nearly all of them TRL's.
"""

import argparse
import logging
import multiprocessing
import statistics
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

from hostile_answers import HOSTILE, Hostile
from rich.console import Console
from rich.progress import track
from rich.table import Table

from trl_ext.rewards import math_reward, with_options

CORRECT = (r"\boxed{\frac{2}{6}}", r"\frac{1}{3}")


def main() -> None:
    arguments = parse_arguments()
    logging.disable(logging.WARNING)  # the table says what failed
    columns: dict[str, list[str]] = {}
    seconds: dict[str, list[float]] = {}
    if not arguments.skip_trl:
        for where in ("main thread", "worker thread"):
            runs = [
                run_trl(row, where, arguments.give_up) for row in track(HOSTILE, f"TRL, {where}")
            ]
            columns[f"TRL, {where}"] = [text for _, text in runs]
            seconds[f"TRL, {where}"] = [second for second, _ in runs]
    reward = with_options(math_reward, limit_s=arguments.limit)
    runs = in_thread(lambda: [run_ours(row, reward) for row in track(HOSTILE, "trl_ext")])
    columns["trl_ext"] = [text for _, text in runs]
    seconds["trl_ext"] = [second for second, _ in runs]
    show(columns, seconds)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--give-up", type=float, default=40.0, help="seconds until TRL is killed")
    parser.add_argument("--limit", type=float, default=2.0, help="limit_s of math_reward")
    parser.add_argument("--skip-trl", action="store_true", help="time math_reward only")
    return parser.parse_args()


def run_trl(row: Hostile, where: str, give_up: float) -> tuple[float, str]:
    """Scores one answer in a process of its own; the clock starts when that process is warm."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=score_with_trl, args=(row, where, theirs))
    process.start()
    theirs.close()
    ours.recv()
    start = time.perf_counter()
    outcome = ours.recv() if ours.poll(give_up) else None
    second = time.perf_counter() - start
    process.kill()
    process.join()
    return (second, f"> {give_up:g}, killed") if outcome is None else (second, say(second, outcome))


def score_with_trl(row: Hostile, where: str, pipe: Connection) -> None:
    from trl.rewards import accuracy_reward

    logging.disable(logging.WARNING)

    reference = rf"\boxed{{{row.reference}}}"  # bare, TRL would not take it whole

    def score() -> None:
        accuracy_reward([[{"content": CORRECT[0]}]], [CORRECT[1]])
        pipe.send("warm")
        try:
            outcome = str(accuracy_reward([[{"content": row.completion}]], [reference])[0])
        except Exception as error:
            outcome = type(error).__name__
        pipe.send(outcome)

    score() if where == "main thread" else in_thread(score)


def run_ours(row: Hostile, reward: Callable[..., list]) -> tuple[float, str]:
    assert reward([CORRECT[0]], answer=[CORRECT[1]]) == [1.0], "the pool does not grade"
    start = time.perf_counter()
    outcome = reward([row.completion], answer=[row.reference])[0]
    second = time.perf_counter() - start
    return second, say(second, str(outcome))


def in_thread(function: Callable):
    results = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    thread.join()
    return results[0]


def say(second: float, outcome: str) -> str:
    return f"{second:.2f}  ({outcome})"


def show(columns: dict[str, list[str]], seconds: dict[str, list[float]]) -> None:
    table = Table(title="Seconds for one answer (reward)")
    table.add_column("hostile answer")
    for name in columns:
        table.add_column(name, justify="right")
    for row, texts in zip(HOSTILE, zip(*columns.values(), strict=True), strict=True):
        table.add_row(row.name, *texts)
    table.add_section()
    for name, percent in (("p50", 50), ("p99", 99)):
        table.add_row(name, *(f"{percentile(values, percent):.2f}" for values in seconds.values()))
    table.add_row("max", *(f"{max(values):.2f}" for values in seconds.values()))
    Console().print(table)


def percentile(values: list[float], percent: int) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


if __name__ == "__main__":
    main()
