"""What runs: the implementation that is asked for, or the best one here, and with which tiles."""

import importlib.util
import os
from typing import Any

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

IMPLEMENTATIONS = ("naive", "chunked", "triton")
WIDEST = 256  # head that the kernels are written and tested for
SHARED_MEMORY = 160 * 1024  # bytes of a multiprocessor; the tuner leaves out what a chip has not


def choose(implementation: str | None, q: Tensor, k: Tensor, v: Tensor) -> str:
    """The implementation to use; None: the best one here.

    Raises:
        ValueError: it does not exist, cannot run on this device or in this dtype, or is not "naive"
            where forward-mode gradients are asked for.
    """
    if implementation is None:
        implementation = best_of(q.device, q.dtype, max(q.size(3), v.size(3)))
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation={implementation!r} does not exist: choose one of {IMPLEMENTATIONS}, "
            "or None for the best one here."
        )
    if implementation == "triton":
        _check_triton(q)
    if implementation != "naive" and any(unpack_dual(x).tangent is not None for x in (q, k, v)):
        raise ValueError(
            f"implementation={implementation!r} has no forward-mode gradients, and would take them "
            "for 0: use implementation='naive', or reverse mode."
        )
    return implementation


def best_of(device: torch.device, dtype: torch.dtype, width: int) -> str:
    """Gives "triton" on CUDA where it is installed and takes such tensors, else "chunked"."""
    fits = device.type == "cuda" and dtype.itemsize <= 4 and width <= WIDEST
    return "triton" if fits and _has_triton() else "chunked"


def fitting_tiles(tiles: list[Any], row_bytes: int) -> list[Any]:
    """The tiles whose loaded rows fit a GPU's shared memory; the smallest one if none does.

    A larger one could not be launched, and compiling it only to find out takes up to a minute.

    Args:
        tiles: `triton.Config`s with BLOCK_M queries and BLOCK_N keys.
        row_bytes: of a key or of a value, the larger.
    """

    def rows(tile: Any) -> int:  # a key and a value each, for every stage
        return tile.kwargs["BLOCK_M"] + 2 * tile.num_stages * tile.kwargs["BLOCK_N"]

    fit = [tile for tile in tiles if rows(tile) * row_bytes <= SHARED_MEMORY]
    return fit or [min(tiles, key=rows)]


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
