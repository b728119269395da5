"""Sampling in a process of its own, on a snapshot of the weights."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from transformers import GenerationConfig

from trl_ext.rollouts._channel import Channel
from trl_ext.rollouts._inputs import device_of
from trl_ext.rollouts._snapshot import Snapshot
from trl_ext.rollouts._worker import Failure, Job, Numerics, Ready, Setup, training_flags
from trl_ext.rollouts.engine import Request, Rollout, SamplerError

START_UP_S = 120.0  # imports and models
COMMAND = "from trl_ext.rollouts._worker import main; main()"


class ProcessSampler:
    """A [`Sampler`] that runs on any machine: a child process with a copy of the model.

    The child starts with the first request. It is a fresh interpreter, which neither runs the
    script of its parent again nor inherits its CUDA context, and it ends with its parent.

    Args:
        model: the policy, bare of wrappers; sampled in the mode that it has at `submit`.
        generation_config: as TRL builds it, with `pad_token_id`.
        eos_token_ids: each of them ends a completion.
        temperature: at which log-probabilities are reported, above 0.
        rows_per_pass: rows of one scoring pass, at least 1.
        pad_to_multiple_of: the prompts' common width is rounded up to it.
        opponent_model: answers requests with an opponent; its weights are in the snapshot as well.
        device: where the child samples; None: where the model is.
        timeout_s: seconds that `collect` waits at most, once the child has started.
        autocast_dtype: type to which the trainer's autocast casts; None: no autocast.
    """

    def __init__(
        self,
        model: Any,
        generation_config: GenerationConfig,
        *,
        eos_token_ids: Sequence[int],
        temperature: float,
        rows_per_pass: int,
        pad_to_multiple_of: int | None = None,
        opponent_model: Any = None,
        device: torch.device | str | None = None,
        timeout_s: float = 600.0,
        autocast_dtype: torch.dtype | None = None,
    ) -> None:
        for name, value in (("temperature", temperature), ("timeout_s", timeout_s)):
            if not value > 0.0:
                raise ValueError(f"{name}={value} must be positive.")
        if rows_per_pass < 1:
            raise ValueError(f"rows_per_pass={rows_per_pass} scores nothing. Give at least 1.")
        self.models, self.timeout_s = (model, opponent_model), timeout_s
        self._options = {
            "device": device_of(model) if device is None else torch.device(device),
            "generation_config": generation_config,
            "eos_token_ids": list(eos_token_ids),
            "pad_to_multiple_of": pad_to_multiple_of,
            "temperature": temperature,
            "rows_per_pass": rows_per_pass,
            "autocast_dtype": autocast_dtype,
        }
        self._snapshot: Snapshot | None = None
        self._child: _Child | None = None
        self._pending = False

    def submit(self, request: Request) -> None:
        """Takes a snapshot of the weights, hands the request over, and returns at once.

        Raises:
            SamplerError: if the answer to another request has not been collected.
            ValueError: if the model cannot be copied into another process.
        """
        if self._pending:
            raise SamplerError(
                "A request was submitted while the sampler has another one, whose weights it may "
                "be reading. Call collect() first."
            )
        self._snapshot = self._snapshot or Snapshot(self.models)
        self._snapshot.take()
        messages: list[Any] = [Job(request, training_flags(self.models))]
        if self._child is None:
            messages.insert(0, self._setup(self._snapshot))
            self._child = _Child(self._snapshot.memory.file)
        self._pending = True  # first: an interrupted submit is no free sampler
        self._child.send(messages)

    def collect(self) -> Rollout:
        """Waits for the answer.

        Raises:
            SamplerError: if the child crashed, hung or failed, or if nothing was submitted.
        """
        if self._child is None or not self._pending:
            raise SamplerError("collect() was called though nothing was submitted.")
        try:
            self._child.await_start()
            rollout = self._child.receive(
                self.timeout_s, f"gave no answer within timeout_s={self.timeout_s:g} seconds"
            )
        except BaseException:
            self.close()  # half an answer, or a child at work for nobody
            raise
        self._pending = False
        return rollout

    def close(self) -> None:
        """Kills the child; a later `submit` starts another."""
        child, self._child, self._pending = self._child, None, False
        if child is not None:
            child.end()

    def _setup(self, snapshot: Snapshot) -> Setup:
        return Setup(
            models=snapshot.pickled_models(),
            places=list(snapshot.places.values()),
            memory_size=snapshot.memory.size,
            memory_file=snapshot.memory.file,
            numerics=Numerics.here(),
            **self._options,
        )


class _Child:
    """The process, and our end of the socket."""

    def __init__(self, memory_file: int) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-c", COMMAND, str(theirs.fileno()), str(os.getpid())],
                pass_fds=(theirs.fileno(), memory_file),
                stdin=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": _import_path()},
                start_new_session=True,  # no Ctrl-C from the terminal
            )
        self.channel = Channel(ours)
        self.deadline = time.monotonic() + START_UP_S
        self.ready = False
        self.end = weakref.finalize(self, _end, self.process, self.channel)

    def send(self, messages: list[Any]) -> None:
        """Sends in a thread: a child that starts, or hangs, does not read."""
        threading.Thread(target=_send, args=(self.channel, messages), daemon=True).start()

    def await_start(self) -> None:
        if not self.ready:
            left_s = max(self.deadline - time.monotonic(), 0.0)
            started = self.receive(left_s, f"did not start within {START_UP_S:g} seconds")
            self.ready = isinstance(started, Ready)

    def receive(self, timeout_s: float, fault: str) -> Any:
        try:
            message = self.channel.receive(timeout_s)
        except TimeoutError:
            raise SamplerError(
                f"The sampling process {fault} and was killed. If the machine was only busy, give "
                "it more time or fewer rows; the last checkpoint is whole, resume from it."
            ) from None
        except EOFError:
            raise SamplerError(
                f"The sampling process ended: {_cause(self.process)}. Its own message, if any, "
                "stands above; the last checkpoint is whole, resume from it."
            ) from None
        if isinstance(message, Failure):
            raise SamplerError(f"The sampling process failed:\n{message.text}")
        return message


def _send(channel: Channel, messages: list[Any]) -> None:
    with suppress(OSError):  # a child that is gone is noticed where its answer is awaited
        for message in messages:
            channel.send(message)


def _cause(process: subprocess.Popen) -> str:
    try:
        code = process.wait(timeout=5.0)
    except subprocess.TimeoutExpired:
        return "it closed its socket"
    if code >= 0:
        return f"exit code {code}"
    name = signal.Signals(-code).name
    return f"killed by {name}" + (", often for want of memory" if name == "SIGKILL" else "")


def _end(process: subprocess.Popen, channel: Channel) -> None:
    process.kill()  # without effect in a forked copy of the parent, whose child it is not
    with suppress(subprocess.TimeoutExpired):  # held up by a driver, it dies when let go
        process.wait(timeout=5.0)
    channel.close()


def _import_path() -> str:
    return os.pathsep.join(os.path.abspath(folder) for folder in sys.path)
