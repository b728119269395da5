"""The processes behind `math_reward`: what ends and replaces them, what they leave."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest

from trl_ext.rewards import _pool
from trl_ext.rewards._pool import Limits, Verdict, WorkerPool

LIMITS = Limits(seconds=1.5, memory_mb=512)
RIGHT = (r"\boxed{\frac{1}{3}}", r"\boxed{\frac{2}{6}}")
TOWER = (r"\boxed{5}", r"\boxed{9^{9^{9^{9}}}}")


@pytest.fixture(scope="module")
def pool():
    pool = WorkerPool(1, LIMITS)
    yield pool
    pool.close()


def group(leader: int) -> list[int]:
    """The living processes of a worker: supervisor and child."""
    found = []
    for process in psutil.process_iter(["status"]):
        try:
            if os.getpgid(process.pid) == leader and process.info["status"] != "zombie":
                found.append(process.pid)
        except ProcessLookupError:
            continue
    return sorted(found)


def wait_until(condition, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.05)
    return False


def child_of(leader: int) -> int:
    return next(pid for pid in group(leader) if pid != leader)


def during_an_item(pool: WorkerPool, act) -> list[Verdict]:
    """Runs `act(pid of the worker)` once the worker computes on a hostile item."""
    assert pool.grade([RIGHT]) == [Verdict(1.0)]
    leader, verdicts = pool.workers[0].process.pid, []
    child = psutil.Process(child_of(leader))
    before = child.cpu_times().user
    thread = threading.Thread(target=lambda: verdicts.extend(pool.grade([TOWER])))
    thread.start()
    assert wait_until(lambda: child.cpu_times().user > before + 0.05, 5)
    act(leader)
    thread.join(timeout=20)
    return verdicts


def test_a_child_that_is_killed_costs_one_item_and_no_import(pool):
    kill_child = lambda leader: os.kill(child_of(leader), signal.SIGKILL)  # noqa: E731
    assert during_an_item(pool, kill_child) == [Verdict(0.0, "crash")]
    leader = pool.workers[0].process.pid
    assert pool.grade([RIGHT]) == [Verdict(1.0)]
    assert pool.workers[0].process.pid == leader


def test_a_child_that_is_killed_before_it_takes_an_item_costs_none(pool):
    """Its successor takes the item; it is not failed, nor left in the pipe to bar the next one."""
    assert pool.grade([RIGHT]) == [Verdict(1.0)]
    leader, verdicts = pool.workers[0].process.pid, []
    child = child_of(leader)
    os.kill(child, signal.SIGSTOP)
    thread = threading.Thread(
        target=lambda: verdicts.extend(pool.grade([RIGHT, TOWER, RIGHT[::-1]]))
    )
    thread.start()
    assert wait_until(lambda: pool.workers[0].item is not None, 5)
    os.kill(child, signal.SIGKILL)
    thread.join(timeout=20)
    assert verdicts == [Verdict(1.0), Verdict(0.0, "time limit"), Verdict(1.0)]
    assert pool.workers[0].process.pid == leader


def test_a_worker_that_is_killed_is_replaced(pool):
    kill_all = lambda leader: os.killpg(leader, signal.SIGKILL)  # noqa: E731
    assert during_an_item(pool, kill_all) == [Verdict(0.0, "crash")]
    assert pool.grade([RIGHT]) == [Verdict(1.0)]


def test_a_worker_that_stands_still_is_killed_from_outside(pool):
    leaders = []

    def stop(leader):
        leaders.append(leader)
        os.killpg(leader, signal.SIGSTOP)

    start = time.monotonic()
    assert during_an_item(pool, stop) == [Verdict(0.0, "time limit")]
    assert time.monotonic() - start < 5
    assert wait_until(lambda: group(leaders[0]) == [], 5)
    assert pool.grade([RIGHT]) == [Verdict(1.0)]


def test_a_worker_that_dies_between_items_is_replaced(pool):
    assert pool.grade([RIGHT]) == [Verdict(1.0)]
    leader = pool.workers[0].process.pid
    os.killpg(leader, signal.SIGKILL)
    assert wait_until(lambda: group(leader) == [], 5)
    verdicts = pool.grade([RIGHT, TOWER])
    assert verdicts == [Verdict(1.0), Verdict(0.0, "time limit")]


def test_an_interrupted_batch_leaves_nothing_behind(pool, monkeypatch):
    assert pool.grade([RIGHT]) == [Verdict(1.0)]
    leader = pool.workers[0].process.pid
    monkeypatch.setattr(pool, "_wait", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        pool.grade([TOWER])
    assert wait_until(lambda: group(leader) == [], 5)
    monkeypatch.undo()
    assert pool.grade([RIGHT]) == [Verdict(1.0)]


def test_a_worker_that_cannot_start_is_an_error(tmp_path, monkeypatch):
    broken = tmp_path / "broken.py"
    broken.write_text("raise SystemExit(3)")
    monkeypatch.setattr(_pool, "WORKER", broken)
    with pytest.raises(RuntimeError, match=r"during start-up \(exit code 3\)"):
        WorkerPool(2, LIMITS).grade([RIGHT])


def test_the_timer_holds_where_the_parent_blocks_its_signal():
    pool = WorkerPool(1, LIMITS)
    before = signal.signal(signal.SIGALRM, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
    try:
        assert pool.grade([RIGHT]) == [Verdict(1.0)]
        leader = pool.workers[0].process.pid
        assert pool.grade([TOWER]) == [Verdict(0.0, "time limit")]
        assert pool.workers[0].process.pid == leader  # else it was killed from outside
    finally:
        pool.close()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
        signal.signal(signal.SIGALRM, before)


# The worker's own loop around a grader that does what the request says.
ACTING_WORKER = """
import os, sys, time
from trl_ext.rewards import _worker

ACTIONS = {
    "right": lambda: 1.0,
    "allocate": lambda: float(len(bytearray(1 << 30))),
    "allocate less": lambda: float(len(bytearray(1 << 20))),
    "recurse": lambda: recurse(),
    "raise": lambda: 1 / 0,
    "exit": lambda: os._exit(9),
    "abort": lambda: os.abort(),
    "hold the interpreter": lambda: float(sum(range(10**12))),
    "sleep": lambda: time.sleep(60),
}
recurse = lambda: recurse()
_worker.grade = lambda reference, answer: ACTIONS.get(answer, ACTIONS["right"])()
_worker.main(0.3, 300)
"""


def test_each_end_of_a_child_has_its_cause():
    process = subprocess.Popen(
        [sys.executable, "-c", ACTING_WORKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )

    def ask(answer: str):
        request = {"id": 1, "reference": "", "answer": answer}
        process.stdin.write(json.dumps(request).encode() + b"\n")
        process.stdin.flush()
        reply = json.loads(process.stdout.readline())
        return reply.get("failed", reply.get("reward"))

    assert json.loads(process.stdout.readline()) == {"ready": True}
    causes = {
        "allocate": "memory limit",
        "allocate less": 1 << 20,
        "recurse": "recursion limit",
        "raise": "error",
        "exit": "crash",
        "abort": "crash",
        "hold the interpreter": "time limit",
        "sleep": "time limit",
    }
    for answer, cause in causes.items():
        assert (ask(answer), ask("right")) == (cause, 1.0), answer
    process.stdin.close()
    assert process.wait(timeout=5) == 0


PARENT = """
import os, sys, threading, time
from trl_ext.rewards import _pool, math_reward, with_options

reward = with_options(math_reward, workers=1, limit_s=1.0)
assert reward([r"\\\\boxed{5}"], answer=["5"]) == [1.0]
worker = next(iter(_pool._pools.values())).workers[0].process.pid
print(worker, flush=True)
what = sys.argv[1]
if what == "exit":
    sys.exit()
if what == "fork":
    child = os.fork()
    if child == 0:
        print(reward([r"\\\\boxed{5}", r"\\\\boxed{6}"], answer=["5", "5"]), flush=True)
        time.sleep(60)
    print(child, flush=True)
if what == "busy":
    tower = [r"\\\\boxed{9^{9^{9^{9}}}}"]
    threading.Thread(target=reward, args=(tower,), kwargs={"answer": ["5"]}, daemon=True).start()
    time.sleep(0.2)
print("now", flush=True)
time.sleep(60)
""".replace("\\\\", "\\")


def start_parent(what: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", PARENT, what], stdout=subprocess.PIPE, text=True)


def test_no_orphan_after_the_parent_is_killed_during_an_item():
    parent = start_parent("busy")
    worker = int(parent.stdout.readline())
    assert parent.stdout.readline() == "now\n" and len(group(worker)) == 2
    parent.kill()
    parent.wait()
    assert wait_until(lambda: group(worker) == [], 5)


def test_a_forked_child_grades_with_workers_of_its_own_and_keeps_none_alive():
    parent = start_parent("fork")
    worker = int(parent.stdout.readline())
    lines = {parent.stdout.readline().strip() for _ in range(3)}
    child = int(next(line for line in lines if line.isdigit()))
    try:
        assert lines == {str(child), "now", "[1.0, 0.0]"}
        parent.kill()
        parent.wait()
        assert wait_until(lambda: group(worker) == [], 5)
    finally:
        os.kill(child, signal.SIGKILL)


def test_no_worker_outlives_an_ordinary_exit():
    parent = start_parent("exit")
    worker = int(parent.stdout.readline())
    assert parent.wait(timeout=10) == 0
    assert wait_until(lambda: group(worker) == [], 5)
