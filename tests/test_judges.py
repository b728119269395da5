"""What a judge may answer."""

import asyncio
import math

import pytest
import torch

from trl_ext.judges import ask


def answers(*values):
    return ask(lambda prompts, first, second: list(values), ["p"] * 2, ["a"] * 2, ["b"] * 2)


def test_none_and_nan_are_not_judged():
    assert answers(0.25, None)[0] == 0.25
    assert answers(None, math.nan).isnan().all()
    assert answers(0.25, 1).dtype == torch.float64


def test_asynchronous_judges_are_waited_for():
    async def later(prompts, first, second):
        await asyncio.sleep(0)
        return [float(f > s) for f, s in zip(first, second, strict=True)]

    assert ask(later, ["p", "p"], ["a", "b"], ["b", "a"]).tolist() == [0.0, 1.0]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((0.5,), "1 answers for 2 pairs"),
        ((0.5, 1.5), "1.5 to pair 1"),
        ((-0.1, 0.5), "-0.1 to pair 0"),
        ((math.inf, 0.5), "inf to pair 0"),
    ],
)
def test_bad_answers_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        answers(*values)


def test_no_list_is_refused():
    with pytest.raises(ValueError, match="got float"):
        ask(lambda *lists: 0.5, ["p"], ["a"], ["b"])
