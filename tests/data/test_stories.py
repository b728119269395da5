"""The keyword stories, their gold quality, and what the written stories leave unsaid."""

import itertools
import random

import pytest

from trl_ext.data.stories import (
    ADJECTIVES,
    KEYWORDS,
    LINKS,
    MOST_HELD_OUT,
    NOUNS,
    demonstrations,
    keyword_stories,
    story_quality,
    vocabulary,
)

ASKED = ["fox", "river", "moon", "lamp"]


@pytest.fixture(scope="module")
def stories():
    return keyword_stories(600, 100, seed=3)


def quality(story, keywords=ASKED):
    return story_quality([story], [list(keywords)])[0]


def adjectives(story):
    return sum(word in ADJECTIVES for word in story.split())


def every_row(stories):
    return itertools.chain(stories["train"], stories["held_out"])


def test_equal_seeds_give_equal_data_and_others_do_not(stories):
    again, other = keyword_stories(600, 100, seed=3), keyword_stories(600, 100, seed=4)
    for split in ("train", "held_out"):
        assert again[split].to_list() == stories[split].to_list()
        assert other[split].to_list() != stories[split].to_list()


def test_the_global_random_state_is_left_alone():
    random.seed(0)
    untouched = random.random()
    random.seed(0)
    keyword_stories(5, 5)
    assert random.random() == untouched


def test_no_set_of_keywords_is_in_both_splits_or_held_out_twice():
    # so many rows that an unguarded draw would meet a held-out set with near certainty
    stories = keyword_stories(600, MOST_HELD_OUT, seed=0)
    held_out = {frozenset(row["keywords"]) for row in stories["held_out"]}
    assert len(held_out) == MOST_HELD_OUT
    assert held_out.isdisjoint(frozenset(row["keywords"]) for row in stories["train"])
    assert (len(stories["train"]), len(stories["held_out"])) == (600, MOST_HELD_OUT)


def test_the_prompt_lists_the_keywords_in_capitals(stories):
    for row in every_row(stories):
        assert row["prompt"] == " ".join(row["keywords"]).upper() + "\n"
        assert len(set(row["keywords"])) == len(row["keywords"]) in KEYWORDS


def test_every_word_is_in_the_vocabulary_which_has_none_twice(stories):
    words = vocabulary()
    assert len(words) == len(set(words)) == 2 * len(NOUNS) + len(ADJECTIVES) + len(LINKS)
    for row in every_row(stories):
        text = " ".join((row["prompt"], row["chosen"], row["rejected"]))
        assert set(text.split()) <= set(words)


def test_writers_use_two_adjectives_at_most_and_no_word_but_links_twice(stories):
    seen = set()
    for row in every_row(stories):
        for story in (row["chosen"], row["rejected"]):
            words = [word for word in story.split() if word not in LINKS]
            assert len(set(words)) == len(words)
            seen.add(adjectives(story))
    assert seen == {0, 1, 2}


def test_the_longest_story_leaves_room_for_the_end_in_sixteen_tokens():
    rows = keyword_stories(3000, 1)["train"]
    longest = max(len(story.split()) for story in (*rows["chosen"], *rows["rejected"]))
    # 5 keywords, 1 unasked noun, 5 links, 2 adjectives
    assert longest == 13


@pytest.mark.parametrize(
    ("story", "value"),
    [
        ("", 0),
        ("fox", 1),
        ("fox near river with moon under lamp", 4),
        ("brave fox near pale river with moon under lamp", 5.6),
        ("brave fox near pale river with old moon under lamp", 5.8),
        ("brave pale old golden fox", 2.6),
        ("brave brave brave brave brave brave fox", 1),
        ("brave brave brave brave brave brave brave fox", -0.4),
        ("fox fox fox", 1),
        ("fox near bear", 0),
        ("bear bear", -1),
        ("FOX RIVER MOON LAMP", 0),
        ("foxes rivers <eos> near", 0),
    ],
)
def test_quality_by_hand(story, value):
    assert quality(story) == pytest.approx(value, abs=1e-12)


def test_quality_does_not_depend_on_the_order_of_words_or_keywords(stories):
    rng = random.Random(0)
    for row in stories["held_out"]:
        words, keywords = row["chosen"].split(), list(row["keywords"])
        rng.shuffle(words)
        rng.shuffle(keywords)
        assert quality(" ".join(words), keywords) == quality(row["chosen"], row["keywords"])


def test_written_colour_is_always_gain_and_more_than_three_adjectives_always_loss():
    curve = [quality(" ".join([*ADJECTIVES[:count], *ASKED])) for count in range(8)]
    steps = [after - before for before, after in itertools.pairwise(curve)]
    assert steps == pytest.approx([1.0, 0.6, 0.2, -0.2, -0.6, -1.0, -1.4])


@pytest.mark.parametrize("noise", [0.5, 2.0])
def test_labels_follow_bradley_and_terry(noise):
    """Of the pairs whose qualities differ by d, the share rightly labelled is σ(d / noise)."""
    rows = keyword_stories(6000, 1, noise=noise)["train"]
    chosen = story_quality(rows["chosen"], rows["keywords"])
    rejected = story_quality(rows["rejected"], rows["keywords"])
    margins = [a - b for a, b in zip(chosen, rejected, strict=True)]
    for gap in (1.0, 2.0):
        right, wrong = margins.count(gap), margins.count(-gap)
        expected = 1 / (1 + 2.718281828 ** (-gap / noise))
        # three standard deviations of a share
        tolerance = 3 * (expected * (1 - expected) / (right + wrong)) ** 0.5
        assert right / (right + wrong) == pytest.approx(expected, abs=tolerance)


def test_without_noise_the_better_story_is_chosen():
    rows = keyword_stories(300, 1, noise=1e-6)["train"]
    chosen = story_quality(rows["chosen"], rows["keywords"])
    rejected = story_quality(rows["rejected"], rows["keywords"])
    assert all(a >= b for a, b in zip(chosen, rejected, strict=True))


def test_demonstrations_are_both_stories_of_each_pair(stories):
    shown = demonstrations(stories["held_out"])
    pairs = [
        (row["prompt"], row[side]) for side in ("chosen", "rejected") for row in stories["held_out"]
    ]
    assert list(zip(shown["prompt"], shown["completion"], strict=True)) == pairs


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"train": 0}, "train=0"),
        ({"held_out": 0}, "held_out=0"),
        ({"held_out": MOST_HELD_OUT + 1}, "short prompts"),
        ({"noise": 0.0}, "noise=0.0"),
        ({"noise": -1.0}, "noise=-1.0"),
        ({"noise": float("inf")}, "noise=inf"),
        ({"noise": float("nan")}, "noise=nan"),
    ],
)
def test_bad_arguments_are_refused(arguments, reason):
    with pytest.raises(ValueError, match=reason):
        keyword_stories(**{"train": 5, "held_out": 5} | arguments)
