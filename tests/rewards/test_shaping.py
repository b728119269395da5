"""Format and length."""

import pytest

from trl_ext.rewards import format_reward, length_reward

SHAPES = [
    ("<think>3 + 4</think>\nSo \\boxed{7}.", 1.0),
    (" \n<think>3 + 4</think>\\boxed{7}", 1.0),
    ("<think>a\nb</think>\\boxed{7}", 1.0),
    ("\\boxed{7}", 0.0),
    ("<think>3 + 4 \\boxed{7}</think>", 0.0),  # the answer belongs after the thought
    ("<think>3 + 4</think>7", 0.0),
    ("<think>3 + 4</think>\\boxed{}", 0.0),
    ("<think></think>\\boxed{7}", 0.0),
    ("<think> \n</think>\\boxed{7}", 0.0),
    ("<think>a</think><think>b</think>\\boxed{7}", 0.0),
    ("<think><think>a</think>\\boxed{7}", 0.0),
    ("<think>a</think>b</think>\\boxed{7}", 0.0),
    ("Hm. <think>a</think>\\boxed{7}", 0.0),
    ("a</think>\\boxed{7}", 0.0),
    ("<think>a", 0.0),
    ("", 0.0),
]


@pytest.mark.parametrize(("completion", "reward"), SHAPES)
def test_default_format(completion, reward):
    assert format_reward([completion]) == [reward]


def test_a_pattern_is_for_the_whole_text():
    completions = ["a</think>\n7", "a</think>", "b"]
    assert format_reward(completions, pattern=".*</think>.+") == [1.0, 0.0, 0.0]
    assert format_reward(["ab", "abc"], pattern="ab") == [1.0, 0.0]


@pytest.mark.parametrize("pattern", ["(", ["a", "b"], 3])
def test_what_is_no_pattern_is_refused(pattern):
    with pytest.raises(ValueError, match="pattern"):
        format_reward(["a"], pattern=pattern)


@pytest.mark.parametrize(
    ("length", "reward"),
    # L = 100, b = 20: free up to 80, then (80 − |y|) / 20, and −1 from 100 on
    [
        (0, 0.0),
        (80, 0.0),
        (81, -0.05),
        (90, -0.5),
        (99, -0.95),
        (100, -1.0),
        (101, -1.0),
        (999, -1),
    ],
)
def test_length_by_hand(length, reward):
    ids = [[0] * length]
    assert length_reward(["x"], ids, max_length=100, buffer=20) == pytest.approx([reward])


def test_length_agrees_with_trl():
    from trl.rewards import get_soft_overlong_punishment

    ids = [[0] * length for length in range(40)]
    theirs = get_soft_overlong_punishment(max_completion_len=30, soft_punish_cache=7)
    ours = length_reward(["x"] * 40, ids, max_length=30, buffer=7)
    assert ours == pytest.approx(theirs(completion_ids=ids))


def test_length_without_buffer_is_a_step():
    ids = [[0] * length for length in (9, 10, 11)]
    assert length_reward(["x"] * 3, ids, max_length=10, buffer=0) == [0.0, 0.0, -1.0]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"max_length": 0}, "max_length"),
        ({"max_length": [5, 5]}, "max_length"),
        ({"max_length": 5, "buffer": 6}, "buffer"),
        ({"buffer": -1}, "buffer"),
        ({"buffer": 1.5}, "buffer"),
        ({"buffer": True}, "buffer"),
    ],
)
def test_lengths_out_of_range_are_refused(options, named):
    with pytest.raises(ValueError, match=f"^{named}="):
        length_reward(["x"], [[1]], **options)


@pytest.mark.parametrize("ids", [None, [], [[1], [2]]])
def test_length_needs_the_tokens(ids):
    with pytest.raises(ValueError, match="completion_ids"):
        length_reward(["x"], ids)
