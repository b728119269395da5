"""Which implementation of an attention runs: the one that is asked for, or the best one here."""

import importlib.util
import os

import torch
from torch import Tensor

IMPLEMENTATIONS = ("naive", "chunked", "triton")


def choose(implementation: str | None, q: Tensor) -> str:
    """The implementation to use for `q`; None: "triton" on CUDA if installed, else "chunked".

    Raises:
        ValueError: it does not exist, or cannot run on this device or in this dtype.
    """
    fits = q.device.type == "cuda" and q.element_size() <= 4
    if implementation is None:
        return "triton" if fits and _has_triton() else "chunked"
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation={implementation!r} does not exist: choose one of {IMPLEMENTATIONS}, "
            "or None for the best one here."
        )
    if implementation == "triton":
        _check_triton(q)
    return implementation


def _check_triton(q: Tensor) -> None:
    remedy = "or use 'chunked', which computes the same on any device."
    if not _has_triton():
        raise ValueError(
            "implementation='triton' needs the package triton, which is not installed: install it, "
            + remedy
        )
    if q.element_size() > 4:
        raise ValueError(
            f"implementation='triton' computes in float32 and q is {q.dtype}: convert the tensors, "
            + remedy
        )
    if q.device.type != "cuda" and not _interprets():
        raise ValueError(
            f"implementation='triton' runs on CUDA and q is on {q.device.type!r}: move the tensors,"
            f" {remedy}"
        )
    if _interprets() and q.dtype == torch.bfloat16:
        raise ValueError(
            "implementation='triton' runs in Triton's interpreter, whose matmul misreads bfloat16: "
            f"convert the tensors, {remedy}"
        )


def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _interprets() -> bool:
    """Whether Triton's interpreter runs kernels in place of a GPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"
