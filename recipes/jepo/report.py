"""What the study shows: tables on the screen, what they say of the claims, and curves as a PNG."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from trl_ext.studies import mean_and_error, over_seeds

# Okabe and Ito's palette, which the colour-blind can tell apart.
COLOURS = {
    "start": "#777777",
    "sft": "#999999",
    "single": "#D55E00",
    "multi-2": "#56B4E9",
    "multi-4": "#0072B2",
    "multi-8": "#004266",
    "verifree": "#009E73",
    "grpo": "#000000",
    "no-sft-4": "#CC79A7",
}
BOUNDS = ("nll_L1", "nll_L4", "nll_L8")
FIGURES = {"numbers": ("accuracy", *BOUNDS), "words": BOUNDS}
Row = dict[str, Any]


def report(rows: Sequence[Row], folder: Path, console: Console | None = None) -> Path:
    """Prints tables and claims, and draws the figure `folder/jepo.png`."""
    console = console or Console()
    for task in FIGURES:
        console.print(table_of([row for row in rows if row["task"] == task], task))
    if not swept(rows):
        console.print(*claims(rows), sep="\n", highlight=False)
    path = draw(best_rates(rows), folder / "jepo.png")
    console.print(f"Figure: {path}")
    return path


def table_of(rows: Sequence[Row], task: str) -> Table:
    """Each method, and where several were tried each rate, at its end; mean ± error over seeds."""
    names = [name for name in FIGURES[task] if name in rows[0]]
    seeds = sorted({row["seed"] for row in rows})
    title = f"Answers in {task}, held out, at the end; ± over seeds {seeds}"
    table = Table(
        "", "rate", *names, "tokens", title=title, box=SIMPLE, pad_edge=False, collapse_padding=True
    )
    for method, rate in dict.fromkeys((row["method"], row["rate"]) for row in rows):
        ends = ends_of(rows, task, method, rate)
        cells = [over_seeds([row[name] for row in ends]).replace(" ", "") for name in names]
        cells.append(f"{mean_and_error(row['mean_length'] for row in ends)[0]:.1f}")
        table.add_row(method, f"{rate:g}" if rate else "", *cells)
    return table


def ends_of(rows: Iterable[Row], task: str, method: str, rate: float | None = None) -> list[Row]:
    """The last measured point of each seed, in the order of the seeds."""
    found: dict[int, Row] = {}
    for row in rows:
        of_it = row["task"] == task and row["method"] == method
        if of_it and rate in (None, row["rate"]):
            found[row["seed"]] = row
    return [found[seed] for seed in sorted(found)]


def claims(rows: Sequence[Row]) -> list[str]:
    """What the paper says, and the differences seen, seed by seed."""
    pairs = {
        "the task needs its thought: multi-4 − sft, accuracy": ("numbers", "multi-4", "sft"),
        "multi-sample reaches the verifier: multi-4 − grpo, accuracy": (
            *("numbers", "multi-4", "grpo"),
        ),
        "more samples are tighter: multi-4 − multi-2, accuracy": ("numbers", "multi-4", "multi-2"),
        "more samples are tighter: multi-8 − multi-4, accuracy": ("numbers", "multi-8", "multi-4"),
        "several samples beat one: multi-4 − single, accuracy": ("numbers", "multi-4", "single"),
        "without verifier better than SFT: multi-4 − sft, nll_L4": ("words", "multi-4", "sft"),
        "its likelihood term is needed: no-sft-4 − multi-4, nll_L4": (
            *("words", "no-sft-4", "multi-4"),
        ),
    }
    said = []
    for claim, (task, first, second) in pairs.items():
        name = claim.rsplit(" ", 1)[1]
        ends = zip(ends_of(rows, task, first), ends_of(rows, task, second), strict=True)
        said.append(f"{claim}: {over_seeds([a[name] - b[name] for a, b in ends])}")
    return said


def swept(rows: Iterable[Row]) -> bool:
    return len({(row["task"], row["method"], row["rate"]) for row in rows}) > len(
        {(row["task"], row["method"]) for row in rows}
    )


def best_rates(rows: Sequence[Row]) -> list[Row]:
    """The rows of each method's best rate, by accuracy, in words by `nll_L4`."""
    kept = []
    for task, method in dict.fromkeys((row["task"], row["method"]) for row in rows):
        own = [row for row in rows if (row["task"], row["method"]) == (task, method)]
        best = max({row["rate"] for row in own}, key=lambda rate: _worth(own, task, method, rate))
        kept += [row for row in own if row["rate"] == best]
    return kept


def _worth(rows: Sequence[Row], task: str, method: str, rate: float) -> float:
    ends = ends_of(rows, task, method, rate)
    worth, _ = mean_and_error([row.get("accuracy", -row["nll_L4"]) for row in ends])
    return -math.inf if math.isnan(worth) else worth


def draw(rows: Sequence[Row], path: Path) -> Path:
    """Accuracy and likelihood along training, and the bounds of trained policies against n."""
    matplotlib.use("Agg")
    figure = Figure(figsize=(14, 8.4), dpi=130, layout="constrained")
    (accuracy, numbers), (tightness, words) = figure.subplots(2, 2)
    draw_curves(accuracy, rows, "numbers", "accuracy")
    accuracy.set_title("Numbers: a verifier could judge, only GRPO may ask it", loc="left")
    draw_curves(numbers, rows, "numbers", "nll_L4")
    numbers.set_title("Numbers: −L₄, bound on −log π(a*|x), nats", loc="left")
    draw_bounds(tightness, rows)
    tightness.set_title("Numbers, at the end: −Lₙ, tighter with more thoughts", loc="left")
    draw_curves(words, rows, "words", "nll_L4")
    words.set_title("Words: no verifier, −L₄, nats", loc="left")
    accuracy.legend(frameon=False, ncols=2)
    words.legend(frameon=False)
    tightness.legend(frameon=False, ncols=2)
    for axes in (accuracy, numbers, tightness, words):
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


def draw_curves(axes: Axes, rows: Sequence[Row], task: str, name: str) -> None:
    """Mean over seeds with its standard error, from the start that all share."""
    start = [row[name] for row in rows if row["task"] == task and row["method"] == "start"]
    for method in COLOURS:
        own = [row for row in rows if (row["task"], row["method"]) == (task, method)]
        if method == "start" or not own:
            continue
        steps = sorted({row["step"] for row in own})
        values = [start, *([row[name] for row in own if row["step"] == s] for s in steps)]
        means, errors = zip(*map(mean_and_error, values), strict=True)
        axes.errorbar(
            [0, *steps],
            means,
            yerr=[0.0 if math.isnan(error) else error for error in errors],
            color=COLOURS[method],
            label=method,
            marker="o",
            markersize=4,
            capsize=2,
            linestyle="--" if method == "sft" else "-",
        )
    axes.set_xlabel("step")


def draw_bounds(axes: Axes, rows: Sequence[Row]) -> None:
    """−L₁ … −L₈ of each policy; a flat line needs no luck in its thoughts."""
    for method in COLOURS:
        ends = ends_of(rows, "numbers", method)
        if not ends:
            continue
        sizes = [n for n in (1, 2, 4, 8) if f"nll_L{n}" in ends[0]]
        bounds = [mean_and_error([row[f"nll_L{n}"] for row in ends])[0] for n in sizes]
        axes.plot(sizes, bounds, color=COLOURS[method], marker="o", markersize=4, label=method)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda n, _: f"{n:g}")
    axes.set_xlabel("n, thoughts in the bound")
