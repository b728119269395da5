"""What the study shows: a table per measure on the screen, and a plot per measure as a PNG."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from methods import NAMES
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

# Okabe and Ito's palette, which the colour-blind can tell apart.
COLOURS = {
    "rope": "#D55E00",
    "pi": "#E69F00",
    "yarn": "#CC79A7",
    "tapa": "#0072B2",
    "stickbreaking": "#009E73",
}
MARKERS = {"rope": "o", "pi": "s", "yarn": "^", "tapa": "D", "stickbreaking": "v"}
MEASURES = {
    "perplexity": "perplexity per token",
    "passkey": "passkeys found",
    "recall": "associative recall, answers right",
}
STAGES = {"short": "after pretraining", "long": "after going on at {length} tokens"}
Row = dict[str, Any]


def report(rows: Sequence[Row], folder: Path, console: Console | None = None) -> list[Path]:
    """Prints a table and draws a figure for each measure; returns the figures."""
    console = console or Console()
    paths = []
    for measure in MEASURES:
        console.print(table_of(rows, measure))
        paths.append(draw(rows, measure, folder / f"{measure}.png"))
    console.print("Figures: " + ", ".join(map(str, paths)))
    return paths


def table_of(rows: Sequence[Row], measure: str) -> Table:
    """Methods and stages down, lengths across; mean ± standard error over seeds."""
    lengths, seeds = lengths_of(rows), sorted({row["seed"] for row in rows})
    title = f"{MEASURES[measure]}; mean ± standard error over seeds {seeds}"
    table = Table(title=title, title_justify="left", box=SIMPLE)
    table.add_column("stage")
    table.add_column("method")
    for length in lengths:
        table.add_column(f"{length}", justify="right")
    for stage, method in runs_of(rows):
        cells = [over_seeds(values(rows, measure, stage, method, length)) for length in lengths]
        table.add_row(stage, NAMES[method], *cells)
    return table


def lengths_of(rows: Sequence[Row]) -> list[int]:
    return sorted({row["length"] for row in rows})


def runs_of(rows: Sequence[Row]) -> list[tuple[str, str]]:
    present = {(row["stage"], row["method"]) for row in rows}
    return [(stage, m) for stage in STAGES for m in NAMES if (stage, m) in present]


def values(rows: Sequence[Row], measure: str, stage: str, method: str, length: int) -> list[float]:
    """One number per seed."""
    wanted = (stage, method, length)
    return [r[measure] for r in rows if (r["stage"], r["method"], r["length"]) == wanted]


def mean_and_error(numbers: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error over seeds; one seed shows none."""
    error = statistics.stdev(numbers) / len(numbers) ** 0.5 if len(numbers) > 1 else 0.0
    return statistics.mean(numbers), error


def over_seeds(numbers: Sequence[float]) -> str:
    mean, error = mean_and_error(numbers)
    digits = 2 if mean < 100 else 0
    return f"{mean:.{digits}f}" + (f"±{error:.{digits}f}" if len(numbers) > 1 else "")


def draw(rows: Sequence[Row], measure: str, path: Path) -> Path:
    """One panel per stage: the measure against the context, a curve per method."""
    matplotlib.use("Agg")
    stages = [stage for stage in STAGES if any(row["stage"] == stage for row in rows)]
    figure = Figure(figsize=(1.6 + 4.8 * len(stages), 4.2), dpi=150, layout="constrained")
    panels = figure.subplots(1, len(stages), sharey=True, squeeze=False)[0]
    for axes, stage in zip(panels, stages, strict=True):
        draw_stage(axes, rows, measure, stage)
    panels[0].set_ylabel(MEASURES[measure])
    curves = panels[0].get_legend_handles_labels()
    figure.legend(*curves, loc="outside right center", frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


def draw_stage(axes: Axes, rows: Sequence[Row], measure: str, stage: str) -> None:
    lengths = lengths_of(rows)
    for found, method in runs_of(rows):
        if found != stage:
            continue
        points = [mean_and_error(values(rows, measure, stage, method, n)) for n in lengths]
        means, errors = zip(*points, strict=True)
        style = {"marker": MARKERS[method], "ms": 4, "color": COLOURS[method], "capsize": 2}
        axes.errorbar(lengths, means, errors, label=NAMES[method], linewidth=1.5, **style)
    trained = {row["trained_length"] for row in rows if row["stage"] == stage}
    for length in trained:
        axes.axvline(length, color="#777777", linestyle=":", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [str(length) for length in lengths])
    axes.set_xlabel("context, tokens (dotted: trained on)")
    axes.set_title(STAGES[stage].format(length=max(trained)), loc="left")
    if measure == "perplexity":
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if tick(value) else "")
    else:
        axes.set_ylim(-0.03, 1.03)
    axes.grid(alpha=0.25, linewidth=0.6, which="both")
    axes.spines[["top", "right"]].set_visible(False)


def tick(value: float) -> bool:
    """Whether a minor tick of a logarithmic axis gets a number: every other one does."""
    return round(value / 10 ** math.floor(math.log10(value) + 1e-9)) in (2, 3, 5, 8)
