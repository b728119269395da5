"""What the study of sources shows: a table on the screen, and curves as a PNG."""

import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
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
COLOURS = {
    "online": "#0072B2",
    "offline": "#D55E00",
    "ordered": "#56B4E9",
    "blocks": "#009E73",
    "shuffled": "#CC79A7",
    "driven": "#000000",
}
EQUAL_KL = (2.0, 4.0, 8.0)  # nats per story, at which sources are compared
Row = dict[str, Any]


def report(rows: Sequence[Row], folder: Path, console: Console | None = None) -> Path:
    """Prints the table and draws the figure `folder/sources.png`."""
    console = console or Console()
    console.print(table_of(rows))
    console.print(verdict(rows))
    path = draw(rows, folder / "sources.png")
    console.print(f"Figure: {path}")
    return path


def table_of(rows: Sequence[Row]) -> Table:
    """Each source at its best, at its end and at equal KL; mean ± standard error over seeds.

    The last two rows are of the policy as a classifier of held-out pairs, at the end: how often it
    is right, and how far the chosen stories' log-probability has moved from SFT's.
    """
    seeds, sources = seeds_of(rows), sources_of(rows)
    title = f"{last_step(rows)} steps, gold win rate unless named; ± over seeds {seeds}"
    table = Table(title=title, title_justify="left", box=SIMPLE)
    figures: dict[str, Callable[[list[Row]], float | None]] = {
        "highest": lambda curve: best(curve)["win_rate"],
        "  KL there": lambda curve: best(curve)["kl"],
        "at the end": lambda curve: curve[-1]["win_rate"],
        "  KL then": lambda curve: curve[-1]["kl"],
        **{f"at KL {kl:g}": lambda curve, kl=kl: at_kl(curve, kl) for kl in EQUAL_KL},
        "  by the proxy": lambda curve: curve[-1]["proxy_win_rate"],
        "accuracy": lambda curve: curve[-1]["accuracy"],
        "log π/SFT": lambda curve: curve[-1]["chosen_log_ratio"],
    }
    table.add_column()
    for source in sources:
        table.add_column(source, justify="right")
    for name, figure in figures.items():
        curves = {s: [curve_of(rows, seed, s) for seed in seeds] for s in sources}
        table.add_row(name, *(over_seeds([figure(c) for c in curves[s]]) for s in sources))
    return table


def verdict(rows: Sequence[Row]) -> str:
    """Whether the ordered replay is the online run."""
    checks = {row["seed"]: row["equals_online"] for row in rows if "equals_online" in row}
    failed = [str(seed) for seed, equal in checks.items() if not equal]
    if failed:
        return f"[red]ordered replay differs from online: seeds {', '.join(failed)}"
    return f"[green]ordered replay has online's parameters to the bit: seeds {[*checks]}"


def last_step(rows: Iterable[Row]) -> int:
    return max(row["step"] for row in rows)


def seeds_of(rows: Iterable[Row]) -> list[int]:
    return sorted({row["seed"] for row in rows})


def sources_of(rows: Iterable[Row]) -> list[str]:
    present = {row["source"] for row in rows}
    return [source for source in COLOURS if source in present]


def curve_of(rows: Iterable[Row], seed: int, source: str) -> list[Row]:
    """The measured points of one run, the SFT policy first."""
    points = [row for row in rows if row["seed"] == seed and row["source"] in ("start", source)]
    return sorted(points, key=lambda row: row["step"])


def best(curve: list[Row]) -> Row:
    return max(curve, key=lambda row: row["win_rate"])


def at_kl(curve: list[Row], kl: float) -> float | None:
    """Win rate at a KL, between the measured points linear in log KL; `None` if out of reach."""
    points = sorted((math.log(row["kl"]), row["win_rate"]) for row in curve if row["kl"] > 0)
    wanted = math.log(kl)
    for (x, win), (x_next, win_next) in itertools.pairwise(points):
        if x <= wanted <= x_next:
            share = (wanted - x) / (x_next - x) if x_next > x else 0.0
            return win + share * (win_next - win)
    return None


def over_seeds(values: Sequence[float | None]) -> str:
    """Mean ± standard error over the seeds that have the value, and how many if not all have."""
    known = [value for value in values if value is not None]
    text = studies.over_seeds(known, ".2f")
    return text if not known or len(known) == len(values) else f"{text} ({len(known)})"


def draw(rows: Sequence[Row], path: Path) -> Path:
    """Over-optimisation, the proxy's view of it, and classification against generation."""
    matplotlib.use("Agg")
    figure = Figure(figsize=(13.5, 4.6), dpi=150, layout="constrained")
    gold, proxy, classes = figure.subplots(1, 3)
    for axes, name in ((gold, "win_rate"), (proxy, "proxy_win_rate")):
        draw_against_kl(axes, rows, name)
        axes.set_xlabel("KL to SFT, nats per story")
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda kl, _: f"{kl:g}")
        axes.set_ylim(0, 1)
    gold.set_title("What it is worth: gold reward", loc="left")
    gold.set_ylabel("win rate against held-out chosen stories")
    proxy.set_title("What it was trained on: learned proxy", loc="left")
    draw_classes(classes, rows)
    gold.legend(frameon=False, loc="upper left", ncols=2)
    for axes in (gold, proxy, classes):
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


def draw_against_kl(axes: Axes, rows: Sequence[Row], name: str) -> None:
    """Mean over seeds at each step as a line, each seed's points faint behind it."""
    seeds = seeds_of(rows)
    start = statistics.mean(row[name] for row in rows if row["source"] == "start")
    axes.axhline(start, color="#777777", linestyle=":", linewidth=1, label="SFT")
    for source in sources_of(rows):
        curves = [curve_of(rows, seed, source)[1:] for seed in seeds]
        kl = [statistics.mean(row["kl"] for row in step) for step in zip(*curves, strict=True)]
        value = [statistics.mean(row[name] for row in step) for step in zip(*curves, strict=True)]
        # beneath, for the ordered replay lies on the online run
        style = {"linewidth": 6, "alpha": 0.35} if source == "ordered" else {"marker": "o", "ms": 4}
        axes.plot(kl, value, color=COLOURS[source], label=source, **style)
        if len(seeds) > 1 and source != "ordered":
            for curve in curves:
                axes.plot(
                    [row["kl"] for row in curve],
                    [row[name] for row in curve],
                    color=COLOURS[source],
                    linewidth=0.6,
                    alpha=0.35,
                )


def draw_classes(axes: Axes, rows: Sequence[Row]) -> None:
    """One point per measured policy, larger the later in training."""
    last = last_step(rows)
    for source in sources_of(rows):
        if source == "ordered":
            continue
        points = [row for row in rows if row["source"] == source]
        axes.scatter(
            [row["accuracy"] for row in points],
            [row["win_rate"] for row in points],
            s=[12 + 60 * row["step"] / last for row in points],
            color=COLOURS[source],
            alpha=0.7,
            linewidth=0,
        )
    axes.set_xlabel("accuracy as a classifier of held-out pairs")
    axes.set_ylabel("gold win rate of what it writes")
    axes.set_title("Telling is not writing (later is larger)", loc="left")
