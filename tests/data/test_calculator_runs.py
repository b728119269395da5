"""Calculator runs: right answers, careless thoughts, and a task that must be thought out."""

import collections
import itertools
import operator
import random

import pytest

from trl_ext.data import calculator_runs
from trl_ext.data.calculator import KEYS, press

ROWS = 2000


@pytest.fixture(scope="module")
def runs():
    return calculator_runs(ROWS, 100, seed=3)


@pytest.fixture(scope="module")
def in_words():
    return calculator_runs(ROWS, 100, in_words=True, seed=3)


def every_row(runs):
    return itertools.chain(runs["train"], runs["held_out"])


def read(row):
    """Keys and start of a prompt, what the pupil read after each key, and his answer."""
    *keys, _, start = row["prompt"].split()
    thought, _, answer = row["completion"].partition(" is ")
    return keys, int(start), [int(shown) for shown in thought.split()], answer


def end_of(row):
    keys, start, _, _ = read(row)
    return press(tuple(keys), (start,))[-1][0]


def test_equal_seeds_give_equal_data_and_others_do_not(runs):
    again, other = calculator_runs(ROWS, 100, seed=3), calculator_runs(ROWS, 100, seed=4)
    for split in ("train", "held_out"):
        assert again[split].to_list() == runs[split].to_list()
        assert other[split].to_list() != runs[split].to_list()


def test_the_global_random_state_is_left_alone():
    random.seed(0)
    untouched = random.random()
    random.seed(0)
    calculator_runs(5, 5)
    assert random.random() == untouched


def test_no_prompt_is_in_both_splits_or_twice(runs):
    assert len({row["prompt"] for row in every_row(runs)}) == ROWS + 100


def test_the_answer_is_what_the_keys_lead_to(runs):
    for row in every_row(runs):
        assert row["answer"] == f"{end_of(row):02d}" and end_of(row) != read(row)[1]


def test_the_pupil_slips_as_often_as_told_and_then_goes_on_from_there(runs):
    slipped = []
    for row in every_row(runs):
        keys, shown, thought, answer = read(row)
        for key, after in zip(keys, thought, strict=True):
            slipped.append(after != KEYS[key](shown))
            assert after in {press_one(shown) for press_one in KEYS.values()}
            shown = after
        assert answer == f"{thought[-1]:02d}"
    # Another key may happen to show the same.
    assert sum(slipped) / len(slipped) == pytest.approx(0.25, abs=0.02)


def test_without_slips_every_demonstration_is_right():
    assert all(read(row)[3] == row["answer"] for row in every_row(calculator_runs(200, 9, slips=0)))


def test_every_key_decides_the_answer(runs):
    """Whoever leaves out or mistakes any step is wrong, but for a few chance meetings."""
    for place in range(4):
        same = total = 0
        for row in runs["held_out"]:
            keys, start, _, _ = read(row)
            for key in set(KEYS) - {keys[place]}:
                other = (*keys[:place], key, *keys[place + 1 :])
                same, total = same + (press(other, (start,))[-1][0] == end_of(row)), total + 1
        assert same / total < 0.1, place


def test_no_guess_is_right_often(runs):
    answers = collections.Counter(row["answer"] for row in every_row(runs))
    assert answers.most_common(1)[0][1] / answers.total() < 0.04


GROWTHS = {
    "less than at first": operator.gt,
    "it has shrunk": operator.gt,
    "the same as at first": operator.eq,
    "it has stayed": operator.eq,
    "more than at first": operator.lt,
    "it has grown": operator.lt,
}


def test_an_account_is_true_in_every_remark(in_words):
    for row in every_row(in_words):
        _, start, thought, told = read(row)
        for text, end in ((row["answer"], end_of(row)), (told, thought[-1])):
            opening, first, second = text.split(" , ")
            remarks = (first, second)
            assert int(opening.split()[-1]) == end
            parities = {"an odd number": 1, "two leaves one": 1, "an even number": 0}
            assert [parities.get(x, 0) for x in remarks if x not in GROWTHS] == [end % 2]
            assert [GROWTHS[x](start, end) for x in remarks if x in GROWTHS] == [True]


def test_one_fact_has_32_accounts(in_words):
    """4 openings, 2 orders, and 2 wordings of each remark."""
    forms = set()
    for row in every_row(in_words):
        opening, *remarks = row["answer"].split(" , ")
        forms.add((opening.rsplit(" ", 1)[0], *remarks))
    # of even and odd, grown and shrunk
    assert len(forms) == 32 * 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train": 0}, "train=0"),
        ({"held_out": 0}, "held_out=0"),
        ({"keys": 0}, "keys=0"),
        ({"slips": 1.0}, r"slips=1\.0"),
        ({"slips": -0.1}, r"slips=-0\.1"),
        ({"train": 200, "keys": 1}, "only 200 runs"),
    ],
)
def test_bad_arguments_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        calculator_runs(**{"train": 10, "held_out": 10, **options})
