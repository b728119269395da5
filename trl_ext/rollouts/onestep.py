"""The schedule of Asynchronous RLHF: sample the next round while this one is trained on.

Round b trains on what was sampled by the weights held at the start of round b − 1, so that with N
updates per round a sample is 0 … N−1 steps old in round 1 and N … 2N−1 in every later one. The
paper asks for the prompts of round b + 1 ahead of time; here the prompts of a round are handed in
at its start and trained on in the next. Source: Noukhovitch et al., arXiv:2410.18252, section 3.
"""

import dataclasses
import json
import time
from collections.abc import Callable
from typing import Any

from trl_ext.rollouts.engine import Request, Rollout, Sampler

Rows = list[dict[str, Any]]


class OneStepAhead:
    """Keeps one round of completions ahead of the trainer, on any sampler.

    Attributes:
        pending: the prompts last handed in, and their completions once these have been collected.
    """

    def __init__(self, sampler: Sampler) -> None:
        self.sampler = sampler
        self.pending: tuple[Rows, Rollout | None] | None = None

    def now(self, request: Request) -> tuple[Rollout, float]:
        """No step ahead: the completions of this request, and the seconds spent waiting."""
        start = time.perf_counter()
        self.sampler.submit(request)
        return self.sampler.collect(), time.perf_counter() - start

    def exchange(
        self, rows: Rows, request: Callable[[Rows], Request]
    ) -> tuple[Rows, Rollout, float]:
        """Hands in the prompts of this round, hands back those whose completions are ready.

        In the first round these are the same prompts, which are sampled twice: for this round, and
        for the next. `request` is called once for each, with the weights in place, and should give
        each a seed of its own.

        Returns:
            Prompts of the round before, their completions, and the seconds spent waiting for them.
        """
        if self.pending is None:
            self._submit(rows, request)
        start = time.perf_counter()
        ready, rollout = self._collected()
        waited_s = time.perf_counter() - start
        self.pending = None
        self._submit(rows, request)
        return ready, rollout, waited_s

    def settle(self) -> None:
        """Waits for the completions under way: from then on nothing is being sampled."""
        if self.pending is not None:
            self._collected()

    def state(self) -> dict[str, Any]:
        """Waits for the completions under way, and gives what a resumed run needs, as JSON.

        Raises:
            ValueError: if a column of the prompts is lost or altered by JSON.
        """
        if self.pending is None:
            return {"rows": None, "rollout": None}
        rows, rollout = self._collected()
        for row in rows:
            _check_json(row)
        return {"rows": rows, "rollout": dataclasses.asdict(rollout)}

    def load(self, state: dict[str, Any]) -> None:
        """Goes on from `state`: the next exchange hands back the saved completions."""
        self.pending = None
        if state["rows"] is not None:
            self.pending = (state["rows"], Rollout(**state["rollout"]))

    def close(self) -> None:
        self.sampler.close()

    def _submit(self, rows: Rows, request: Callable[[Rows], Request]) -> None:
        asked = request(rows)
        if asked.rng_state is not None:
            raise ValueError(
                "rng_state: one step ahead, trainer and sampler draw at the same time and cannot "
                "share one random stream. Give the request a seed."
            )
        self.sampler.submit(asked)
        self.pending = (rows, None)

    def _collected(self) -> tuple[Rows, Rollout]:
        assert self.pending is not None
        rows, rollout = self.pending
        if rollout is None:
            rollout = self.sampler.collect()
            self.pending = (rows, rollout)
        return rows, rollout


def _check_json(row: dict[str, Any]) -> None:
    for column, value in row.items():
        try:
            kept = repr(json.loads(json.dumps(value))) == repr(value)
        except (TypeError, ValueError):
            kept = False
        if not kept:
            raise ValueError(
                f"column {column!r} holds a {type(value).__name__} that JSON does not keep: a "
                "checkpoint could not restore the prompts being sampled. Store it as text, "
                "numbers or lists, or train with schedule='sync'."
            )
