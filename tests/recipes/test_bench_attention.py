"""The benchmark of the attentions: a short run, its figures, and what it judges by them."""

import json
import os
import subprocess
import sys

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from tests.sources import ROOT
from trl_ext.ops import stickbreaking_attention, tapa_attention

RECIPES = ROOT / "recipes"


@pytest.fixture
def recipes(monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPES))


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    words = "--quick --device cpu --lengths 64 192 --heads 4 --kv-heads 2 --output-dir"
    run = subprocess.run(
        [sys.executable, str(RECIPES / "bench_attention.py"), *words.split(), str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout, folder


def test_it_prints_tables_and_says_what_is_missing(quick_run):
    said, _ = quick_run
    for expected in ("No CUDA here", "T=192", "SDPA", "cannot express it", "≤ 3 of SDPA's"):
        assert expected in said


def test_every_cell_has_a_figure_or_a_reason(quick_run):
    _, folder = quick_run
    assert (folder / "attention.png").read_bytes().startswith(b"\x89PNG")
    record = json.loads((folder / "attention.json").read_text(encoding="utf-8"))
    assert len(record["cells"]) == 8 * 3 * 2
    for cell in record["cells"]:
        flex = "FlexAttention" in cell["method"]
        assert bool(cell["obstacle"]) == flex
        assert (cell["median_s"] is None) == flex
        if cell["method"] == "SDPA":
            assert cell["ratio_to_sdpa"] == 1.0
        if not flex:
            measured = cell["work"] == "decode" or not sys.platform.startswith("linux")
            assert (cell["extra_mib"] is None) == measured
    assert {row["met"] for row in record["targets"]} == {None}


TAKES_64_MIB = """
import torch
import bench_attention as bench

def attend(q, k, v):
    return torch.ones(16 * 2**20)[: q.numel()].view_as(q) * q

setting = bench.Setting("cpu", 1, 1, 8, torch.float32, 1)
print(bench.extra_memory(bench.Method(attend), "forward", 256, setting))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_extra_memory_is_what_a_call_takes():
    # In a process that has computed nothing, as the recipe has it: it forks.
    run = subprocess.run(
        [sys.executable, "-c", TAKES_64_MIB],
        cwd=RECIPES,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert 63 < float(run.stdout) < 68


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("queries", [40, 1])
def test_flex_attention_is_given_the_same_attention(recipes, queries):
    import bench_attention as bench

    draw = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, h, t, 16, generator=draw) for h, t in ((4, queries), (2, 40), (2, 40))
    )
    expected = tapa_attention(q, k, v, amplitude_fraction=bench.THETA, phase_alpha=bench.ALPHA)
    found = bench.flex_tapa(q, k, v, kernel=flex_attention)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_long_sticks_leave_something_for_the_oldest_key(recipes):
    import bench_attention as bench

    setting = bench.Setting("cpu", 1, 1, 64, torch.float32, 1)
    for long in (True, False):
        remainder = stickbreaking_attention(*setting.tensors(2048, "forward", long))[1]
        assert (remainder[..., -1].item() > 1e-3) == long


def test_targets_take_the_worst_figure_of_their_lengths(recipes):
    from bench_attention_report import BOTH, Cell, Figures, Target

    cells = [
        Cell(name, BOTH, length, None, seconds, 1.0)
        for length, own in ((4096, 9.0), (8192, 2.0), (16384, 4.0))
        for name, seconds in (("SDPA", [1.0, 2.0, 1.0]), ("ours", [own, 2 * own, own]))
    ]
    figures = Figures(cells, [4096, 8192, 16384])
    throughput, time = (Target("ours", BOTH, name, 0.5) for name in ("throughput", "time"))
    assert figures.worst(throughput, "cuda") == 1 / 4
    assert figures.worst(time, "cpu") == 2.0
    assert throughput.met(0.6) and not throughput.met(0.4)
    assert time.met(0.4) and not time.met(0.6)
    cells[3].seconds = []
    assert figures.worst(time, "cpu") is None
