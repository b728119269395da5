"""The kernels through Triton's compiler, which refuses what its interpreter lets pass."""

import json
import os
import subprocess
import sys

import pytest

from tests.sources import ROOT

pytest.importorskip("triton")
KERNELS = {
    "tapa": ["_forward", "_query_gradient", "_key_gradient", "_forward"],
    "stickbreaking": ["_forward", "_sticks", "_queries", "_keys", "_forward"],
}
H100_SHARED_MEMORY = 227 * 1024


@pytest.mark.parametrize("attention", KERNELS)
def test_kernels_compile_for_a_gpu_without_atomics(attention, tmp_path):
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.ops.compile_kernels", attention, "128"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    found = [json.loads(line) for line in run.stdout.splitlines()]
    assert [x["kernel"] for x in found] == [f"{name}_kernel" for name in KERNELS[attention]]
    for kernel in found:
        assert kernel["atomics"] == [], kernel
        assert kernel["matrix_units"], kernel
        assert 0 < kernel["shared"] <= H100_SHARED_MEMORY, kernel
