"""Sampling on a server that holds the weights itself, in a thread of this process."""

import threading
import time
from collections.abc import Callable

from trl_ext.rollouts.engine import Request, Rollout, SamplerError
from trl_ext.rollouts.sampling import Opponent

Generate = Callable[[list[list[int]], Opponent | None], tuple[list[list[int]], list[list[float]]]]


class ServerSampler:
    """A [`Sampler`] over a server, for example TRL's vLLM server.

    The server draws from its own random state; only its own seed makes it repeatable.

    Args:
        publish: sends the weights to the server; called in the caller's thread.
        generate: gives completions and log-probabilities of prompts; called in another thread, so
            it must not take part in collective communication.
        timeout_s: seconds that `collect` waits at most.
    """

    def __init__(
        self, publish: Callable[[], None], generate: Generate, *, timeout_s: float = 600.0
    ) -> None:
        self.publish, self.generate, self.timeout_s = publish, generate, timeout_s
        self._answer: _Answer | None = None
        self._idle_since: float | None = None

    def submit(self, request: Request) -> None:
        """Sends the weights, then the prompts; the weights have arrived when it returns.

        Raises:
            ValueError: for an opponent, a seed or a random state.
            SamplerError: if the answer to another request has not been collected.
        """
        _refuse_unsupported(request)
        if self._answer is not None:
            raise SamplerError(
                "A request was submitted while the server has another one. Call collect() first; "
                "after a timeout, restart the server and build a new sampler."
            )
        self.publish()
        now = time.perf_counter()
        idle_s = 0.0 if self._idle_since is None else now - self._idle_since
        self._answer = _Answer(self.generate, request, idle_s)
        self._answer.start()

    def collect(self) -> Rollout:
        """Waits for the answer.

        Raises:
            SamplerError: if the server did not answer in time, or `generate` raised.
        """
        answer = self._answer
        if answer is None:
            raise SamplerError("collect() was called though nothing was submitted.")
        answer.join(self.timeout_s)
        if answer.is_alive():
            raise SamplerError(
                f"The server did not answer within timeout_s={self.timeout_s:g} seconds. Look at "
                "its log and restart it; raise timeout_s if it was only slow."
            )
        self._answer, self._idle_since = None, answer.ended
        if answer.failure is not None:
            raise SamplerError(
                f"Sampling on the server failed with {answer.failure!r}. Look at the server's log; "
                "the last checkpoint is whole, resume from it."
            ) from answer.failure
        assert answer.rollout is not None
        return answer.rollout

    def close(self) -> None:
        """Forgets the request under way; a thread that waits for the server ends with it."""
        self._answer = None


class _Answer(threading.Thread):
    """One request's work, and what came of it."""

    def __init__(self, generate: Generate, request: Request, idle_s: float) -> None:
        super().__init__(daemon=True, name="trl_ext-server-sampler")
        self._work, self._request, self._idle_s = generate, request, idle_s
        self.rollout: Rollout | None = None
        self.failure: BaseException | None = None
        self.ended = 0.0

    def run(self) -> None:
        start = time.perf_counter()
        try:
            ids, logprobs = self._work(self._request.prompt_ids, self._request.opponent)
        except BaseException as failure:  # carried over to the caller's thread
            self.failure = failure
        else:
            seconds = time.perf_counter() - start
            version = self._request.version
            self.rollout = Rollout(ids, logprobs, version, None, seconds, self._idle_s)
        self.ended = time.perf_counter()


def _refuse_unsupported(request: Request) -> None:
    if request.opponent is not None:
        raise ValueError(
            f"opponent={request.opponent} is not supported on a server: it samples from the policy "
            "alone. Use the process sampler, or an algorithm without an opponent."
        )
    for name in ("seed", "rng_state"):
        if getattr(request, name) is not None:
            raise ValueError(
                f"{name} is not applied by a server, which draws from a random state of its own. "
                "Leave it at None and seed the server."
            )
