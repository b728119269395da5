"""Time and memory of TAPA and stick-breaking attention beside SDPA, from short to long contexts.

    python recipes/bench_attention.py [--rounds 5] [--lengths 512 8192] [--quick]

Forward, forward and backward, and decoding (one query against T cached keys) of every
implementation, against torch's SDPA (its flash kernel on CUDA), the dense definition ("naive"), and
FlexAttention where it can express the method: TAPA with its phases as a captured plane, of which it
has no sound backward. Every round times all of them on the same tensors, in an order that
alternates, and divides by SDPA's time of the same round; printed are medians. Calls are repeated
until they take 50 ms, and a cell that took 10 seconds in all is timed no more: of one that takes
them at once, which none but dense forms do, the first call is the only one.

Peak extra memory is what a call adds to its inputs: output, gradients and everything in between. On
CUDA the allocator counts it. On a CPU each cell runs in a process of its own, after a small call
that loads libraries; its resident set is read before, and its high-water mark, reset there, after.

What is left of a stick on random logits is soon too short for a float, and its older keys are left
out. "long sticks" lowers the logits by 8, so that nothing is left out: the other extreme.

Without CUDA it says so and measures the CPU forms. Set OMP_NUM_THREADS=1 where cores are shared:
waiting threads slow small operations many times over.
"""

import argparse
import gc
import math
import multiprocessing
import re
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from bench_attention_report import BASE, Cell, report
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from trl_ext.ops import stickbreaking_attention, tapa_attention

THETA, ALPHA = 0.5, 0.1
LEAST_S, ENOUGH_S = 0.05, 10.0
WORKS = ("forward", "forward + backward", "decode")
LOWERED = 8.0
MEMORY, STATUS, CLEAR = map(Path, ("/proc/meminfo", "/proc/self/status", "/proc/self/clear_refs"))


@dataclass(frozen=True)
class Setting:
    """Shapes, dtype and device of all cells."""

    device: str
    heads: int
    kv_heads: int
    width: int
    dtype: torch.dtype
    tokens: int  # of a batch, if that is more than one row's

    def tensors(self, length: int, work: str, long_sticks: bool) -> list[Tensor]:
        decode = work == "decode"
        rows = max(1, self.tokens // length)
        sizes = [(self.heads, 1 if decode else length), *[(self.kv_heads, length)] * 2]
        draw = torch.Generator(self.device).manual_seed(0)
        kinds = {"device": self.device, "dtype": self.dtype, "generator": draw}
        q, k, v = (torch.randn(rows, *size, self.width, **kinds) for size in sizes)
        if long_sticks:
            q[..., 0], k[..., 0] = LOWERED, -math.sqrt(self.width)
        return [x.requires_grad_("backward" in work) for x in (q, k, v)]


@dataclass(frozen=True)
class Method:
    """An attention `(q, k, v) -> output`, and what keeps it from some of the cells."""

    attend: Callable[..., Tensor]
    dense: bool = False
    compiled: bool = False
    long_sticks: bool = False
    cannot: dict[str, str] = field(default_factory=dict)

    def obstacle(self, work: str, length: int, setting: Setting) -> str | None:
        """Why this cell stays empty; None if it can be measured."""
        if work in self.cannot or not self.dense or work == "decode" or setting.device == "cuda":
            return self.cannot.get(work)
        scores = setting.heads * length**2 * 4 * max(1, setting.tokens // length)
        return None if 10 * scores < free_memory() else "too large here"


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    form = {"is_causal": q.size(2) > 1, "enable_gqa": q.size(1) != k.size(1)}
    if q.device.type == "cpu":
        return F.scaled_dot_product_attention(q, k, v, **form)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v, **form)


def tapa(q: Tensor, k: Tensor, v: Tensor, implementation: str) -> Tensor:
    form = {"amplitude_fraction": THETA, "phase_alpha": ALPHA, "implementation": implementation}
    return tapa_attention(q, k, v, **form)


def stickbreaking(q: Tensor, k: Tensor, v: Tensor, implementation: str) -> Tensor:
    return stickbreaking_attention(q, k, v, implementation=implementation)[0]


def flex_tapa(q: Tensor, k: Tensor, v: Tensor, kernel: Callable[..., Any] | None = None) -> Tensor:
    """TAPA by FlexAttention, which sees one score per pair: the phases are a captured T × T plane.

    Args:
        kernel: flex_attention; None: compiled.
    """
    at, grouped = round(THETA * q.size(3)), q.size(1) // k.size(1)
    queries, keys = q.size(2), k.size(2)
    phases = q[..., at:].float() @ k[..., at:].float().repeat_interleave(grouped, 1).mT
    distances = torch.arange(keys, device=q.device, dtype=torch.float64)
    turns = (2 * math.pi / math.sqrt(q.size(3) - at) * distances**ALPHA).float()

    def turned(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        distance = (i + keys - queries - j).abs()
        return score * torch.cos(turns[distance] * phases[b, h, i, j])

    mask = causal_mask(queries, str(q.device)) if queries > 1 else None
    parts = (q[..., :at].contiguous(), k[..., :at].contiguous(), v)
    return (kernel or compiled_flex())(
        *parts, score_mod=turned, block_mask=mask, scale=1 / math.sqrt(at), enable_gqa=grouped > 1
    )


@cache
def compiled_flex() -> Callable[..., Any]:
    return torch.compile(flex_attention, dynamic=False)


@cache
def causal_mask(length: int, device: str) -> Any:
    return create_block_mask(lambda b, h, i, j: i >= j, None, None, length, length, device=device)


def methods(device: str, quick: bool) -> dict[str, Method]:
    """The base first; then both attentions."""
    forms = ["naive", "chunked", "triton"][: 3 if device == "cuda" else 2]
    found = {BASE: Method(sdpa)}
    for form in forms:
        attend = partial(tapa, implementation=form)
        found[f"TAPA, {form}"] = Method(attend, dense=form == "naive")
    why = "no backward on a CPU" if device == "cpu" else "see pytorch#162228"
    flex = dict.fromkeys(WORKS, "not in --quick") if quick else {"forward + backward": why}
    found["TAPA, FlexAttention"] = Method(flex_tapa, dense=True, compiled=True, cannot=flex)
    for form in forms:
        attend = partial(stickbreaking, implementation=form)
        found[f"stick-breaking, {form}"] = Method(attend, dense=form == "naive")
    for form in forms[1:]:
        attend = partial(stickbreaking, implementation=form)
        found[f"stick-breaking, {form}, long sticks"] = Method(attend, long_sticks=True)
    never = dict.fromkeys(WORKS, "cannot express it")
    return found | {"stick-breaking, FlexAttention": Method(stickbreaking, cannot=never)}


def free_memory() -> int:
    """Bytes that may be taken; 8 GiB where the machine does not tell."""
    if not MEMORY.exists():
        return 8 * 2**30
    found = re.search(r"MemAvailable:\s+(\d+) kB", MEMORY.read_text(encoding="utf-8"))
    return 1024 * int(found[1]) if found else 8 * 2**30


def call_of(method: Method, work: str, length: int, setting: Setting) -> Callable[[], Any]:
    """One call of a cell, with its inputs at hand."""
    q, k, v = setting.tensors(length, work, method.long_sticks)
    if work != "forward + backward":

        def forward() -> Tensor:
            with torch.no_grad():
                return method.attend(q, k, v)

        return forward
    upstream = torch.ones_like(q[..., : v.size(3)])

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(method.attend(q, k, v), (q, k, v), upstream)

    return both


def measure_memory(cells: list[Cell], chosen: dict[str, Method], setting: Setting) -> None:
    """Fills in the peak extra memory, in MiB.

    On a CPU nothing may be computed before: it would start threads, and a fork has none of them.
    """
    if setting.device == "cpu" and not CLEAR.exists():
        return  # only Linux resets a high-water mark
    torch.compiler.reset()  # imports what the first call of an operator asks for: not in each fork
    for cell in cells:
        if cell.obstacle is None and cell.work != "decode":
            arguments = (chosen[cell.method], cell.work, cell.length, setting)
            try:
                cell.extra_mib = extra_memory(*arguments)
            except torch.OutOfMemoryError:
                cell.obstacle = "out of memory"


def extra_memory(method: Method, work: str, length: int, setting: Setting) -> float:
    if setting.device == "cpu":
        fork = multiprocessing.get_context("fork")
        with ProcessPoolExecutor(1, mp_context=fork) as pool:
            return pool.submit(extra_resident_set, method, work, length, setting).result()
    call = call_of(method, work, length, setting)
    call()  # tuning takes memory too
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def extra_resident_set(method: Method, work: str, length: int, setting: Setting) -> float:
    call_of(method, work, length if method.compiled else 64, setting)()
    call = call_of(method, work, length, setting)
    gc.collect()
    CLEAR.write_text("5", encoding="utf-8")
    before = status("VmRSS")
    call()
    return (status("VmHWM") - before) / 1024


def status(name: str) -> int:
    """A number of kB from what Linux says of this process."""
    found = re.search(rf"{name}:\s+(\d+) kB", STATUS.read_text(encoding="utf-8"))
    assert found is not None, f"{STATUS} has no {name}"
    return int(found[1])


def measure_time(
    cells: list[Cell], chosen: dict[str, Method], setting: Setting, rounds: int
) -> None:
    """Fills in the seconds of cells of one kind of work and one length, in turns."""
    torch.compiler.reset()  # or FlexAttention would meet the limit of recompilations
    ready = []
    for cell in cells:
        if cell.obstacle is None:
            try:
                call = call_of(chosen[cell.method], cell.work, cell.length, setting)
                once = seconds_of(call, 1, setting.device)  # loads, compiles and tunes
                if once > ENOUGH_S and not chosen[cell.method].compiled:
                    cell.seconds.append(once)
                    continue
                once = seconds_of(call, 1, setting.device)
            except torch.OutOfMemoryError:
                cell.obstacle = "out of memory"
                continue
            ready.append((cell, call, max(1, math.ceil(LEAST_S / once))))
    for i in range(rounds):
        for cell, call, repeats in ready[:: -1 if i % 2 else 1]:
            if sum(cell.seconds) < ENOUGH_S:
                cell.seconds.append(seconds_of(call, repeats, setting.device))


def seconds_of(call: Callable[[], Any], repeats: int, device: str) -> float:
    wait = torch.cuda.synchronize if device == "cuda" else bool
    wait()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    wait()
    return (time.perf_counter() - start) / repeats


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where it is")
    parser.add_argument("--lengths", type=int, nargs="+", help="default: 512-8192, cuda 1k-64k")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--heads", type=int, help="default: 8, cuda 32")
    parser.add_argument("--kv-heads", type=int, help="default: 8, cuda 8")
    parser.add_argument("--width", type=int, help="of a head; default: 64, cuda 128")
    parser.add_argument("--quick", action="store_true", help="one short length, one round")
    parser.add_argument("--output-dir", type=Path, default=Path("out/bench_attention"))
    return parser.parse_args()


def setting_of(options: argparse.Namespace) -> Setting:
    cuda = (options.device or ("cuda" if torch.cuda.is_available() else "cpu")) == "cuda"
    return Setting(
        device="cuda" if cuda else "cpu",
        heads=options.heads or (32 if cuda else 8),
        kv_heads=options.kv_heads or 8,
        width=options.width or (128 if cuda else 64),
        dtype=torch.bfloat16 if cuda else torch.float32,
        tokens=16384 if cuda else 1,
    )


def main() -> None:
    options, console = parse_arguments(), Console()
    setting = setting_of(options)
    if setting.device == "cpu":
        console.print("No CUDA here: the CPU forms only. The kernels' speed is not measured.")
    lengths = [2**n for n in (range(10, 17) if setting.device == "cuda" else range(9, 14))]
    lengths = options.lengths or ([128] if options.quick else lengths)
    chosen = methods(setting.device, options.quick)
    cells = [
        Cell(name, work, length, method.obstacle(work, length, setting))
        for length in lengths
        for work in WORKS
        for name, method in chosen.items()
    ]
    measure_memory(cells, chosen, setting)
    groups = [cells[i : i + len(chosen)] for i in range(0, len(cells), len(chosen))]
    for group in track(groups, "Times", console=console, transient=True):
        measure_time(group, chosen, setting, 1 if options.quick else options.rounds)
    report(cells, lengths, setting, options.output_dir, console)


if __name__ == "__main__":
    main()
