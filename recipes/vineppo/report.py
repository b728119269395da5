"""What the study shows: tables on the screen, differences seed by seed, and two figures as PNGs."""

import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import pyarrow.parquet
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from trl_ext import studies
from trl_ext.plots import draw_step_values

# Okabe and Ito's palette, which the colour-blind can tell apart.
NAMES = {
    "grpo": ("GRPO", "#D55E00"),
    "dr-grpo": ("Dr. GRPO", "#E69F00"),
    "rloo": ("RLOO", "#000000"),
    "vine-1": ("VinePPO, K = 1", "#56B4E9"),
    "vine-3": ("VinePPO, K = 3", "#009E73"),
    "vine-9": ("VinePPO, K = 9", "#0072B2"),
}
MOST_SHOWN = 5  # completions whose loss is drawn
Row = dict[str, Any]


def report(rows: Sequence[Row], folder: Path, console: Console | None = None) -> list[Path]:
    """Prints the table and differences, and draws `vineppo.png` and `lost_steps.png` in `folder`.

    Without `lost_steps.png` where the start policy lost no solution, because it had none.
    """
    console = console or Console()
    console.print(table_of(rows))
    if not swept(rows):
        console.print(*claims(rows), sep="\n", highlight=False)
    figures = [draw(best_rates(rows), folder / "vineppo.png")]
    losses = lost_solutions(completions_of(folder, seeds_of(rows)[0]))
    if losses:
        figures.append(draw_losses(losses, folder / "lost_steps.png"))
    console.print(f"Figures: {', '.join(map(str, figures))}")
    return figures


def table_of(rows: Sequence[Row]) -> Table:
    """Each method, and where several were tried each rate; mean ± standard error over seeds."""
    steps, times = shared_step(rows), equal_times(rows)
    start = over_seeds([row["accuracy"] for row in rows if row["method"] == "start"])
    table = Table(
        title=f"Held-out accuracy, {start} at the start; ± over seeds {seeds_of(rows)}",
        title_justify="left",
        box=SIMPLE,
    )
    time = f"after {statistics.mean(times.values()):.0f} CPU s"
    for name in ("", "rate", f"after {steps} steps", "their CPU s", "branching", time, "by then"):
        table.add_column(name, justify="right" if name else "left")
    for method, rate in runs(rows):
        curves = curves_of(rows, method, rate)
        ends = [point_at(curve, steps) for curve in curves.values()]
        cells = [
            over_seeds([row["accuracy"] for row in ends]),
            over_seeds([row["seconds"] for row in ends], ".1f"),
            f"{statistics.mean(row['branching'] for row in ends):.0%}",
            over_seeds([at(curve, "seconds", times[s]) for s, curve in curves.items()]),
            over_seeds([at(c, "seconds", times[s], "step") for s, c in curves.items()], ".0f"),
        ]
        table.add_row(NAMES[method][0], f"{rate:g}", *cells[:4], f"{cells[4]} steps")
    return table


def runs(rows: Iterable[Row]) -> list[tuple[str, float]]:
    """Method and rate of each run, in the order of `NAMES`."""
    found = {(row["method"], row["rate"]) for row in rows if row["method"] != "start"}
    return sorted(found, key=lambda run: (list(NAMES).index(run[0]), run[1]))


def seeds_of(rows: Iterable[Row]) -> list[int]:
    return sorted({row["seed"] for row in rows})


def curves_of(rows: Iterable[Row], method: str, rate: float | None = None) -> dict[int, list[Row]]:
    """The points of each seed, in their order, from the start that all methods share."""
    curves: dict[int, list[Row]] = {}
    for row in sorted(rows, key=lambda row: (row["seed"], row["step"])):
        own = row["method"] == method and rate in (None, row["rate"])
        if own or row["method"] == "start":
            curves.setdefault(row["seed"], []).append(row)
    return {seed: curve for seed, curve in curves.items() if len(curve) > 1}


def shared_step(rows: Sequence[Row]) -> int:
    """The last step at which every run was measured."""
    steps = [
        {row["step"] for row in rows if (row["method"], row["rate"]) == run} for run in runs(rows)
    ]
    return max(set.intersection(*steps))


def equal_times(rows: Sequence[Row]) -> dict[int, float]:
    """For each seed the time that all of its runs lasted, in CPU seconds."""
    curves = [curves_of(rows, *run) for run in runs(rows)]
    return {
        seed: min(curve[seed][-1]["seconds"] for curve in curves if seed in curve)
        for seed in seeds_of(rows)
    }


def point_at(curve: Iterable[Row], step: int) -> Row:
    """The point that was measured after this step."""
    return next(row for row in curve if row["step"] == step)


def at(curve: Sequence[Row], along: str, place: float, name: str = "accuracy") -> float:
    """What `name` is where `along` comes to `place`, on the straight line between two points.

    NaN behind the last point.
    """
    for before, after in itertools.pairwise(curve):
        if before[along] <= place <= after[along]:
            share = (place - before[along]) / (after[along] - before[along])
            return before[name] + share * (after[name] - before[name])
    return math.nan


def reached(curve: Sequence[Row], accuracy: float, along: str) -> float:
    """Where `along` the curve the accuracy is reached first; NaN where it never is."""
    for before, after in itertools.pairwise(curve):
        if before["accuracy"] >= accuracy:
            return before[along]
        if after["accuracy"] >= accuracy:
            share = (accuracy - before["accuracy"]) / (after["accuracy"] - before["accuracy"])
            return before[along] + share * (after[along] - before[along])
    return math.nan


def claims(rows: Sequence[Row]) -> list[str]:
    """What the paper says is more, seed by seed, and what another method needs to get there."""
    steps, times, best = shared_step(rows), equal_times(rows), curves_of(rows, "vine-9")
    said = []
    for other in ("grpo", "dr-grpo", "rloo", "vine-3", "vine-1"):
        theirs = curves_of(rows, other)
        by_steps = difference(best, theirs, lambda curve, _: at(curve, "step", steps))
        by_time = difference(best, theirs, lambda curve, s: at(curve, "seconds", times[s]))
        said.append(
            f"VinePPO, K = 9 − {NAMES[other][0]}, accuracy: {by_steps} after {steps} steps, "
            f"{by_time} after equal time"
        )
    for other in ("grpo", "dr-grpo", "rloo"):
        factors = [
            over_seeds(factors_to_reach(best, curves_of(rows, other), steps, along), ".2f")
            for along in ("step", "seconds")
        ]
        said.append(
            f"{NAMES[other][0]} comes to what VinePPO, K = 9 has after {steps} steps in "
            f"{factors[0]} times the steps, {factors[1]} times the CPU time"
        )
    return said


def difference(
    ours: dict[int, list[Row]],
    theirs: dict[int, list[Row]],
    figure: Callable[[list[Row], int], float],
) -> str:
    """Mean ± standard error of a figure's difference, each seed with itself."""
    return over_seeds([figure(ours[s], s) - figure(theirs[s], s) for s in ours], "+.3f")


def factors_to_reach(
    ours: dict[int, list[Row]], theirs: dict[int, list[Row]], steps: int, along: str
) -> list[float]:
    """For each seed, what they need to come to our accuracy after `steps`, over what we needed."""
    ends = {seed: point_at(curve, steps) for seed, curve in ours.items()}
    return [reached(theirs[s], end["accuracy"], along) / end[along] for s, end in ends.items()]


def over_seeds(values: Sequence[float], form: str = ".3f") -> str:
    """Mean ± standard error over seeds that have a value, and how many have not."""
    missing = sum(map(math.isnan, values))
    text = studies.over_seeds(values, form)
    return text + (f" ({missing} of {len(values)} never)" if 0 < missing < len(values) else "")


def swept(rows: Iterable[Row]) -> bool:
    found = runs(rows)
    return len(found) > len({method for method, _ in found})


def best_rates(rows: Sequence[Row]) -> list[Row]:
    """The start, and the rows of each method's best rate after the steps that all take."""
    steps, kept = shared_step(rows), [row for row in rows if row["method"] == "start"]
    for method in dict.fromkeys(method for method, _ in runs(rows)):
        own = [row for row in rows if row["method"] == method]
        worth = {
            rate: statistics.mean(
                row["accuracy"] for row in own if (row["rate"], row["step"]) == (rate, steps)
            )
            for rate in dict.fromkeys(row["rate"] for row in own)
        }
        kept += [row for row in own if row["rate"] == max(worth, key=worth.__getitem__)]
    return kept


def draw(rows: Sequence[Row], path: Path) -> Path:
    """Accuracy against gradient steps that all methods take, and against the CPU time of all."""
    matplotlib.use("Agg")
    figure = Figure(figsize=(12, 4.8), dpi=130, layout="constrained")
    by_steps, by_time = figure.subplots(1, 2, sharey=True)
    last = shared_step(rows)
    for method, _ in runs(rows):
        curves = curves_of(rows, method)
        steps = [row["step"] for row in next(iter(curves.values()))]
        draw_curve(by_steps, curves, [step for step in steps if step <= last], "step", method)
        draw_curve(by_time, curves, steps, "seconds", method)
    by_steps.set(xlabel="gradient steps", ylabel="held-out accuracy", ylim=(0, 1))
    by_steps.set_title("The same number of steps, prompts and completions", loc="left")
    by_time.set(xlabel="CPU seconds of training, one thread")
    by_time.set_title("The same time, in which the others take more steps", loc="left")
    by_time.legend(frameon=False, loc="lower right")
    for axes in (by_steps, by_time):
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


def draw_curve(
    axes: Axes, curves: dict[int, list[Row]], steps: Sequence[int], along: str, method: str
) -> None:
    """Mean over seeds after each of the steps, with its standard error."""
    points = [[point_at(curve, step) for curve in curves.values()] for step in steps]
    means, errors = zip(
        *(studies.mean_and_error([row["accuracy"] for row in each]) for each in points), strict=True
    )
    label, colour = NAMES[method]
    axes.errorbar(
        [statistics.mean(row[along] for row in each) for each in points],
        means,
        yerr=[0.0 if math.isnan(error) else error for error in errors],
        color=colour,
        label=label,
        marker="o",
        markersize=4,
        capsize=2,
        linestyle="-" if method.startswith("vine") else "--",
    )


def completions_of(folder: Path, seed: int) -> list[Row]:
    """The completions table that `study.look_into` had the trainer write at the start."""
    paths = sorted((folder / f"seed-{seed}" / "start" / "completions").glob("*.parquet"))
    return pyarrow.parquet.read_table(paths[-1]).to_pylist() if paths else []


def lost_solutions(table: Iterable[Row]) -> list[Row]:
    """A handful of wrong completions, those that a step cost most; each lost at another step."""
    wrong = [row for row in table if row["values"][-1] == 0.0 and row["lost_at_step"] is not None]
    found: dict[int, Row] = {}
    for row in sorted(wrong, key=loss, reverse=True):
        found.setdefault(int(row["lost_at_step"]), row)
    largest = sorted(found.values(), key=loss, reverse=True)[:MOST_SHOWN]
    return sorted(largest, key=lambda row: row["lost_at_step"])


def loss(row: Row) -> float:
    """How far the value fell at the step that lost most."""
    step = int(row["lost_at_step"])
    return row["values"][step] - row["values"][step + 1]


def draw_losses(losses: Sequence[Row], path: Path) -> Path:
    """A panel for each of these completions, its prompt before it."""
    matplotlib.use("Agg")
    texts = [f"{row['prompt'].strip()}:  {row['completion'].strip()}" for row in losses]
    columns = [[row[n] for row in losses] for n in ("values", "lost_at_step", "lost_step")]
    draw_step_values(texts, *columns).savefig(path)
    return path
