"""Two gloo processes on one machine, started as torchrun starts them but without its agent."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]


def leave() -> None:
    """Ends a rank that has done its work; a rank that failed ends by its exception instead.

    Gloo's own teardown is not used: where the other rank leaves first it was seen to wait for ever,
    and at the interpreter's exit to abort.
    """
    torch.distributed.barrier()
    sys.stdout.flush()
    os._exit(0)


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return str(probe.getsockname()[1])


def run_two_ranks(arguments: Callable[[int], Sequence[str]], timeout_s: float = 180) -> None:
    """Runs `python *arguments(rank)` on both ranks; a hang ends with the stack of each rank."""
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": free_port()}
    common |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": "2"}
    common |= {"PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryFile("w+") as said:
        ranks = [
            subprocess.Popen(
                [sys.executable, "-X", "faulthandler", *arguments(rank)],
                env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                cwd=ROOT,
                stdout=said,
                stderr=said,
            )
            for rank in range(2)
        ]
        try:
            codes = [rank.wait(timeout=timeout_s) for rank in ranks]
        except subprocess.TimeoutExpired:
            for rank in ranks:
                rank.send_signal(signal.SIGABRT)  # faulthandler prints where it stands
            codes = [rank.wait(timeout=30) for rank in ranks]
        said.seek(0)
        assert codes == [0, 0], f"exit codes {codes}\n{said.read()[-8000:]}"
