"""Figures of what trainers write into their completions tables."""

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from trl_ext.completions import completion_texts

KEPT, LOST = "#0072B2", "#D55E00"  # which the colour-blind can tell apart
MOST_PANELS = 50
LONGEST = 90  # characters that fit on a line


def draw_step_values(
    completions: Sequence[Any],
    values: Sequence[Sequence[float | None]],
    lost_at_step: Sequence[float | None],
    lost_step: Sequence[str | None],
) -> Figure:
    """Draws a panel per completion: the chance of success along its steps, and where it fell most.

    The arguments are columns of the completions table of `VinePPOTrainer` with `log_values=True`.

    Args:
        completions: texts or lists of messages, 1 to 50; their beginnings title the panels.
        values: V in front of each step, then the reward; None where unscorable.
        lost_at_step: number of the step with the lowest advantage; None or NaN where none fell.
        lost_step: its text.

    Returns:
        The figure, not yet saved.

    Raises:
        ValueError: no completions or too many, or columns of different lengths.
    """
    _check(completions, values, lost_at_step, lost_step)
    size = (7.0, 1.9 * len(completions))
    figure = Figure(figsize=size, dpi=130, layout="constrained")
    panels = figure.subplots(len(completions), 1, sharey=True, squeeze=False)[:, 0]
    texts = completion_texts(
        [said if isinstance(said, str) else list(said) for said in completions]
    )
    rows = zip(panels, texts, values, lost_at_step, lost_step, strict=True)
    for axes, text, along, lost, said in rows:
        known = lost is not None and not math.isnan(lost)
        _draw(axes, along, int(lost) if known else None, str(said))  # type: ignore[arg-type]
        axes.set_title(_line(text), loc="left", fontsize=9, parse_math=False)
    panels[-1].set_xlabel("steps taken; the last point is the reward")
    return figure


def _check(completions: Sequence, *columns: Sequence) -> None:
    names = ("completions", "values", "lost_at_step", "lost_step")
    lengths = dict(zip(names, map(len, (completions, *columns)), strict=True))
    if len(set(lengths.values())) > 1:
        told = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise ValueError(f"the columns have unequal lengths: {told}. Give columns of one table.")
    if not 1 <= len(completions) <= MOST_PANELS:
        raise ValueError(
            f"completions has {len(completions)} rows, each a panel. Give 1 to {MOST_PANELS} of a "
            "table's rows."
        )


def _draw(axes: Axes, along: Sequence[float | None], lost: int | None, said: str) -> None:
    heights = [math.nan if value is None else value for value in along]
    axes.plot(range(len(heights)), heights, color=KEPT, marker="o", markersize=4)
    if lost is not None:
        # A step whose values are missing was lost with its neighbours.
        known = [step for step, height in enumerate(heights) if not math.isnan(height)]
        begin = max(step for step in known if step <= lost)
        end = min(step for step in known if step > lost)
        axes.plot([begin, end], [heights[begin], heights[end]], color=LOST, marker="o", linewidth=2)
        axes.annotate(
            _line(said),
            (end, heights[end]),
            xytext=(6, 6),
            textcoords="offset points",
            color=LOST,
            fontsize=9,
            parse_math=False,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
        )
    axes.set_xticks(range(len(heights)))
    axes.set_ylabel("value")
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _line(text: str) -> str:
    """The beginning of a text, in one line."""
    line = text.strip().replace("\n", " ⏎ ")
    return f"{line[:LONGEST]} …" if len(line) > LONGEST else line
