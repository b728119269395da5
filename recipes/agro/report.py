"""What the studies show: tables on the screen, curves as PNGs."""

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from methods import BETA, OFFLINE, ONLINE
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from tabular import MODES, RULES

from trl_ext.studies import over_seeds

# Okabe and Ito's palette, which the colour-blind can tell apart.
NAMES = {
    "agro": ("AGRO", "#0072B2"),
    "agro_centred": ("AGRO, plain mean", "#56B4E9"),
    "policy_gradient": ("policy gradient + KL", "#D55E00"),
    "ratio": ("... with ratio", "#E69F00"),
    "dpo": ("DPO", "#009E73"),
    "dpo_better": ("DPO, better one", "#000000"),
    "grpo": ("GRPO", "#D55E00"),
    "grpo_old": ("GRPO with ratio", "#E69F00"),
    "topr": ("TOPR", "#CC79A7"),
    "agro_on": ("AGRO", "#0072B2"),
    "grpo_on": ("GRPO", "#D55E00"),
    "rloo_on": ("RLOO", "#000000"),
}
LEAST_KL = 1e-12  # below, rounding speaks
TITLES = {"expected": "Expected gradient", "sampled": "Eight sampled pairs per step"}
Row = dict[str, Any]


def report_tabular(rows: Sequence[Row], folder: Path, console: Console) -> None:
    """The table of final KLs, and `tabular.png`."""
    last, seeds = max(row["step"] for row in rows), seeds_of(rows)
    title = f"KL(π‖π*) after {last} steps, mean over prompts; ± over seeds {seeds}"
    table = Table(title=title, title_justify="left", box=SIMPLE)
    for name in ("rule", *(name for mode in MODES for name in (mode, "rate")), "pull at π*"):
        table.add_column(name, justify="left" if name == "rule" else "right")
    for rule in RULES:
        cells = []
        for mode in MODES:
            rate = best_rate(rows, rule, mode)
            final = [row["kl"] for row in curve(rows, rule, mode, rate) if row["step"] == last]
            small = max(final) < LEAST_KL
            cells += [f"< {LEAST_KL:g}" if small else over_seeds(final, ".1e"), f"{rate:g}"]
        pull = max(row["pull"] for row in rows if row["rule"] == rule and "pull" in row)
        table.add_row(NAMES[rule][0], *cells, "0" if pull < LEAST_KL else f"{pull:.2f}")
    console.print(table)
    console.print(f"Figure: {draw_tabular(rows, folder / 'tabular.png')}")


def best_rate(rows: Sequence[Row], rule: str, mode: str) -> float:
    """The rate of the lowest KL at the end; a plain mean is to be compared at AGRO's."""
    rule, last = "agro" if rule == "agro_centred" else rule, max(row["step"] for row in rows)
    final = [r for r in rows if (r["rule"], r["mode"], r["step"]) == (rule, mode, last)]
    rates = sorted({row["rate"] for row in final})
    return min(rates, key=lambda rate: sum(max(r["kl"], 0) for r in final if r["rate"] == rate))


def curve(rows: Iterable[Row], rule: str, mode: str, rate: float) -> list[Row]:
    wanted = (rule, mode, rate)
    return [row for row in rows if (row["rule"], row["mode"], row["rate"]) == wanted]


def draw_tabular(rows: Sequence[Row], path: Path) -> Path:
    figure, panels = canvas(len(MODES))
    for axes, mode in zip(panels, MODES, strict=True):
        for rule in RULES:
            points = curve(rows, rule, mode, best_rate(rows, rule, mode))
            steps = sorted({row["step"] for row in points if row["step"]})
            lines = [
                [max(r["kl"], LEAST_KL) for r in points if r["seed"] == s and r["step"]]
                for s in seeds_of(rows)
            ]
            draw_mean(axes, steps, lines, *NAMES[rule], dashed=rule == "agro_centred")
        axes.set(xscale="log", yscale="log", xlabel="step", title=TITLES[mode])
        axes.set_ylim(LEAST_KL, 10)
    panels[0].set_ylabel("KL(π‖π*), nats, mean over prompts")
    panels[0].legend(frameon=False, loc="lower left")
    return saved(figure, path)


def report_task(rows: Sequence[Row], folder: Path, console: Console) -> None:
    """The table of both kinds of data, differences seed by seed, and `task.png`."""
    last, seeds = max(row["step"] for row in rows), seeds_of(rows)
    title = f"Held-out prompts after {last} steps; ± over seeds {seeds}"
    table = Table(title=title, title_justify="left", box=SIMPLE)
    for name in ("method", "data", "rate", "accuracy", "KL, nats", f"accuracy − {BETA:g} KL"):
        table.add_column(name, justify="left" if name in ("method", "data") else "right")
    for method in ("start", *OFFLINE, *ONLINE):
        final = final_rows(rows, method)
        data = {"start": ""}.get(method, "fixed" if method in OFFLINE else "samples")
        cells = [over_seeds([f(row) for row in final]) for f in (accuracy, kl, objective)]
        name = "start (SFT)" if method == "start" else NAMES[method][0]
        table.add_row(name, data, f"{final[0]['rate']:g}", *cells)
    console.print(table)
    for ours, others in (("agro", OFFLINE), ("agro_on", ONLINE)):
        for other in others[1:]:
            pairs = zip(final_rows(rows, ours), final_rows(rows, other), strict=True)
            gains = [objective(a) - objective(b) for a, b in pairs]
            data = "fixed data" if ours == "agro" else "samples"
            console.print(
                f"AGRO − {NAMES[other][0]}, {data}, accuracy − β KL: {over_seeds(gains, '+.3f')}"
            )
    console.print(f"Figure: {draw_task(rows, folder / 'task.png')}")


def report_sweep(rows: Sequence[Row], console: Console) -> None:
    """accuracy − β KL at the end, for each method and rate."""
    rates = sorted({row["rate"] for row in rows} - {0.0})
    title = f"Sweep on seed {rows[0]['seed']}: accuracy − {BETA:g} KL at the end"
    table = Table(title=title, title_justify="left", box=SIMPLE)
    for name in ("method", *(f"{rate:g}" for rate in rates)):
        table.add_column(name, justify="left" if name == "method" else "right")
    last = max(row["step"] for row in rows)
    for method in (*OFFLINE, *ONLINE):
        found = {
            r["rate"]: objective(r) for r in rows if (r["method"], r["step"]) == (method, last)
        }
        best = max(found.values())
        cells = [f"[bold]{v:.3f}" if v == best else f"{v:.3f}" for _, v in sorted(found.items())]
        table.add_row(method, *cells)
    console.print(table)


def accuracy(row: Row) -> float:
    return row["accuracy"]


def kl(row: Row) -> float:
    return row["kl"]


def objective(row: Row) -> float:
    """What all methods but TOPR are after."""
    return row["accuracy"] - BETA * row["kl"]


def final_rows(rows: Iterable[Row], method: str) -> list[Row]:
    """The last measured point of each seed, seeds in order."""
    last: dict[int, Row] = {}
    for row in sorted((r for r in rows if r["method"] == method), key=lambda r: r["step"]):
        last[row["seed"]] = row
    return [last[seed] for seed in sorted(last)]


def draw_task(rows: Sequence[Row], path: Path) -> Path:
    """Accuracy against steps for both kinds of data, and against the KL for all."""
    figure, (fixed, samples, front) = canvas(3)
    for axes, methods in ((fixed, OFFLINE), (samples, ONLINE)):
        for method in methods:
            steps, lines = lines_of(rows, method, accuracy)
            draw_mean(axes, steps, lines, *NAMES[method], dashed=method == "rloo_on")
        axes.set(xlabel="step", ylim=(0, 1))
        axes.legend(frameon=False, loc="upper left")
    fixed.set(ylabel="accuracy, held-out prompts", title="Fixed data of the start policy")
    samples.set(title="Its own samples")
    for method in (*OFFLINE, *ONLINE):
        _, right = lines_of(rows, method, accuracy)
        _, moved = lines_of(rows, method, kl)
        x, y = (list(map(statistics.mean, zip(*v, strict=True))) for v in (moved, right))
        label, colour = NAMES[method]
        filled = method in OFFLINE
        style = {"linestyle": "-" if filled else "--", "mfc": colour if filled else "white"}
        front.plot(x, y, marker="o", ms=4, color=colour, label=label, **style)
    front.set(xlabel="KL to the start policy, nats", title="Front: filled fixed data, open samples")
    front.set_xlim(left=0)
    front.set_ylim(0, 1)
    return saved(figure, path)


def lines_of(rows: Sequence[Row], method: str, figure: Any) -> tuple[list[int], list[list[float]]]:
    """Measured steps, and for each seed the figure there, from the start on."""
    found = [row for row in rows if row["method"] in ("start", method)]
    steps = sorted({row["step"] for row in found})
    value = {(row["seed"], row["step"]): figure(row) for row in found}
    return steps, [[value[seed, step] for step in steps] for seed in seeds_of(rows)]


def draw_mean(
    axes: Axes,
    steps: list[int],
    lines: list[list[float]],
    label: str,
    colour: str,
    dashed: bool = False,
) -> None:
    """The mean over seeds as a thick line, each seed as a thin one."""
    mean = [statistics.mean(values) for values in zip(*lines, strict=True)]
    axes.plot(steps, mean, "--" if dashed else "-", color=colour, label=label)
    for line in lines if len(lines) > 1 else ():
        axes.plot(steps, line, color=colour, linewidth=0.6, alpha=0.4)


def canvas(panels: int) -> tuple[Figure, Sequence[Axes]]:
    matplotlib.use("Agg")
    figure = Figure(figsize=(4.6 * panels, 4.4), dpi=150, layout="constrained")
    found = figure.subplots(1, panels)
    for axes in found:
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, found


def saved(figure: Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


def seeds_of(rows: Iterable[Row]) -> list[int]:
    return sorted({row["seed"] for row in rows})
