"""The server's sampler, with servers that are slow, fail or hang."""

import math
import threading
import time

import pytest
import torch

from trl_ext.rollouts import Opponent, Request, SamplerError, ServerSampler


class Server:
    """Answers with the weights it holds, once it may."""

    def __init__(self, failure=None):
        self.failure, self.may_answer = failure, threading.Event()
        self.may_answer.set()
        self.weights, self.trainer, self.threads = None, 0, []

    def publish(self):
        self.weights = self.trainer
        self.threads.append(threading.current_thread())

    def generate(self, prompt_ids, opponent):
        assert self.may_answer.wait(30.0)
        self.threads.append(threading.current_thread())
        if self.failure:
            raise self.failure
        return [[self.weights, *row] for row in prompt_ids], [[math.nan] for _ in prompt_ids]


def test_the_weights_have_arrived_when_submit_returns():
    server = Server()
    sampler = ServerSampler(server.publish, server.generate)
    for version in range(3):
        server.trainer = version
        server.may_answer.clear()
        sampler.submit(Request([[7], [8]], version))  # returns though the server is not done
        server.trainer = -1  # the trainer goes on
        server.may_answer.set()
        rollout = sampler.collect()
        assert rollout.completion_ids == [[version, 7], [version, 8]]
        assert rollout.version == version and rollout.rng_state is None
        assert math.isnan(rollout.logprobs[0][0])
    here = threading.current_thread()
    assert server.threads[::2] == [here] * 3 and here not in server.threads[1::2]


def test_times_are_the_servers():
    server = Server()
    server.may_answer.clear()
    sampler = ServerSampler(server.publish, server.generate)
    sampler.submit(Request([[7]], 0))
    threading.Timer(0.2, server.may_answer.set).start()
    first = sampler.collect()
    time.sleep(0.2)
    sampler.submit(Request([[7]], 0))
    second = sampler.collect()
    assert first.idle_s == 0.0 and 0.2 <= second.idle_s < 10.0
    assert first.generation_s > max(0.15, second.generation_s)


def test_a_failure_is_carried_over():
    failure = ConnectionError("refused")
    server = Server(failure=failure)
    sampler = ServerSampler(server.publish, server.generate)
    sampler.submit(Request([[7]], 0))
    with pytest.raises(SamplerError, match="refused") as raised:
        sampler.collect()
    assert raised.value.__cause__ is failure
    server.failure = None
    sampler.submit(Request([[7]], 1))
    assert sampler.collect().version == 1


def test_a_failure_to_publish_leaves_no_request():
    def publish():
        raise ConnectionError("refused")

    sampler = ServerSampler(publish, Server().generate)
    with pytest.raises(ConnectionError):
        sampler.submit(Request([[7]], 0))
    with pytest.raises(SamplerError, match="nothing was submitted"):
        sampler.collect()


def test_a_server_that_hangs_is_given_up_in_time():
    server = Server()
    server.may_answer.clear()
    sampler = ServerSampler(server.publish, server.generate, timeout_s=0.1)
    sampler.submit(Request([[7]], 0))
    began = time.monotonic()
    with pytest.raises(SamplerError, match=r"within timeout_s=0\.1 seconds"):
        sampler.collect()
    assert time.monotonic() - began < 10.0
    with pytest.raises(SamplerError, match="restart the server"):
        sampler.submit(Request([[7]], 1))
    sampler.close()
    sampler.close()
    server.may_answer.set()


def test_one_request_at_a_time():
    server = Server()
    sampler = ServerSampler(server.publish, server.generate)
    with pytest.raises(SamplerError, match="nothing was submitted"):
        sampler.collect()
    sampler.submit(Request([[7]], 0))
    with pytest.raises(SamplerError, match="collect\\(\\) first"):
        sampler.submit(Request([[7]], 0))


@pytest.mark.parametrize(
    "option",
    [{"opponent": Opponent(0.5, 2)}, {"seed": 3}, {"rng_state": torch.get_rng_state()}],
)
def test_what_a_server_cannot_do_is_refused(option):
    server = Server()
    sampler = ServerSampler(server.publish, server.generate)
    with pytest.raises(ValueError, match=next(iter(option))):
        sampler.submit(Request([[7]], 0, **option))
    assert server.weights is None, "refused before anything was sent"
