"""What a trainer asks of a sampler, and what it gets: the protocol of all engines."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from trl_ext.rollouts.sampling import Opponent


class SamplerError(RuntimeError):
    """The sampler crashed, hung, or failed; it has been stopped."""


@dataclass(frozen=True)
class Request:
    """Prompts to be answered with the weights of the moment at which they are handed in.

    Args:
        prompt_ids: `B` prompts as token ids.
        version: number of optimizer steps behind those weights.
        seed: seeds the sampler's random state for this request.
        rng_state: or: the state in which the generator of the sampling device goes on.
        opponent: a second policy that takes part in sampling; None: the policy alone.
        scored: whether log-probabilities are wanted, which cost a forward pass.
    """

    prompt_ids: list[list[int]]
    version: int
    seed: int | None = None
    rng_state: Tensor | None = None
    opponent: Opponent | None = None
    scored: bool = True

    def __post_init__(self) -> None:
        if self.seed is not None and self.rng_state is not None:
            raise ValueError(
                f"seed={self.seed} was given together with rng_state: a request starts a random "
                "stream or continues one. Give one of the two."
            )


@dataclass(frozen=True)
class Rollout:
    """Completions, and what sampled them.

    Args:
        completion_ids: `B` completions, up to and including the end of sequence.
        logprobs: their tokens' log-probabilities under the policy's weights of this version, also
            in rows that an opponent took part in, at the sampling temperature, in nats; NaN where
            a server does not tell. None if they were not wanted.
        version: that of the request.
        rng_state: state of the generator after sampling, if the request gave one.
        generation_s: seconds that the sampler worked on the request.
        idle_s: seconds that it had waited for the request; 0 for its first.
    """

    completion_ids: list[list[int]]
    logprobs: list[list[float]] | None
    version: int
    rng_state: Tensor | None
    generation_s: float
    idle_s: float


class Sampler(Protocol):
    """Answers one request at a time, while its caller does something else."""

    def submit(self, request: Request) -> None:
        """Takes a snapshot of the weights, hands the request over, and returns at once.

        Raises:
            SamplerError: if the answer to another request has not been collected.
        """
        ...

    def collect(self) -> Rollout:
        """Waits for the answer, for a bounded time.

        Raises:
            SamplerError: if the sampler crashed, hung or failed, or if nothing was submitted.
        """
        ...

    def close(self) -> None:
        """Ends the sampler; to be called any number of times."""
        ...
