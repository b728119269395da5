"""The one-step-ahead schedule, with a sampler that answers with the weights' version."""

import json

import pytest
import torch

from trl_ext.rollouts import OneStepAhead, Request, Rollout, SamplerError


class Echo:
    """A sampler of capacity one; a completion is (version, seed, prompt)."""

    def __init__(self):
        self.request = None
        self.produced = 0
        self.closed = 0

    def submit(self, request):
        if self.request is not None:
            raise SamplerError("capacity one")
        self.request = request

    def collect(self):
        request, self.request = self.request, None
        ids = [[request.version, request.seed, *prompt] for prompt in request.prompt_ids]
        self.produced += len(ids)
        logprobs = [[-0.1 * sum(row)] * 3 for row in ids]
        return Rollout(ids, logprobs, request.version, None, 1.5, 0.25)

    def close(self):
        self.closed += 1


class Run:
    """A trainer that only counts: `N` optimizer steps per round, two prompts per round."""

    def __init__(self, N, first_round=0, version=0, seed=0):
        self.N, self.version, self.seed = N, version, seed
        self.round, self.sampler = first_round, Echo()
        self.ahead = OneStepAhead(self.sampler)
        self.trained = []

    def request(self, rows):
        self.seed += 1
        return Request([row["prompt"] for row in rows], self.version, seed=self.seed)

    def step(self):
        """One round; returns each update's staleness."""
        rows = [{"prompt": [self.round, i], "answer": f"é{i}"} for i in range(2)]
        ready, rollout, waited_s = self.ahead.exchange(rows, self.request)
        assert waited_s >= 0.0
        staleness = []
        for _ in range(self.N):
            staleness.append(self.version - rollout.version)
            self.version += 1
        self.trained.append((ready, rollout))
        self.round += 1
        return staleness


@pytest.mark.parametrize(
    ("N", "expected"),
    [
        (1, [0, 1, 1, 1]),
        (2, [0, 1, 2, 3, 2, 3, 2, 3]),
        (3, [0, 1, 2, 3, 4, 5, 3, 4, 5, 3, 4, 5]),
    ],
)
def test_staleness_of_four_rounds(N, expected):
    """Spec 1.10: 0 … N−1 in round 1, then N … 2N−1."""
    run = Run(N)
    assert [value for _ in range(4) for value in run.step()] == expected


def test_each_round_trains_on_the_prompts_and_weights_of_the_one_before():
    run = Run(2)
    for _ in range(4):
        run.step()
    assert [rollout.version for _, rollout in run.trained] == [0, 0, 2, 4]
    assert [ready[0]["prompt"][0] for ready, _ in run.trained] == [0, 0, 1, 2]
    for ready, rollout in run.trained:
        assert [ids[2:] for ids in rollout.completion_ids] == [row["prompt"] for row in ready]
    seeds = [rollout.completion_ids[0][1] for _, rollout in run.trained]
    assert seeds == [1, 2, 3, 4], "the first prompts are sampled twice, not used twice"


def test_nothing_is_lost():
    run = Run(1)
    for _ in range(5):
        run.step()
        trained = sum(len(ready) for ready, _ in run.trained)
        queued = len(run.ahead.pending[0])
        assert run.sampler.produced + queued == trained + queued
        assert run.sampler.produced == trained == 2 * run.round and queued == 2
    run.ahead.state()
    assert run.sampler.produced == trained + queued


@pytest.mark.parametrize("saved_after", range(5))
def test_a_resumed_run_equals_the_uninterrupted_one(saved_after):
    whole = Run(2)
    for _ in range(5):
        whole.step()

    first = Run(2)
    for _ in range(saved_after):
        first.step()
    text = json.dumps(first.ahead.state())
    resumed = Run(2, first.round, first.version, first.seed)
    resumed.ahead.load(json.loads(text))
    for _ in range(5 - saved_after):
        first.step()
        resumed.step()
    assert first.trained == whole.trained, "taking the state must not disturb the run"
    assert resumed.trained == whole.trained[saved_after:]
    assert resumed.version == whole.version


@pytest.mark.parametrize("value", [torch.zeros(2), b"x", {1, 2}, (1, 2), {1: "a"}, 1j])
def test_a_column_that_json_alters_is_named(value):
    run = Run(1)
    run.ahead.exchange([{"prompt": [1], "image": value}], run.request)
    with pytest.raises(ValueError, match="column 'image' holds a"):
        run.ahead.state()


@pytest.mark.parametrize("value", [None, 0.1, float("nan"), "é", [1, [2.5]], {"a": {"b": True}}])
def test_a_column_that_json_keeps_passes(value):
    run = Run(1)
    run.ahead.exchange([{"prompt": [1], "extra": value}], run.request)
    restored = json.loads(json.dumps(run.ahead.state()))["rows"][0]["extra"]
    assert repr(restored) == repr(value)


def test_a_random_stream_cannot_be_shared_with_the_trainer():
    ahead = OneStepAhead(Echo())
    with pytest.raises(ValueError, match="rng_state"):
        ahead.exchange(
            [{"prompt": [1]}], lambda _: Request([[1]], 0, rng_state=torch.get_rng_state())
        )


def test_closing_closes_the_sampler():
    run = Run(1)
    run.ahead.close()
    assert run.sampler.closed == 1
