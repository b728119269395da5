"""The sampling process: a fresh interpreter that answers requests until its parent is gone."""

import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from trl_ext.rollouts._channel import Channel
from trl_ext.rollouts._snapshot import Memory, Models, Place, named_tensors, unpickled_models
from trl_ext.rollouts.engine import Request, Rollout
from trl_ext.rollouts.random_state import random_state, set_random_state
from trl_ext.rollouts.sampling import sample
from trl_ext.rollouts.scoring import sampled_logps

WATCH_S = 0.5


@dataclass(frozen=True)
class Numerics:
    """What of a process decides the last bit of a product."""

    threads: int
    default_dtype: torch.dtype
    matmul_precision: str
    deterministic: bool

    @classmethod
    def here(cls) -> "Numerics":
        return cls(
            torch.get_num_threads(),
            torch.get_default_dtype(),
            torch.get_float32_matmul_precision(),
            torch.are_deterministic_algorithms_enabled(),
        )

    def apply(self) -> None:
        torch.set_num_threads(self.threads)
        torch.set_default_dtype(self.default_dtype)
        if torch.get_float32_matmul_precision() != self.matmul_precision:
            torch.set_float32_matmul_precision(self.matmul_precision)
        torch.use_deterministic_algorithms(self.deterministic)


@dataclass(frozen=True)
class Setup:
    """All that stays the same between two requests."""

    models: bytes
    places: list[Place]
    memory_size: int
    memory_file: int
    device: torch.device
    generation_config: GenerationConfig
    eos_token_ids: list[int]
    pad_to_multiple_of: int | None
    temperature: float
    rows_per_pass: int
    autocast_dtype: torch.dtype | None
    numerics: Numerics


@dataclass(frozen=True)
class Job:
    """A request, and the mode of each module of the models."""

    request: Request
    training: list[bool]


@dataclass(frozen=True)
class Ready:
    """The models stand."""


@dataclass(frozen=True)
class Failure:
    """The traceback of what went wrong."""

    text: str


def training_flags(models: Models) -> list[bool]:
    return [module.training for module in _modules(models)]


def _modules(models: Models) -> list[Any]:
    return [module for model in models if model is not None for module in model.modules()]


def main() -> None:
    """Called as `main()` in a fresh interpreter with the socket's and the parent's number."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what an interrupt means
    end, parent = int(sys.argv[1]), int(sys.argv[2])
    threading.Thread(target=_leave_with, args=(parent,), daemon=True).start()
    channel = Channel(socket.socket(fileno=end))
    try:
        worker = Worker(channel.receive())
        channel.send(Ready())
        while True:
            channel.send(worker.answer(channel.receive()))
    except EOFError:
        pass
    except BaseException:
        with suppress(OSError):
            channel.send(Failure(traceback.format_exc()))


def _leave_with(parent: int) -> None:
    """A parent that was killed closes its socket, unless it has forked; its number tells more."""
    while os.getppid() == parent:
        time.sleep(WATCH_S)
    os._exit(1)


class Worker:
    """Samples with a copy of the models."""

    def __init__(self, setup: Setup) -> None:
        setup.numerics.apply()
        self.setup = setup
        memory = Memory(setup.memory_size, setup.memory_file)
        self.models = unpickled_models(setup.models, memory, setup.places)
        # On a CPU the models read the snapshot in place: it changes only between two requests.
        self._taken = [] if setup.device.type == "cpu" else list(map(memory.view, setup.places))
        for model in self.models:
            if model is not None:
                model.to(setup.device)
        for module in _modules(self.models):
            if hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing = False  # it would turn the cache off
        self._own = [tensor for _, tensor in named_tensors(self.models)]
        self._finished: float | None = None

    def answer(self, job: Job) -> Rollout:
        start, request = time.perf_counter(), job.request
        idle_s = 0.0 if self._finished is None else start - self._finished
        self._load(job.training)
        with self._autocast():
            completion_ids, state = self._with_random_state(request, lambda: self._sample(request))
            logprobs = self._logprobs(request, completion_ids) if request.scored else None
        self._finished = time.perf_counter()
        return Rollout(
            completion_ids, logprobs, request.version, state, self._finished - start, idle_s
        )

    @torch.no_grad()
    def _load(self, training: Sequence[bool]) -> None:
        for own, taken in zip(self._own, self._taken, strict=False):
            own.copy_(taken)
        for module, mode in zip(_modules(self.models), training, strict=True):
            module.training = mode

    def _autocast(self) -> Any:
        dtype = self.setup.autocast_dtype
        return nullcontext() if dtype is None else torch.autocast(self.setup.device.type, dtype)

    def _with_random_state(
        self, request: Request, work: Callable[[], list[list[int]]]
    ) -> tuple[list[list[int]], Tensor | None]:
        """Completions, and the generator's state behind them where the request gave one."""
        if request.seed is not None:
            torch.manual_seed(request.seed)
        if request.rng_state is None:
            return work(), None
        set_random_state(self.setup.device, request.rng_state)
        return work(), random_state(self.setup.device)

    def _sample(self, request: Request) -> list[list[int]]:
        policy, opponent_model = self.models
        return sample(
            policy,
            request.prompt_ids,
            self.setup.generation_config,
            eos_token_ids=self.setup.eos_token_ids,
            pad_to_multiple_of=self.setup.pad_to_multiple_of,
            opponent_model=opponent_model,
            opponent=request.opponent,
        )

    def _logprobs(self, request: Request, completion_ids: list[list[int]]) -> list[list[float]]:
        setup = self.setup
        return sampled_logps(
            self.models[0],
            request.prompt_ids,
            completion_ids,
            setup.temperature,
            setup.rows_per_pass,
        )
