"""What `bench_attention.py` prints and writes: tables, targets, a plot and all figures."""

import dataclasses
import json
import os
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

BASE, BOTH = "SDPA", "forward + backward"
TARGET_LENGTH = 8192
# The authors' kernel costs 29 % more time than flash attention; reported at second hand.
AUTHORS = 1 / 1.29


@dataclass
class Cell:
    """One method at one kind of work and one length."""

    method: str
    work: str
    length: int
    obstacle: str | None = None
    seconds: list[float] = field(default_factory=list)
    extra_mib: float | None = None


@dataclass(frozen=True)
class Target:
    """A limit for the worst figure of a method at T = 8192, on CUDA from there on."""

    method: str
    work: str
    figure: str  # "extra MiB" or "time", at most; "throughput", at least; both against the base
    limit: float

    def text(self) -> str:
        sign = "≥" if self.figure == "throughput" else "≤"
        unit = "" if self.figure == "extra MiB" else f" of {BASE}'s"
        return f"{self.method}, {self.work}: {self.figure} {sign} {self.limit:.3g}{unit}"

    def met(self, value: float) -> bool:
        return value >= self.limit if self.figure == "throughput" else value <= self.limit


LONG = "stick-breaking, {}, long sticks"
TARGETS = {
    "cpu": [
        Target(name, work, figure, limit)
        for name in ("TAPA, chunked", "stick-breaking, chunked", LONG.format("chunked"))
        for work, figure, limit in (
            (BOTH, "extra MiB", 100),
            ("forward", "time", 3),
            (BOTH, "time", 3),
        )
    ],
    "cuda": [
        Target("TAPA, triton", BOTH, "throughput", 0.6),
        Target("TAPA, triton", BOTH, "throughput", 0.8),
        Target("TAPA, triton", "decode", "throughput", 0.95),
        Target("stick-breaking, triton", BOTH, "throughput", AUTHORS),
        Target(LONG.format("triton"), BOTH, "throughput", AUTHORS),
    ],
}


@dataclass
class Figures:
    """All cells, by method, work and length."""

    cells: list[Cell]
    lengths: list[int]

    def __post_init__(self) -> None:
        self.at = {(cell.method, cell.work, cell.length): cell for cell in self.cells}
        self.methods = list(dict.fromkeys(cell.method for cell in self.cells))
        self.works = list(dict.fromkeys(cell.work for cell in self.cells))

    def seconds(self, cell: Cell) -> float | None:
        return statistics.median(cell.seconds) if cell.seconds else None

    def ratio(self, cell: Cell) -> float | None:
        """Median over rounds of the time, divided by the base's of the same round."""
        base = self.at[BASE, cell.work, cell.length].seconds
        ratios = [own / its for own, its in zip(cell.seconds, base, strict=False)]
        return statistics.median(ratios) if ratios else None

    def worst(self, target: Target, device: str) -> float | None:
        """The figure that a target judges; None if it was not measured."""
        values = []
        for cell in self.cells:
            counts = cell.length == TARGET_LENGTH or (
                device == "cuda" and cell.length > TARGET_LENGTH
            )
            if counts and (cell.method, cell.work) == (target.method, target.work):
                memory = target.figure == "extra MiB"
                values.append(cell.extra_mib if memory else self.ratio(cell))
        if not values or None in values:
            return None
        return 1 / max(values) if target.figure == "throughput" else max(values)


def report(
    cells: list[Cell], lengths: list[int], setting: Any, folder: Path, console: Console
) -> None:
    """Prints the tables; writes `attention.json` and `attention.png`.

    Args:
        setting: the dataclass of shapes, dtype and device.
    """
    figures = Figures(cells, lengths)
    facts = {name: str(value) for name, value in dataclasses.asdict(setting).items()}
    facts |= {"torch": torch.__version__, "threads": torch.get_num_threads()}
    facts["load"] = " ".join(f"{value:.1f}" for value in os.getloadavg())
    if setting.device == "cuda":
        facts["gpu"] = torch.cuda.get_device_name()
    console.print(" · ".join(f"{name} {value}" for name, value in facts.items()))
    for work in figures.works:
        console.print(time_table(figures, work))
    for work in ("forward", BOTH):
        console.print(memory_table(figures, work))
    targets = target_rows(figures, setting.device)
    console.print(target_table(targets))
    folder.mkdir(parents=True, exist_ok=True)
    record = {
        "setting": facts,
        "cells": [
            dataclasses.asdict(cell)
            | {"median_s": figures.seconds(cell), "ratio_to_sdpa": figures.ratio(cell)}
            for cell in cells
        ],
        "targets": targets,
    }
    (folder / "attention.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
    plot(figures, folder / "attention.png")
    console.print(f"Written: {folder / 'attention.json'}, {folder / 'attention.png'}")


def time_table(figures: Figures, work: str) -> Table:
    title = f"{work}: milliseconds, and time relative to {BASE}"
    table = Table("Method", *(f"T={length}" for length in figures.lengths), title=title)
    for method in figures.methods:
        cells = [figures.at[method, work, length] for length in figures.lengths]
        table.add_row(method, *(_time(figures, cell) for cell in cells))
    return table


def _time(figures: Figures, cell: Cell) -> str:
    seconds, ratio = figures.seconds(cell), figures.ratio(cell)
    if seconds is None or ratio is None:
        return cell.obstacle or "-"
    return f"{1000 * seconds:.3g} (×{ratio:.2f})"


def memory_table(figures: Figures, work: str) -> Table:
    title = f"{work}: peak extra memory in MiB, output and gradients included"
    table = Table("Method", *(f"T={length}" for length in figures.lengths), title=title)
    for method in figures.methods:
        cells = [figures.at[method, work, length] for length in figures.lengths]
        table.add_row(
            method,
            *(cell.obstacle or _or_dash(cell.extra_mib, "{:.1f}") for cell in cells),
        )
    return table


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def target_rows(figures: Figures, device: str) -> list[dict[str, Any]]:
    rows = []
    for target in TARGETS[device]:
        value = figures.worst(target, device)
        met = None if value is None else target.met(value)
        rows.append({"target": target.text(), "value": value, "met": met})
    return rows


def target_table(rows: list[dict[str, Any]]) -> Table:
    table = Table("Target", "Measured", "Met", title=f"Targets, T = {TARGET_LENGTH}")
    words = {None: "not measured", True: "yes", False: "no"}
    for row in rows:
        table.add_row(row["target"], _or_dash(row["value"], "{:.3g}"), words[row["met"]])
    return table


def plot(figures: Figures, path: Path) -> None:
    """Time of each kind of work, and memory, against the length; both axes logarithmic."""
    figure = Figure(figsize=(14, 8), layout="constrained")
    axes = figure.subplots(2, 2).flat
    panels = [(work, "milliseconds") for work in figures.works] + [(BOTH, "extra MiB")]
    for axis, (work, unit) in zip(axes, panels, strict=True):
        for method in figures.methods:
            points = []
            for length in figures.lengths:
                cell = figures.at[method, work, length]
                seconds = figures.seconds(cell)
                value = cell.extra_mib if unit == "extra MiB" else seconds and 1000 * seconds
                points += [(length, value)] if value else []
            if points:
                style = "-" if method.startswith("TAPA") else "--"
                black = {"color": "black", "linestyle": ":"} if method == BASE else {}
                axis.plot(*zip(*points, strict=True), **{"linestyle": style, "marker": "o"} | black)
                axis.lines[-1].set_label(method)
        axis.set(xscale="log", yscale="log", title=f"{work}: {unit}", xlabel="context length T")
        axis.set_xticks(figures.lengths, [str(length) for length in figures.lengths])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize="small")
    figure.savefig(path, dpi=120)
