"""Compiles the kernels of an attention for an H100, which takes no GPU, and says what came out.

    TRITON_INTERPRET=0 python -m tests.ops.compile_kernels tapa 128

The real host code runs on CPU tensors, forward, backward and for one query against cached keys; its
launches only compile, of each kernel the first tile that fits. Prints one JSON object per kernel.
"""

import functools
import json
import re
import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction

from trl_ext.ops._choice import fitting_tiles
from trl_ext.ops._shapes import make_layout
from trl_ext.ops.stickbreaking import triton as stickbreaking
from trl_ext.ops.tapa import triton as tapa


class Absent:
    """What a driver tells of a GPU that is not there."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def compile_only(launch, kernel, *arguments, grid, warmup, **constants):
    found = launch(kernel, *arguments, grid=grid, warmup=True, **constants)
    ptx = found.asm["ptx"]
    facts = {
        "kernel": kernel.fn.__name__,
        "shared": found.metadata.shared,
        "atomics": re.findall(r"\b(?:atom|red)\.[\w.]+", ptx),
        "matrix_units": bool(re.search(r"\b(?:wgmma|mma)\.", ptx)),
    }
    print(json.dumps(facts), flush=True)


def first_tiles():
    def first(tiles, row_bytes):
        return fitting_tiles(tiles, row_bytes)[:1]

    for module in (tapa, stickbreaking):
        module.fitting_tiles = first
        for kernel in vars(module).values():
            if isinstance(kernel, Autotuner) and not kernel.early_config_prune:
                kernel.configs = kernel.configs[:1]


def run(name, width):
    mask = torch.ones(1, 256, dtype=torch.long)
    for queries in (256, 1):
        draw = functools.partial(torch.randn, dtype=torch.bfloat16, requires_grad=queries > 1)
        q, k, v = draw(1, 8, queries, width), draw(1, 2, 256, width), draw(1, 2, 256, width)
        seen = {"attention_mask": mask, "document_ids": mask, "query_offset": None}
        layout = make_layout(q, k, v, **seen)
        if name == "tapa":
            form = {"amplitude_dim": width // 2, "phase_scale": 0.1, "phase_alpha": 0.1}
            output = tapa.tapa(q, k, v, layout, **form)
        else:
            form = {"scale": 0.1, "attend_current": False}
            output = stickbreaking.stickbreaking(q, k, v, layout, **form)[0]
        if queries > 1:
            output.sum().backward()


if __name__ == "__main__":
    triton.runtime.driver.set_active(Absent())
    JITFunction.run = functools.partialmethod(
        lambda kernel, launch, *a, **k: compile_only(launch, kernel, *a, **k), JITFunction.run
    )
    first_tiles()
    run(sys.argv[1], int(sys.argv[2]))
