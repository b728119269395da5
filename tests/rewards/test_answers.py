"""The comparing rewards and their extractors, on answers written to be paid for nothing."""

import time

import pytest

from trl_ext.rewards import boxed_answer_reward, exact_match_reward, last_boxed, last_number

BOXED = [  # completion, reference, reward
    (r"so \boxed{7}", "7", 1.0),
    ("\\boxed{ 1  + \n x }", "1 + x", 1.0),
    (r"\boxed{\frac{1}{3}}", r"\frac{1}{3}", 1.0),
    (r"\boxed {7}", "7", 1.0),
    (r"first \boxed{7}, no: \boxed{8}", "7", 0.0),  # the last box counts
    (r"first \boxed{8}, no: \boxed{7}", "7", 1.0),
    (r"\boxed{1} \boxed{2} \boxed{3} \boxed{4}", "3", 0.0),
    (r"\boxed{7} \boxed{", "7", 1.0),  # a box that never closes is no box
    (r"\boxed{7", "7", 0.0),
    (r"{ \boxed{7}", "7", 1.0),
    (r"} \boxed{7} }", "7", 1.0),
    (r"\boxed{8} and then \boxed{}", "8", 0.0),
    (r"\boxed{}", "7", 0.0),
    (r"\boxed{ }", "7", 0.0),
    ("", "7", 0.0),
    ("7", "7", 0.0),
    (r"Put the final answer in \boxed{answer}, where 3 + 4 = 7", "7", 0.0),  # echo of the prompt
    (r"\boxed{17}", "7", 0.0),  # the reference is a substring
    (r"\boxed{7 or 8}", "7", 0.0),
    (r"\boxed{\{1, 2\}}", r"\{1, 2\}", 1.0),
    (r"\boxed{x \} y}", r"x \} y", 1.0),
    (r"\boxed{a_{b_{c}}}", "a_{b_{c}}", 1.0),
    (r"\boxed{8 \boxed{7}}", "7", 1.0),  # of nested boxes, the one opened last
    (r"a new line \\boxed{7}", "7", 0.0),  # `\\` ends a line in LaTeX, and no box follows
    (r"\boxed{None}", "None", 1.0),
    (r"\boxed{1 2}", "12", 0.0),
]


@pytest.mark.parametrize(("completion", "reference", "reward"), BOXED)
def test_only_the_last_box_counts(completion, reference, reward):
    assert boxed_answer_reward([completion], [reference]) == [reward]


@pytest.mark.parametrize(
    ("completion", "reward"),
    [(" 7\n", 1.0), ("7", 1.0), ("7.0", 0.0), ("17", 0.0), ("", 0.0), ("the answer is 7", 0.0)],
)
def test_exact_match_is_the_reference_and_nothing_else(completion, reward):
    assert exact_match_reward([completion], [7]) == [reward]


@pytest.mark.parametrize("reward", [exact_match_reward, boxed_answer_reward])
def test_a_row_without_reference_is_left_out(reward):
    completions = ["", r"\boxed{}", r"\boxed{None}", "7"]
    assert reward(completions, [None, "", " \n", None]) == [None] * 4


@pytest.mark.parametrize("reward", [exact_match_reward, boxed_answer_reward])
@pytest.mark.parametrize("answer", [None, "7", ["7"], ["7", "7", "7"]])
def test_a_reference_column_of_the_wrong_size_is_refused(reward, answer):
    with pytest.raises(ValueError, match="answer"):
        reward(["7", "7"], answer)


def test_last_boxed_tells_no_box_from_an_empty_one():
    assert last_boxed("7") is None
    assert last_boxed(r"\boxed{ }") == ""


@pytest.mark.parametrize("text", [r"\boxed{" * 40_000, r"\boxed{}" * 40_000, "{" * 300_000])
def test_last_boxed_takes_linear_time(text):
    start = time.perf_counter()
    last_boxed(text)
    assert time.perf_counter() - start < 2  # quadratic: minutes


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### 1,234,567", "1234567"),
        ("it is 12, or 13.", "13"),
        ("1,2,3", "3"),
        ("x = -3.50", "-3.50"),
        ("5-3", "3"),
        ("f(2)-3", "3"),
        ("none", None),
        ("", None),
        ("7 " + "9" * 100_000, "9" * 100_000),
    ],
)
def test_last_number(text, number):
    assert last_number(text) == number
