"""Figures of what trainers write into their completions tables."""

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

KEPT, LOST = "#0072B2", "#D55E00"  # which the colour-blind can tell apart


def draw_step_values(
    completions: Sequence[str],
    values: Sequence[Sequence[float | None]],
    lost_at_step: Sequence[float | None],
    lost_step: Sequence[str | None],
) -> Figure:
    """Draws a panel per completion: the chance of success along its steps, and where it fell most.

    The arguments are columns of the completions table of `VinePPOTrainer` with `log_values=True`.

    Args:
        completions: `B` texts, at least one; they title the panels.
        values: V in front of each step, then the reward; None where unscorable.
        lost_at_step: number of the step with the lowest advantage; None or NaN where none fell.
        lost_step: its text.

    Returns:
        The figure, not yet saved.

    Raises:
        ValueError: no completions, or columns of different lengths.
    """
    if not completions or not len(completions) == len(values) == len(lost_at_step):
        raise ValueError(
            f"completions has {len(completions)} rows, values {len(values)} and lost_at_step "
            f"{len(lost_at_step)}. Give whole columns of one table, with at least one row."
        )
    size = (7.0, 1.9 * len(completions))
    figure = Figure(figsize=size, dpi=130, layout="constrained")
    panels = figure.subplots(len(completions), 1, sharey=True, squeeze=False)[:, 0]
    rows = zip(panels, completions, values, lost_at_step, lost_step, strict=True)
    for axes, text, along, lost, said in rows:
        _draw(axes, along, None if lost is None or math.isnan(lost) else int(lost), said)
        axes.set_title(text.replace("\n", " ⏎ "), loc="left", fontsize=9, parse_math=False)
    panels[-1].set_xlabel("steps taken; the last point is the reward")
    return figure


def _draw(axes: Axes, along: Sequence[float | None], lost: int | None, said: str | None) -> None:
    heights = [math.nan if value is None else value for value in along]
    axes.plot(range(len(heights)), heights, color=KEPT, marker="o", markersize=4)
    if lost is not None:
        axes.plot([lost, lost + 1], heights[lost : lost + 2], color=LOST, marker="o", linewidth=2.5)
        axes.annotate(
            (said or "").strip(),
            (lost + 1, heights[lost + 1]),
            xytext=(6, 6),
            textcoords="offset points",
            color=LOST,
            fontsize=9,
            parse_math=False,
        )
    axes.set_xticks(range(len(heights)))
    axes.set_ylabel("value")
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
