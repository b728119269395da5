"""The calculator puzzles and their reward, which know nothing of each other."""

import itertools
import random

import pytest

from trl_ext.data import calculator_puzzles
from trl_ext.data.calculator import KEYS, LEVELS, press, solutions
from trl_ext.rewards.calculator import calculator_reward, keys_pressed

COLUMNS = ("start", "target", "level", "keys")


@pytest.fixture(scope="module")
def puzzles():
    return calculator_puzzles(300, 100, seed=3)


def reward(row, completion):
    return calculator_reward([completion], **{name: [row[name]] for name in COLUMNS})[0]


def every_row(puzzles):
    return itertools.chain(puzzles["train"], puzzles["held_out"])


def test_equal_seeds_give_equal_data_and_others_do_not(puzzles):
    again, other = calculator_puzzles(300, 100, seed=3), calculator_puzzles(300, 100, seed=4)
    for split in ("train", "held_out"):
        assert again[split].to_list() == puzzles[split].to_list()
        assert other[split].to_list() != puzzles[split].to_list()


def test_the_global_random_state_is_left_alone():
    random.seed(0)
    untouched = random.random()
    random.seed(0)
    calculator_puzzles(5, 5)
    assert random.random() == untouched


def test_no_prompt_is_in_both_splits_or_twice(puzzles):
    prompts = [row["prompt"] for row in every_row(puzzles)]
    assert len(prompts) == 400 == len(set(prompts))
    assert len(puzzles["held_out"]) == 100


def test_each_key_is_what_a_child_computes():
    assert press(("+7", "*3", "rev", "-1"), (93, 14)) == [(0, 21), (0, 63), (0, 36), (99, 35)]


def test_the_prompt_names_the_puzzle(puzzles):
    for row in every_row(puzzles):
        level, _, _, *target, _, first, second = row["prompt"].split()
        assert [int(level), int(first), int(second)] == [row["level"], *row["start"]]
        assert [int(shown) for shown in target] == row["target"]


def test_each_puzzle_has_the_one_solution_that_it_names(puzzles):
    for row in every_row(puzzles):
        start, target = tuple(row["start"]), tuple(row["target"])
        assert solutions(start, target, row["level"], row["keys"]) == [tuple(row["answer"].split())]


def test_every_demonstration_earns_the_reward_and_shows_the_answer(puzzles):
    for row in every_row(puzzles):
        assert reward(row, row["completion"]) == 1.0
        assert keys_pressed(row["completion"]) == row["answer"]


def test_harder_levels_are_harder_to_guess():
    """A player who presses keys at their frequency solves fewer puzzles of a higher level."""
    rng = random.Random(0)
    rates = []
    for level in LEVELS:
        rows = calculator_puzzles(10, 150, levels=[level])["held_out"]
        programs = [" ".join(rng.choices([*KEYS], [0.4, 0.3, 0.2, 0.1], k=level)) for _ in rows]
        rates.append(sum(p == a for p, a in zip(programs, rows["answer"], strict=True)) / len(rows))
    assert rates[0] > 1.5 * rates[1] > 2 * rates[2]


def test_keys_are_drawn_at_their_frequencies():
    rows = calculator_puzzles(1, 200, levels=[2], frequencies={"+7": 0.9, "rev": 0.1})["held_out"]
    keys = " ".join(rows["answer"]).split()
    assert set(keys) == {"+7", "rev"}
    assert keys.count("+7") > 0.8 * len(keys)


PUZZLE = {"start": [10, 14], "target": [51, 63], "level": 2, "keys": ["+7", "*3", "rev", "-1"]}


@pytest.mark.parametrize(
    "completion",
    [
        "",
        "+7",
        "51 63",
        "+7 17 21",
        "+7 17 21 *3 51 64",
        "+7 18 21 *3 51 63",
        "+7 17 21 *3 51 63 ",
        " +7 17 21 *3 51 63",
        "+7 17 21 *3 51 63 +7",
        "+7 17 21 *3 51 63 rev 15 36",
        "+7 17 21 *3 51 63 rev 15 36 rev 51 63",
        "+7 17 21 +7 24 28",
        "*3 51 63 +7 17 21",
        "+7 17 21 +7 51 63",
        "+7 51 63 *3 51 63",
        "+41 51 55 +8 59 63",
        "+20 30 34 +21 51 55",
        "+7 17 21 *3 ٥١ 63",
        "+7 17 21\n*3 51 63",
        "2 keys to 51 63 from 10 14",
        "rev 1 41 rev 10 14",
        "foo 51 63 bar 51 63",
    ],
)
def test_adversarial_work_earns_nothing(completion):
    assert reward(PUZZLE, "+7 17 21 *3 51 63") == 1.0
    assert reward(PUZZLE, completion) == 0.0


def test_a_key_that_the_puzzle_lacks_earns_nothing():
    row = {**PUZZLE, "start": [10, 14], "target": [51, 55], "level": 1}
    assert reward({**row, "keys": ["+41"]}, "+41 51 55") == 1.0
    assert reward(row, "+41 51 55") == 0.0


def test_conversations_are_read_too():
    messages = [[{"role": "assistant", "content": "+7 17 21 *3 51 63"}]]
    assert calculator_reward(messages, **{name: [PUZZLE[name]] for name in COLUMNS}) == [1.0]


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("+7 17 21 *3 00 00", "+7 *3"),
        ("rev 01 41", "rev"),
        ("", None),
        ("+7 17", None),
        ("x", None),
    ],
)
def test_the_answer_is_the_keys_whatever_the_arithmetic(completion, answer):
    assert keys_pressed(completion) == answer


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"train": 0}, "train=0"),
        ({"held_out": 0}, "held_out=0"),
        ({"levels": []}, "levels"),
        ({"levels": [0]}, "levels"),
        ({"frequencies": {"+8": 1.0}}, "frequencies"),
        ({"frequencies": {"+7": 0.0}}, "frequencies"),
        ({"train": 9_900, "levels": [1], "frequencies": {"+7": 1}}, "no new one"),
    ],
)
def test_bad_arguments_are_refused(arguments, reason):
    defaults = {"train": 5, "held_out": 5}
    with pytest.raises(ValueError, match=reason):
        calculator_puzzles(**{**defaults, **arguments})
