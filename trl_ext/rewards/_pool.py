"""A pool of grading processes that can be killed.

Workers are fresh interpreters, for the parent may hold CUDA and threads. They end when their input
ends, hence also when the parent is killed; a forked copy of the parent lets go of the pipes at
once, so that it neither keeps them open nor talks to the parent's workers.
"""

import atexit
import itertools
import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

WORKER = Path(__file__).with_name("_worker.py")
START_UP_S = 120.0  # imports only; no answer waits behind it twice
GRACE_S = 1.0  # after the worker's own timer had its chance
# A parser of hostile text needs no token, proxy or tracker setting.
ENVIRONMENT = ("PATH", "HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "PYTHONHOME", "PYTHONPATH")

Task = tuple[str, str]  # reference, answer


@dataclass(frozen=True)
class Limits:
    """What one answer may cost: wall-clock seconds, and MiB of address space."""

    seconds: float
    memory_mb: int


@dataclass(frozen=True)
class Verdict:
    """A reward (None: no reference), or why there is none."""

    reward: float | None
    failure: str | None = None


class Worker:
    """One grading process, its pipes, and the item it is busy with."""

    def __init__(self, limits: Limits) -> None:
        environment = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
        self.process = subprocess.Popen(
            # -P: the worker's folder holds a `math.py`, which must not shadow Python's.
            [sys.executable, "-P", str(WORKER), str(limits.seconds), str(limits.memory_mb)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env={**environment, "PYTHONHASHSEED": "0"},
            start_new_session=True,  # one group to kill, and no Ctrl-C from the terminal
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        self.stdin, self.stdout = self.process.stdin, self.process.stdout
        self.patience_s = limits.seconds + GRACE_S
        self.deadline = time.monotonic() + START_UP_S
        self.ready = False
        self.item: int | None = None
        self._received = b""

    def send(self, item: int, task: Task) -> None:
        """Hands over one item; its time runs from here, for the worker is idle.

        Raises:
            BrokenPipeError: if the process has ended, and so has not seen the item.
        """
        self.item, self.deadline = item, time.monotonic() + self.patience_s
        request = {"id": item, "reference": task[0], "answer": task[1]}
        self.stdin.write(json.dumps(request).encode() + b"\n")

    def receive(self) -> Verdict | None:
        """Reads what has come; gives the verdict on the current item once it is there.

        Raises:
            EOFError: if the process has ended.
        """
        data = os.read(self.stdout.fileno(), 65536)
        if not data:
            raise EOFError
        *lines, self._received = (self._received + data).split(b"\n")
        for message in map(json.loads, lines):
            if "ready" in message:
                self.ready = True
            elif message["id"] == self.item:
                return Verdict(message.get("reward", 0.0), message.get("failed"))
        return None

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.forget()

    def forget(self) -> None:
        """Closes our ends of the pipes, which the worker may share with another process."""
        self.stdin.close()
        self.stdout.close()
        self.process.returncode = self.process.returncode or 0  # not ours to wait for after a fork


class WorkerPool:
    """Grades batches on up to `size` workers, which start when needed. Threads take turns."""

    def __init__(self, size: int, limits: Limits) -> None:
        self.size, self.limits = size, limits
        self.workers: list[Worker] = []
        self._lock = threading.Lock()
        self._items = itertools.count(1)  # never reused: a late reply fits no other item

    def grade(self, tasks: Sequence[Task]) -> list[Verdict]:
        """Gives one verdict per task, in order. Equal tasks are graded once.

        Raises:
            RuntimeError: if a worker cannot start; never because of a task.
        """
        with self._lock:
            try:
                verdicts = self._grade(deque(dict.fromkeys(tasks)))
            except BaseException:
                self.close()  # an interrupted batch leaves no worker with an item
                raise
        return [verdicts[task] for task in tasks]

    def close(self) -> None:
        while self.workers:
            self.workers.pop().kill()

    def forget(self) -> None:
        """For a forked child: the workers belong to its parent."""
        self._lock = threading.Lock()
        while self.workers:
            self.workers.pop().forget()

    def _grade(self, waiting: deque[Task]) -> dict[Task, Verdict]:
        verdicts: dict[Task, Verdict] = {}
        busy: dict[int, Task] = {}
        while waiting or busy:
            self._hand_out(waiting, busy)
            self._start(len(waiting) + len(busy))
            for worker, verdict in self._wait():
                assert worker.item is not None
                verdicts[busy.pop(worker.item)] = verdict
                worker.item = None
        return verdicts

    def _hand_out(self, waiting: deque[Task], busy: dict[int, Task]) -> None:
        for worker in [each for each in self.workers if each.ready and each.item is None]:
            if not waiting:
                return
            item, task = next(self._items), waiting.popleft()
            try:
                worker.send(item, task)
                busy[item] = task
            except BrokenPipeError:
                self._remove(worker, "crash")
                waiting.appendleft(task)

    def _start(self, wanted: int) -> None:
        while len(self.workers) < min(self.size, wanted):
            self.workers.append(Worker(self.limits))

    def _wait(self) -> list[tuple[Worker, Verdict]]:
        """Waits until a worker says something or is overdue; workers that end are removed."""
        active = [worker for worker in self.workers if worker.item is not None or not worker.ready]
        done = []
        with selectors.DefaultSelector() as selector:
            for worker in active:
                selector.register(worker.stdout, selectors.EVENT_READ, worker)
            nearest = min(worker.deadline for worker in active)
            for key, _ in selector.select(max(0.0, nearest - time.monotonic())):
                try:
                    verdict = key.data.receive()
                except EOFError:
                    verdict = self._remove(key.data, "crash")
                done += [(key.data, verdict)] if verdict else []
        finished = [worker for worker, _ in done]
        for worker in active:
            if worker in self.workers and worker not in finished and _overdue(worker):
                done += [(worker, self._remove(worker, "time limit"))]
        return done

    def _remove(self, worker: Worker, failure: str) -> Verdict | None:
        worker.kill()
        self.workers.remove(worker)
        if not worker.ready:
            raise RuntimeError(
                f"A worker of math_reward ended or hung during start-up (exit code "
                f"{worker.process.returncode}). Its own message stands above; raise memory_mb "
                f"if it is a MemoryError."
            )
        return None if worker.item is None else Verdict(0.0, failure)


def _overdue(worker: Worker) -> bool:
    waits = worker.item is not None or not worker.ready
    return waits and time.monotonic() >= worker.deadline


_pools: dict[tuple[int, Limits], WorkerPool] = {}
_pools_lock = threading.Lock()


def shared_pool(size: int, limits: Limits) -> WorkerPool:
    """Gives this process's pool of these settings."""
    with _pools_lock:
        return _pools.setdefault((size, limits), WorkerPool(size, limits))


def close_pools() -> None:
    """Ends all workers of this process; the next call starts new ones."""
    while _pools:
        _pools.popitem()[1].close()


def _forget_pools() -> None:
    global _pools_lock
    _pools_lock = threading.Lock()
    while _pools:
        _pools.popitem()[1].forget()


atexit.register(close_pools)
os.register_at_fork(after_in_child=_forget_pools)
