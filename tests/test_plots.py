"""The figure of values along steps: what it shows of a completions table."""

import math

import numpy as np
import pandas as pd
import pytest

from trl_ext.plots import KEPT, LONGEST, LOST, MOST_PANELS, draw_step_values

TEXTS = ["a $1 cake\nand b", "no step fell", "c"]
VALUES = [[0.5, 0.75, 0.0], [0.25, 0.5, 1.0], [None, 0.5, 0.25]]


def lines(axes):
    """Colour, x and y of each line, where there is a y."""
    return [
        (line.get_color(), list(line.get_xdata()), np.asarray(line.get_ydata()).tolist())
        for line in axes.lines
    ]


def test_each_panel_shows_its_values_and_the_step_that_lost_most():
    figure = draw_step_values(TEXTS, VALUES, [1, None, 1.0], ["and $b", None, "c"])
    first, second, third = figure.axes
    assert lines(first) == [(KEPT, [0, 1, 2], VALUES[0]), (LOST, [1, 2], [0.75, 0.0])]
    assert lines(second) == [(KEPT, [0, 1, 2], VALUES[1])] and not second.texts
    assert math.isnan(lines(third)[0][2][0]) and lines(third)[1] == (LOST, [1, 2], [0.5, 0.25])
    (said,) = first.texts
    assert said.get_text() == "and $b" and said.xy == (2, 0.0)
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == ["a $1 cake ⏎ and b", "no step fell", "c"]


def test_a_loss_over_steps_without_values_is_drawn_from_value_to_value():
    (axes,) = draw_step_values(["a"], [[0.9, None, None, 0.1]], [1], ["b"]).axes
    assert lines(axes)[1] == (LOST, [0, 3], [0.9, 0.1])
    assert axes.texts[0].xy == (3, 0.1)


def test_a_dollar_is_no_formula(tmp_path):
    figure = draw_step_values(["$x_ is a"], [[1.0, 0.0]], [0], ["$\\frac"])
    figure.savefig(tmp_path / "values.png")
    assert (tmp_path / "values.png").stat().st_size > 0


def test_columns_of_a_table_that_was_read_back_are_drawn(tmp_path):
    """Where lists are arrays, and a missing step is NaN."""
    said = [[{"role": "assistant", "content": text}] for text in TEXTS]
    columns = {"values": VALUES, "lost_at_step": [1, None, 1], "lost_step": ["b", None, "c"]}
    pd.DataFrame({"completion": said, **columns}).to_parquet(tmp_path / "table.parquet")
    table = pd.read_parquet(tmp_path / "table.parquet")
    figure = draw_step_values(*(table[name] for name in ("completion", *columns)))
    assert [len(axes.lines) for axes in figure.axes] == [2, 1, 2]
    assert figure.axes[1].get_title(loc="left") == "no step fell"


def test_long_texts_are_cut():
    figure = draw_step_values(["x" * 4000], [[1.0, 0.0]], [0], ["y" * 4000])
    (axes,) = figure.axes
    assert axes.get_title(loc="left") == "x" * LONGEST + " …"
    assert axes.texts[0].get_text() == "y" * LONGEST + " …"


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (([], [], [], []), f"completions has 0 rows.*1 to {MOST_PANELS}"),
        ([[x] * (MOST_PANELS + 1) for x in ("a", [0.5], None, None)], "completions has 51 rows"),
        ((["a"], [[0.5]], [None], []), "unequal lengths: completions 1.*lost_step 0"),
        ((["a"], [[0.5], [1.0]], [None], [None]), "values 2"),
    ],
)
def test_other_tables_are_refused(columns, message):
    with pytest.raises(ValueError, match=message):
        draw_step_values(*columns)
