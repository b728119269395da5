"""What the study shows: the preference matrix as the paper's Table 1, and the way there."""

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

NAMES = {
    "sft": "SFT",
    "single_turn": "single-turn RLHF",
    "rlhf": "multi-turn RLHF",
    "mtpo_learned": "MTPO, learned reward",
    "mtpo": "MTPO",
    "mtpo_tau": "MTPO-τ",
}
# Okabe and Ito's palette, which the colour-blind can tell apart.
COLOURS = {
    "single_turn": "#D55E00",
    "rlhf": "#E69F00",
    "mtpo_learned": "#009E73",
    "mtpo": "#0072B2",
    "mtpo_tau": "#CC79A7",
}
# Table 1 of the paper: the row beats the column.
PAPER = {
    ("single_turn", "sft"): 0.836,
    ("rlhf", "sft"): 0.788,
    ("mtpo", "sft"): 0.909,
    ("mtpo", "rlhf"): 0.567,
    ("mtpo_tau", "sft"): 0.907,
    ("mtpo_tau", "rlhf"): 0.588,
    ("mtpo_tau", "mtpo"): 0.561,
}
Row = dict[str, Any]
Cell = tuple[float, float]  # a rate and its standard error


def report(figures: dict[str, list[Row]], folder: Path, console: Console) -> Path:
    """Prints three tables and draws the figure `folder/education_dialogue.png`."""
    console.print(matrix_table(figures["matches"]))
    console.print(claims_table(figures["matches"]))
    console.print(teaching_table(figures["teaching"]))
    path = draw(figures, folder / "education_dialogue.png")
    console.print(f"Figure: {path}")
    return path


def policies(matches: Iterable[Row]) -> list[str]:
    present = {match["row"] for match in matches}
    return [policy for policy in NAMES if policy in present]


def rate(matches: Iterable[Row], row: str, column: str) -> Cell:
    """Mean over seeds with its standard error; with one seed that over its lessons."""
    found = [match for match in matches if (match["row"], match["column"]) == (row, column)]
    wins = [match["win_rate"] for match in found]
    return (wins[0], found[0]["standard_error"]) if len(wins) == 1 else mean_and_error(wins)


def shown(cell: Cell) -> str:
    return f"{cell[0]:.3f} ± {cell[1]:.3f}"


def over(matches: Sequence[Row]) -> str:
    seeds = sorted({match["seed"] for match in matches})
    return f"over seeds {seeds}" if len(seeds) > 1 else f"over lessons, seed {seeds[0]}"


def matrix_table(matches: Sequence[Row]) -> Table:
    """The rate at which the row beats the column."""
    title = f"The row beats the column; ± standard error {over(matches)}"
    table = Table(title=title, title_justify="left", box=SIMPLE)
    table.add_column()
    for column in policies(matches):
        table.add_column(NAMES[column], justify="right")
    for row in policies(matches):
        cells = (
            "" if row == column else shown(rate(matches, row, column))
            for column in policies(matches)
        )
        table.add_row(NAMES[row], *cells)
    return table


def claims_table(matches: Sequence[Row]) -> Table:
    """The paper's Table 1 beside what was seen."""
    table = Table(title="Beside the paper's Table 1", title_justify="left", box=SIMPLE)
    for name in ("", "paper", "here"):
        table.add_column(name, justify="left" if not name else "right")
    for (row, column), told in PAPER.items():
        seen = shown(rate(matches, row, column))
        table.add_row(f"{NAMES[row]} beats {NAMES[column]}", f"{told:.3f}", seen)
    return table


def teaching_table(teaching: Sequence[Row]) -> Table:
    """What became of the lessons: three things are to be learned, in three messages at best."""
    table = Table(title="Means over conversations", title_justify="left", box=SIMPLE)
    names = ("learned", "delighted", "messages")
    for name in ("", *names):
        table.add_column(name, justify="left" if not name else "right")
    for policy in [name for name in NAMES if any(row["policy"] == name for row in teaching)]:
        rows = [row for row in teaching if row["policy"] == policy]
        cells = [over_seeds([row[name] for row in rows], ".2f") for name in names]
        table.add_row(NAMES[policy], *cells)
    return table


def sweep_table(rows: Sequence[Row]) -> Table:
    """Win rate against SFT at the end, for each method and rate."""
    rates, last = sorted({row["rate"] for row in rows}), max(row["step"] for row in rows)
    title = f"Win rate against SFT, seed {rows[0]['seed']}"
    table = Table("", *map("{:g}".format, rates), title=title, title_justify="left", box=SIMPLE)
    found = {(r["method"], r["rate"]): r["win_rate"] for r in rows if r["step"] == last}
    for method in COLOURS:
        table.add_row(NAMES[method], *(f"{found[method, rate]:.3f}" for rate in rates))
    return table


def draw(figures: dict[str, list[Row]], path: Path) -> Path:
    """The preference matrix, and the win rate against SFT while learning."""
    matplotlib.use("Agg")
    figure = Figure(figsize=(13.5, 5.4), dpi=150, layout="constrained")
    matrix, curves = figure.subplots(1, 2)
    draw_matrix(matrix, figures["matches"])
    draw_curves(curves, figures["curves"])
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


def draw_matrix(axes: Axes, matches: Sequence[Row]) -> None:
    names = policies(matches)
    cells = [[(0.5, 0.0) if r == c else rate(matches, r, c) for c in names] for r in names]
    axes.imshow([[mean for mean, _ in row] for row in cells], cmap="PuOr_r", vmin=0, vmax=1)
    for i, row in enumerate(cells):
        for j, (mean, error) in enumerate(row):
            text = "" if i == j else f"{mean:.2f}\n±{error:.2f}"
            dark = abs(mean - 0.5) > 0.3
            colour = "white" if dark else "black"
            axes.text(j, i, text, ha="center", va="center", fontsize=9, color=colour)
    labels = [NAMES[name].replace(" RLHF", "\nRLHF").replace(", ", ",\n") for name in names]
    axes.set_xticks(range(len(names)), labels, fontsize=8)
    axes.set_yticks(range(len(names)), labels, fontsize=8)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(f"The row beats the column; ± {over(matches)}", loc="left", fontsize=11)


def draw_curves(axes: Axes, curves: Sequence[Row]) -> None:
    """Means over seeds with their standard error as a band."""
    for method, colour in COLOURS.items():
        steps = sorted({row["step"] for row in curves if row["method"] == method})
        cells = [(0.5, 0.0), *(at(curves, method, step) for step in steps)]
        mean = [cell[0] for cell in cells]
        axes.plot([0, *steps], mean, color=colour, marker="o", ms=4, label=NAMES[method])
        lower, upper = ([m + sign * error for m, error in cells] for sign in (-1, 1))
        axes.fill_between([0, *steps], lower, upper, color=colour, alpha=0.15, linewidth=0)
    axes.axhline(0.5, color="#777777", linestyle=":", linewidth=1)
    axes.set_ylim(0.2, 1.0)
    axes.set_xlabel("optimizer steps")
    axes.set_ylabel("win rate against SFT, held-out lessons")
    axes.set_title("While learning", loc="left", fontsize=11)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper left", fontsize=9)


def at(curves: Sequence[Row], method: str, step: int) -> Cell:
    """Win rate against SFT after a step: mean over seeds and its standard error, 0 for one seed."""
    wins = [row["win_rate"] for row in curves if (row["method"], row["step"]) == (method, step)]
    mean, error = mean_and_error(wins)
    return mean, error if len(wins) > 1 else 0.0
