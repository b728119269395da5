"""The sampling process: bit for bit the sampling in place, and no end that hangs or lingers."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch

from tests.rollouts.models import EOS, PROMPTS, generation_config, sharp_llama
from trl_ext.rollouts import (
    Opponent,
    ProcessSampler,
    Request,
    SamplerError,
    process,
    sample,
    sampled_logps,
)

ROOT = Path(__file__).parents[2]
LONG = [[5, 6, 7, 8] * 25] * 1500  # seconds of work


def is_gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def wait_until(condition, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.02)
    return False


def start(policy, **options) -> ProcessSampler:
    config = generation_config(temperature=0.7)
    settings = {"eos_token_ids": [EOS], "temperature": 0.7, "rows_per_pass": 3, "timeout_s": 60.0}
    return ProcessSampler(policy, config, **{**settings, **options})


def pid_of(sampler: ProcessSampler) -> int:
    assert sampler._child is not None
    return sampler._child.process.pid


# Imports once, then forks: each copy is a parent of its own that ends in its own way.
PARENTS = """
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell has it ignored
from tests.rollouts.models import PROMPTS, sharp_llama
from tests.rollouts.test_process import LONG, start
from trl_ext.rollouts import Request

def say(*words):  # in one piece, for all processes write here
    os.write(1, (" ".join(map(str, ("said:", *words))) + os.linesep).encode())

def live(what):
    sampler = start(sharp_llama())
    if what == "killed":
        sampler.submit(Request(PROMPTS, 0))
        sampler.collect()
    if what != "exits":
        os.read(0, 1)  # until the test is there
    sampler.submit(Request(LONG, 0))
    numbers = os.getpid(), sampler._child.process.pid
    if what == "killed" and os.fork() == 0:  # such as a data loader: it keeps the socket open
        os.close(1), os.close(2)
        time.sleep(60)
    say(what, *numbers)
    if what == "killed":
        time.sleep(60)
    if what == "interrupted":
        sampler.collect()

for what in ("exits", "interrupted", "killed"):
    if os.fork() == 0:
        live(what)
        sys.exit()
for _ in range(3):
    say("ended", os.waitstatus_to_exitcode(os.wait()[1]))
"""


@pytest.fixture(scope="module")
def parents():
    """Parents with a child each; they start while the other tests run."""
    started = subprocess.Popen(
        [sys.executable, "-c", PARENTS],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,  # the traceback of the interrupt
        text=True,
        start_new_session=True,
    )
    yield started
    with contextlib.suppress(ProcessLookupError):
        os.killpg(started.pid, signal.SIGKILL)
    started.communicate()


@pytest.fixture(scope="module")
def policy():
    return sharp_llama()


@pytest.fixture(scope="module")
def sampler(policy, parents):
    sampler = start(policy, opponent_model=sharp_llama(1))
    yield sampler
    sampler.close()


def in_place(sampler, request):
    """The same request, answered by this process."""
    policy, opponent_model = sampler.models
    config = sampler._options["generation_config"]
    ids = sample(
        policy,
        request.prompt_ids,
        config,
        eos_token_ids=[EOS],
        opponent_model=opponent_model,
        opponent=request.opponent,
    )
    state = torch.get_rng_state()
    return ids, sampled_logps(policy, request.prompt_ids, ids, 0.7, 3), state


def test_it_goes_on_in_the_random_stream_bit_for_bit(sampler):
    torch.manual_seed(5)
    for version in range(2):
        request = Request(PROMPTS, version, rng_state=torch.get_rng_state())
        sampler.submit(request)
        rollout = sampler.collect()
        ids, logprobs, state = in_place(sampler, request)
        assert (rollout.completion_ids, rollout.logprobs) == (ids, logprobs)
        assert torch.equal(rollout.rng_state, state) and rollout.version == version


def test_a_seed_starts_a_stream(sampler):
    answers = []
    for seed in (1, 2, 1):
        sampler.submit(Request(PROMPTS, 0, seed=seed))
        answers.append(sampler.collect())
    torch.manual_seed(1)
    assert answers[0].completion_ids == in_place(sampler, Request(PROMPTS, 0))[0]
    assert answers[0].completion_ids == answers[2].completion_ids
    assert answers[0].completion_ids != answers[1].completion_ids
    assert all(answer.rng_state is None for answer in answers)


@pytest.mark.parametrize("which", [0, 1], ids=["policy", "opponent"])
def test_the_weights_are_those_of_submit(sampler, which):
    """Later steps do not leak in, and earlier snapshots do not stay."""
    model = sampler.models[which]
    for step in range(2):
        request = Request(PROMPTS, 0, seed=3, opponent=Opponent(0.5, 2))
        torch.manual_seed(3)
        expected = in_place(sampler, request)[:2]
        sampler.submit(request)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=torch.manual_seed(step)))
        rollout = sampler.collect()
        assert (rollout.completion_ids, rollout.logprobs) == expected
        torch.manual_seed(3)
        assert in_place(sampler, request)[:2] != expected, "the step changed nothing"


def test_the_mode_is_that_of_submit(sampler, policy):
    layers = [module for module in policy.modules() if hasattr(module, "attention_dropout")]
    before = [layer.training for layer in layers]
    flags = process.training_flags(sampler.models)
    policy.train()
    assert process.training_flags(sampler.models) != flags
    sampler.submit(Request(PROMPTS, 0, seed=1))
    sampler.collect()
    policy.eval()
    assert [layer.training for layer in layers] == before


def test_times_add_up(sampler):
    sampler.submit(Request(PROMPTS, 0))
    sampler.collect()
    time.sleep(0.2)
    began = time.perf_counter()
    sampler.submit(Request(PROMPTS, 0))
    rollout = sampler.collect()
    assert 0.2 <= rollout.idle_s < 10.0
    assert 0.0 < rollout.generation_s < time.perf_counter() - began


def test_an_interrupt_is_the_parents_affair(sampler):
    sampler.submit(Request(PROMPTS, 0))
    os.kill(pid_of(sampler), signal.SIGINT)
    sampler.collect()
    assert os.getpgid(pid_of(sampler)) == pid_of(sampler), "a terminal would reach it"


def test_one_request_at_a_time(sampler):
    with pytest.raises(SamplerError, match="nothing was submitted"):
        sampler.collect()
    sampler.submit(Request(PROMPTS, 0))
    with pytest.raises(SamplerError, match="collect\\(\\) first"):
        sampler.submit(Request(PROMPTS, 1))
    assert sampler.collect().version == 0


def test_a_model_that_changed_its_tensors_is_refused(sampler, policy):
    policy.register_buffer("late", torch.zeros(1))
    try:
        with pytest.raises(ValueError, match=r"model has changed .*0\.late"):
            sampler.submit(Request(PROMPTS, 0))
    finally:
        del policy.late


def begin(sampler):
    """Submits a long request, and returns once the child works on it."""
    sampler.submit(Request(PROMPTS, 0))
    sampler.collect()
    child = psutil.Process(pid_of(sampler))
    before = child.cpu_times().user
    sampler.submit(Request(LONG, 0))
    assert wait_until(lambda: child.cpu_times().user > before + 0.1, 20)
    return child.pid


# The next three end the child; the sampler starts another one for the test that follows.


def test_a_failure_shows_its_traceback_and_ends_the_child(sampler):
    sampler.submit(Request([[10**6]], 0))
    child = pid_of(sampler)
    with pytest.raises(SamplerError, match=r"(?s)failed:.*Traceback.*IndexError"):
        sampler.collect()
    assert is_gone(child)


def test_a_child_that_is_killed_at_work_is_noticed_at_once(sampler):
    child = begin(sampler)
    threading.Timer(0.1, os.kill, (child, signal.SIGKILL)).start()
    began = time.monotonic()
    with pytest.raises(SamplerError, match="killed by SIGKILL, often for want of memory"):
        sampler.collect()
    assert time.monotonic() - began < 10.0 and is_gone(child)


def test_a_child_that_stands_still_is_killed_in_time(sampler, monkeypatch):
    sampler.submit(Request(PROMPTS, 0))
    sampler.collect()
    child = pid_of(sampler)
    monkeypatch.setattr(sampler, "timeout_s", 0.5)
    os.kill(child, signal.SIGSTOP)
    larger_than_the_socket = [list(row) for row in LONG]
    began = time.monotonic()
    sampler.submit(Request(larger_than_the_socket, 0))
    assert time.monotonic() - began < 5.0, "submit must not wait for the child"
    with pytest.raises(SamplerError, match=r"no answer within timeout_s=0\.5 seconds"):
        sampler.collect()
    assert 0.5 < time.monotonic() - began < 10.0 and is_gone(child)


def test_a_child_that_does_not_start_is_killed_in_time(monkeypatch):
    monkeypatch.setattr(process, "START_UP_S", 0.3)
    sampler = start(sharp_llama())
    sampler.submit(Request(PROMPTS, 0))
    child = pid_of(sampler)
    with pytest.raises(SamplerError, match=r"did not start within 0\.3 seconds"):
        sampler.collect()
    assert is_gone(child)


def test_closing_ends_the_child_and_may_be_repeated():
    sampler = start(sharp_llama())
    sampler.close()
    sampler.submit(Request(PROMPTS, 0))
    child = pid_of(sampler)
    sampler.close()
    assert is_gone(child)
    sampler.close()
    with pytest.raises(SamplerError, match="nothing was submitted"):
        sampler.collect()


def test_a_sampler_that_is_forgotten_leaves_no_child():
    sampler = start(sharp_llama())
    sampler.submit(Request(PROMPTS, 0))
    child = pid_of(sampler)
    del sampler
    assert wait_until(lambda: is_gone(child), 10)


def test_a_forked_copy_of_the_parent_does_not_end_the_child():
    sampler = start(sharp_llama())
    sampler.submit(Request(PROMPTS, 0))
    child = pid_of(sampler)
    copy = os.fork()
    if copy == 0:
        sampler.close()
        os._exit(0)
    os.waitpid(copy, 0)
    time.sleep(0.1)
    assert not is_gone(child)
    sampler.close()


def words_said(parents):
    """The next line of the parents' own; a library may print beside them."""
    line = parents.stdout.readline()
    while line and not line.startswith("said: "):
        line = parents.stdout.readline()
    assert line, "all parents have ended"
    return line.split()[1:]


def test_no_child_outlives_its_parent(parents):
    parent, child, codes = {}, {}, []
    parents.stdin.write("go")
    parents.stdin.flush()
    while len(parent) < 3:
        what, *numbers = words_said(parents)
        if what == "ended":
            codes.append(int(numbers[0]))
        else:
            parent[what], child[what] = map(int, numbers)
    assert not is_gone(child["interrupted"]) and not is_gone(child["killed"])
    os.kill(parent["interrupted"], signal.SIGINT)
    os.kill(parent["killed"], signal.SIGKILL)  # while its child samples
    while len(codes) < 3:
        codes.append(int(words_said(parents)[1]))
    assert sorted(codes) == [-signal.SIGKILL, -signal.SIGINT, 0]
    assert wait_until(lambda: all(map(is_gone, child.values())), 10), child


@pytest.mark.parametrize(
    "option", [{"temperature": 0.0}, {"timeout_s": -1.0}, {"rows_per_pass": 0}]
)
def test_options_out_of_range_are_refused(option):
    with pytest.raises(ValueError, match=next(iter(option))):
        start(sharp_llama(), **option)


def test_a_stream_and_a_seed_exclude_each_other():
    with pytest.raises(ValueError, match="rng_state"):
        Request(PROMPTS, 0, seed=1, rng_state=torch.get_rng_state())
