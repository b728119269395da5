"""Tables and figures of the study of asynchrony."""

import math
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from trl_ext import studies

# Okabe and Ito's palette, which the colour-blind can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#E69F00", "#009E73")
MARKERS = ("o", "s", "^", "D")
LABELS = {
    "win_rate": "gold win rate",
    "kl": "KL to the SFT policy, nats",
    "sft_perplexity": "SFT perplexity of its samples",
}
MEASURES = ("win rate, %", "gold", "proxy", "KL, nats", "SFT perplexity")
Row = dict[str, Any]


def report(rows: list[Row], folder: Path, console: Console | None = None) -> None:
    """Prints the tables and draws the figures into `folder`."""
    console = console or Console()
    folder.mkdir(parents=True, exist_ok=True)
    for table in (staleness_table(rows), schedule_table(rows), time_table(rows)):
        console.print(table)
    for name, draw in (("staleness", draw_staleness), ("frontier", draw_frontier)):
        path = folder / f"asynchronous_{name}.png"
        draw(rows).savefig(path)
        console.print(f"Figure: {path}")


def finals(rows: list[Row], **wanted: Any) -> list[Row]:
    """The last point of each training run that has these values."""
    quality = [row for row in rows if row["part"] == "quality"]
    last = max(row["step"] for row in quality)
    return chosen([row for row in quality if row["step"] == last], **wanted)


def chosen(rows: list[Row], **wanted: Any) -> list[Row]:
    return [row for row in rows if all(row.get(name) == value for name, value in wanted.items())]


def distinct(rows: list[Row], name: str) -> list[Any]:
    return list(dict.fromkeys(row[name] for row in rows if name in row))


def mean_and_error(rows: list[Row], name: str) -> tuple[float, float]:
    """Over seeds; with one seed, the error is that over its prompts."""
    values = [row[name] for row in rows]
    if len(values) == 1:
        return values[0], rows[0][name + "_se"]
    return studies.mean_and_error(values)


def shown(rows: list[Row], name: str, scale: float = 1.0, digits: int = 1) -> str:
    mean, error = mean_and_error(rows, name)
    return f"{scale * mean:.{digits}f}±{scale * error:.{digits}f}"


def staleness_table(rows: list[Row]) -> Table:
    """Win rate, gold and proxy score, and drift for each method and N."""
    start = chosen(rows, part="start")
    over = f"{len(start)} seeds" if len(start) > 1 else "the prompts of one seed"
    title = f"N mini-batches per round, after {finals(rows)[0]['step']} steps; ± over {over}"
    table = new_table(title, "method", "N", *MEASURES)
    table.add_row("SFT policy", "", *measures(start))
    for method in distinct(rows, "method"):
        table.add_section()
        for N in sorted(distinct(finals(rows, method=method, schedule="sync"), "mini_batches")):
            found = finals(rows, method=method, schedule="sync", mini_batches=N)
            table.add_row(method, str(N), *measures(found))
    return table


def schedule_table(rows: list[Row]) -> Table:
    """The same figures for both schedules, and the difference in win rate."""
    methods = distinct(finals(rows, schedule="one_step"), "method")
    title = f"{', '.join(methods)}: both schedules at equal steps"
    table = new_table(title, "schedule", "N", *MEASURES)
    for N in sorted(distinct(finals(rows, schedule="one_step"), "mini_batches")):
        ahead = finals(rows, schedule="one_step", mini_batches=N)
        sync = finals(rows, schedule="sync", mini_batches=N, method=methods[0])
        table.add_row("sync", str(N), *measures(sync))
        table.add_row("one_step", str(N), *measures(ahead))
        table.add_row("difference", str(N), difference(ahead, sync), end_section=True)
    return table


def measures(found: list[Row]) -> tuple[str, ...]:
    """The cells of `MEASURES`."""
    return (
        shown(found, "win_rate", 100),
        shown(found, "gold", digits=2),
        shown(found, "proxy", digits=2),
        shown(found, "kl", digits=2),
        shown(found, "sft_perplexity"),
    )


def difference(ahead: list[Row], sync: list[Row]) -> str:
    """In points of win rate, seed by seed; the error of a single seed takes no account of pairs."""
    pairs = [(a, s) for a in ahead for s in sync if a["seed"] == s["seed"]]
    differences = [100 * (a["win_rate"] - s["win_rate"]) for a, s in pairs]
    mean, error = studies.mean_and_error(differences)
    if len(differences) == 1:
        error = 100 * math.hypot(*(row["win_rate_se"] for row in pairs[0]))
    return f"{mean:+.1f}±{error:.1f}"


def time_table(rows: list[Row]) -> Table:
    """Seconds of a round, and how near to the ideal overlap."""
    columns = ("threads", "round, s", "sampling", "training", "speed-up", "ideal", "reached")
    table = new_table("Time per round; sampling and training in seconds", "schedule", "N", *columns)
    timed = chosen(rows, part="time")
    for N in sorted(distinct(timed, "mini_batches")):
        sync, *others = chosen(timed, mini_batches=N)
        for row in (sync, *others):
            table.add_row(row["schedule"], str(N), threads_of(row), *times(row, sync))
        table.add_section()
    return table


def times(row: Row, sync: Row) -> tuple[str, ...]:
    """The cells of a timing run beside the synchronous one with one thread.

    One step ahead, each side's work is the round less the time for which it waited.
    """
    seconds, gain = row["round_s"], sync["round_s"] / row["round_s"]
    if row["schedule"] == "sync":
        work = (row["generation_s"], seconds - row["generation_s"])
        compared = (f"{gain:.2f}", "", "")
    else:
        work = (seconds - row["training_wait_s"], seconds - row["generation_wait_s"])
        ideal = ideal_speed_up(sync)
        compared = (f"{gain:.2f}", f"{ideal:.2f}", f"{100 * gain / ideal:.0f}%")
    return (f"{seconds:.3f}", *(f"{value:.3f}" for value in work), *compared)


def threads_of(row: Row) -> str:
    sampler = f"+{row['threads']}" if row["schedule"] == "one_step" else ""
    return f"{row['threads']}{sampler}"


def ideal_speed_up(sync: Row) -> float:
    """(t_gen + t_train) / max(t_gen, t_train), both as they are without overlap."""
    sampling = sync["generation_s"]
    return sync["round_s"] / max(sampling, sync["round_s"] - sampling)


def new_table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE, padding=0)
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left", no_wrap=True)
    return table


def draw_staleness(rows: list[Row]) -> Figure:
    """Win rate and drift against N, a line for each method; hollow: one step ahead."""
    matplotlib.use("Agg")
    figure = Figure(figsize=(13, 4.6), dpi=150, layout="constrained")
    for axes, name in zip(figure.subplots(1, 3), LABELS, strict=True):
        draw_against_N(axes, rows, name)
        tidy(axes, "N: mini-batches per round", LABELS[name])
    figure.axes[0].set_title("Every N trains on equally many samples", loc="left", fontsize=10)
    handles = figure.axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=len(handles[0]), frameon=False)
    return figure


def draw_against_N(axes: Axes, rows: list[Row], name: str) -> None:
    start, _ = mean_and_error(chosen(rows, part="start"), name)
    axes.axhline(start, color="#777777", linestyle="--", linewidth=1, label="SFT policy")
    for method, colour, marker in zip(distinct(rows, "method"), COLOURS, MARKERS, strict=False):
        for schedule, label in (("sync", method), ("one_step", f"{method}, one step ahead")):
            found = finals(rows, method=method, schedule=schedule)
            Ns = sorted(distinct(found, "mini_batches"))
            points = [mean_and_error(chosen(found, mini_batches=N), name) for N in Ns]
            axes.errorbar(
                Ns,
                [mean for mean, _ in points],
                [error for _, error in points],
                color=colour,
                marker=marker,
                ms=5,
                mfc=colour if schedule == "sync" else "white",
                linestyle="-" if schedule == "sync" else "",
                capsize=2,
                label=label if points else None,
            )
    Ns = sorted(distinct(finals(rows, schedule="sync"), "mini_batches"))
    axes.set_xscale("log", base=2)
    axes.set_xticks(Ns, [str(N) for N in Ns])


def draw_frontier(rows: list[Row]) -> Figure:
    """Win rate against KL along training, a panel for each method, a line for each N."""
    matplotlib.use("Agg")
    methods = distinct(rows, "method")
    figure = Figure(figsize=(3.4 * len(methods), 3.8), dpi=150, layout="constrained")
    panels = figure.subplots(1, len(methods), sharex=True, sharey=True, squeeze=False)[0]
    for axes, method in zip(panels, methods, strict=True):
        draw_curves(axes, rows, method)
        tidy(axes, LABELS["kl"], LABELS["win_rate"] if axes is panels[0] else "")
        axes.set_title(method, loc="left", fontsize=10)
    panels[-1].legend(frameon=False, fontsize=8, loc="lower right")
    return figure


def draw_curves(axes: Axes, rows: list[Row], method: str) -> None:
    """From the SFT policy to the end of training; each point is a mean over seeds."""
    start = chosen(rows, part="start")
    synchronous = chosen(rows, part="quality", method=method, schedule="sync")
    Ns = sorted(distinct(synchronous, "mini_batches"))
    for i, (N, marker) in enumerate(zip(Ns, MARKERS, strict=False)):
        run = chosen(synchronous, mini_batches=N)
        points = [start, *(chosen(run, step=step) for step in distinct(run, "step"))]
        kl, win = ([mean_and_error(p, name)[0] for p in points] for name in ("kl", "win_rate"))
        colour = matplotlib.colormaps["viridis"](0.9 * i / max(1, len(Ns) - 1))
        axes.plot(kl, win, color=colour, marker=marker, ms=4, label=f"N = {N}")


def tidy(axes: Axes, x_label: str, y_label: str) -> None:
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
