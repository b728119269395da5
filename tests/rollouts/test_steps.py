"""Steps on token boundaries: three kinds of tokenizer, any text, any ids."""

import itertools
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tests.tiny import tiny_tokenizer
from trl_ext.rollouts.steps import (
    Prefix,
    shared_prefixes,
    split_lines,
    split_sentences,
    step_starts,
    token_steps,
)

CORPUS = [
    "We add 3.14 and 2.\nThen $x = 5. y$ holds. So the answer is 7!\n\n",
    "Größe, naïve café — 速度は速い。次に進む。",
    "Пусть x. Тогда y?\n👩‍🏫 teaches 👍🏽 and 🎉🎉.\n  indented\tline\r\n",
]
EOS = "<eos>"


def wrap(tokenizer):
    tokenizer.add_special_tokens([EOS])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS)


@cache
def byte_level():
    """Bytes and a few merges, of a line break with the first byte of what follows among them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*CORPUS, "\né\nà\nü\nñ" * 20], trainer)
    return wrap(tokenizer)


@cache
def byte_fallback():
    """As Llama's: words behind a mark for the space, other characters as tokens of one byte."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefghinostwxy.?!$\n"]
    merges = [("▁", "t"), ("▁t", "h"), ("▁th", "e"), (".", "\n"), ("\n", "\n")]
    vocabulary = {piece: i for i, piece in enumerate([*pieces, *(a + b for a, b in merges)])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return wrap(tokenizer)


TOKENIZERS = {"bytes": byte_level, "fallback": byte_fallback}
tokenizers = pytest.mark.parametrize("make", TOKENIZERS.values(), ids=TOKENIZERS)
splitters = pytest.mark.parametrize("splitter", [split_lines, split_sentences])

# Texts that are dense in what the splitters look for.
MATHS = st.text("ab5 .!?。$\\[](){}\n\té👍", max_size=60)
TEXTS = st.one_of(
    MATHS,
    st.text(max_size=40),
    st.lists(
        st.sampled_from([*"ab5 .$\n", "\\begin{align}", "\\end{align}", "$$", "\\[", "\\]"])
    ).map("".join),
)
quick = settings(max_examples=40, deadline=None, derandomize=True)


def encode(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def decode(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def pieces(text, splitter):
    return [text[a:b] for a, b in itertools.pairwise([0, *splitter(text), len(text)])]


# Splitters


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", [""]),
        ("one line", ["one line"]),
        ("a\nb\n", ["a\n", "b\n", ""]),
        ("a\n\n\nb", ["a\n", "\n\nb"]),
        ("\n \na\n", ["\n \na\n", ""]),
        ("a\r\nb", ["a\r\n", "b"]),
    ],
)
def test_lines_by_hand(text, expected):
    assert pieces(text, split_lines) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("It is 3.14. So", ["It is 3.14. ", "So"]),
        ("Why? Since! (As said.) So", ["Why? ", "Since! ", "(As said.) ", "So"]),
        ("a.\nb", ["a.\n", "b"]),
        ("a. \n b", ["a. ", "\n b"]),
        ("速い。次", ["速い。", "次"]),
        ("so $x. y$ is. b", ["so $x. y$ is. ", "b"]),
        ("so $$x.\n y$$ is. b", ["so $$x.\n y$$ is. ", "b"]),
        (r"so \(x. y\) is. b", [r"so \(x. y\) is. ", "b"]),
        ("so \\[x.\ny\\] is. b", ["so \\[x.\ny\\] is. ", "b"]),
        (
            "so \\begin{align*}x. \n y\\end{align*} is. b",
            ["so \\begin{align*}x. \n y\\end{align*} is. ", "b"],
        ),
        ("$5 is. $6 is. b", ["$5 is. $6 is. b"]),
        ("$5 is. b\nc. d", ["$5 is. b\n", "c. ", "d"]),
        ("$5-$6 is. b\nc", ["$5-$6 is. b\n", "c"]),
        (r"\$5 is. b", [r"\$5 is. ", "b"]),
        (r"5 $ is. b", ["5 $ is. ", "b"]),
        ("$x\\$. y$ is. b", ["$x\\$. y$ is. ", "b"]),
        ("$$x. y\n\nc. d", ["$$x. y\n\n", "c. ", "d"]),
        ("$$x. y\n \n\nc", ["$$x. y\n \n", "\nc"]),
        ("a \\\\[2pt] b. c", ["a \\\\[2pt] b. ", "c"]),
        ("\\begin{a}x. \\end{b} y. \\end{a} z. c", ["\\begin{a}x. \\end{b} y. \\end{a} z. ", "c"]),
    ],
)
def test_sentences_by_hand(text, expected):
    assert pieces(text, split_sentences) == expected


@splitters
@quick
@given(text=TEXTS)
def test_a_boundary_is_settled_by_the_text_before_it(splitter, text):
    whole = splitter(text)
    for end in range(len(text) + 1):
        assert splitter(text[:end]) == [cut for cut in whole if cut <= end]


@splitters
@quick
@given(text=TEXTS)
def test_no_step_is_blank(splitter, text):
    assert all(piece.strip() for piece in pieces(text, splitter)[:-1])


# Token boundaries


class OnlyDecodes:
    """A tokenizer that nothing can be tokenised with."""

    def __init__(self, tokenizer):
        self.decode = tokenizer.decode


@tokenizers
@splitters
@quick
@given(text=TEXTS, min_tokens=st.integers(1, 5), most_steps=st.none() | st.integers(1, 4))
def test_every_token_has_exactly_one_step(make, splitter, text, min_tokens, most_steps):
    """V4"""
    ids = [*encode(make(), text), make().eos_token_id]
    options = {"min_tokens": min_tokens, "most_steps": most_steps}
    starts = step_starts(OnlyDecodes(make()), ids, splitter, **options)
    steps = token_steps(starts, len(ids))
    assert len(steps) == len(ids) and starts[0] == 0
    assert all(0 <= after - before <= 1 for before, after in itertools.pairwise(steps))
    assert [steps.index(step) for step in range(len(starts))] == starts
    assert steps[-1] == len(starts) - 1
    assert starts == step_starts(OnlyDecodes(make()), ids[:-1], splitter, ended=True, **options)
    assert all(after - before >= min_tokens for before, after in itertools.pairwise(starts))
    assert most_steps is None or len(starts) <= most_steps


@tokenizers
@splitters
@quick
@given(text=TEXTS)
def test_a_step_starts_at_the_first_whole_token_behind_its_boundary(make, splitter, text):
    """Against decoding every prefix from the beginning."""
    ids = encode(make(), text)
    text = decode(make(), ids)
    shown = [decode(make(), ids[:i]) for i in range(len(ids))]
    whole = [i for i, prefix in enumerate(shown) if text.startswith(prefix)]
    expected = {0} if ids else set()
    for cut in splitter(text):
        behind = [i for i in whole if len(shown[i]) >= cut]
        expected |= {*behind[:1]}
    assert step_starts(make(), ids, splitter) == sorted(expected)


@tokenizers
@splitters
@quick
@given(text=TEXTS, min_tokens=st.integers(1, 4), most_steps=st.none() | st.integers(1, 3))
def test_a_start_is_settled_by_the_tokens_before_it(make, splitter, text, min_tokens, most_steps):
    ids = encode(make(), text)
    options = {"min_tokens": min_tokens, "most_steps": most_steps}
    starts = step_starts(make(), ids, splitter, **options)
    for end in range(len(ids) + 1):
        expected = [start for start in starts if start < end]
        assert step_starts(make(), ids[:end], splitter, **options) == expected


@tokenizers
@quick
@given(texts=st.lists(TEXTS, min_size=1, max_size=3))
def test_the_splitter_is_given_the_decoded_completion(make, texts):
    """With tokens in it that have no text, and characters that take or share several."""
    given_texts = []
    ids = [token for text in texts for token in [*encode(make(), text), make().eos_token_id]]
    step_starts(make(), ids, lambda text: given_texts.append(text) or [])
    assert given_texts == [decode(make(), ids)]


@tokenizers
@quick
@given(data=st.data())
def test_any_tokens_have_steps(make, data):
    """Policies also sample what no text is tokenised to: broken characters, specials anywhere."""
    ids = data.draw(st.lists(st.integers(0, len(make()) - 1), max_size=40))
    starts = step_starts(make(), ids, split_sentences)
    assert starts == sorted(set(starts)) and (starts[:1] == [0]) == bool(ids)
    assert len(token_steps(starts, len(ids))) == len(ids)


def test_a_character_is_never_cut():
    tokenizer = byte_level()
    text = "速" * 5 + "\n" + "👩‍🏫" * 3 + "\n" + "é"
    ids = encode(tokenizer, text)
    whole = [i for i in range(len(ids)) if text.startswith(decode(tokenizer, ids[:i]))]
    assert 5 < len(whole) < 2 * len(ids) / 3, "most characters here take several tokens"
    assert step_starts(tokenizer, ids, lambda t: range(len(t))) == whole


def test_a_step_waits_for_the_character_that_its_boundary_s_token_began():
    tokenizer = byte_level()
    ids = encode(tokenizer, "ab\nécd")
    assert "\n\N{REPLACEMENT CHARACTER}" in [decode(tokenizer, [token]) for token in ids]
    starts = step_starts(tokenizer, ids)
    assert [decode(tokenizer, ids[:start]) for start in starts] == ["", "ab\né"]


def test_an_end_inside_of_a_character_is_as_any_token_there():
    """The token before it holds a line break and the first byte of a character."""
    tokenizer = byte_level()
    ids = encode(tokenizer, "ab\nécd")
    broken = next(i for i, token in enumerate(ids) if decode(tokenizer, [token])[0] == "\n")
    assert step_starts(tokenizer, ids[: broken + 2])[1:] != [broken + 1]
    assert step_starts(tokenizer, ids[: broken + 1], ended=True) == [0]


def test_the_word_behind_a_joined_space_belongs_to_the_sentence():
    tokenizer = byte_fallback()
    ids = encode(tokenizer, "ab. the dog. the")
    starts = step_starts(tokenizer, ids, split_sentences)
    assert [decode(tokenizer, ids[:start]) for start in starts] == ["", "ab. the"]


def test_a_token_across_a_boundary_ends_the_step():
    tokenizer = byte_fallback()
    ids = encode(tokenizer, "ab.\n\ncd")
    shown = [decode(tokenizer, [token]) for token in ids]
    assert ".\n" in shown
    starts = step_starts(tokenizer, ids)
    assert [decode(tokenizer, ids[:start]) for start in starts] == ["", "ab.\n"]
    doubled = encode(tokenizer, "ab\n\ncd")
    assert "\n\n" in [decode(tokenizer, [token]) for token in doubled]
    assert [decode(tokenizer, doubled[:s]) for s in step_starts(tokenizer, doubled)] == [
        "",
        "ab\n\n",
    ]


def test_several_boundaries_in_one_token_start_one_step():
    tokenizer = byte_fallback()
    ids = encode(tokenizer, "ab\n\ncd")
    assert len(ids) == 5
    assert step_starts(tokenizer, ids, lambda _: [3, 4]) == [0, 3]


def test_an_end_of_sequence_begins_a_step_where_any_token_would():
    tokenizer = tiny_tokenizer()
    eos = tokenizer.eos_token_id
    for text, starts in ("ab\ncd\n", [0, 3, 6]), ("ab\ncd", [0, 3]), ("", [0]):
        ids = encode(tokenizer, text)
        assert step_starts(tokenizer, [*ids, eos]) == starts
        assert step_starts(tokenizer, ids, ended=True) == starts
    assert step_starts(tokenizer, []) == []
    ids = encode(tokenizer, "ab\nc\n")
    assert step_starts(tokenizer, ids, ended=True, min_tokens=3) == [0, 3]
    assert step_starts(tokenizer, ids, ended=True, most_steps=2) == [0, 3]


def test_short_steps_and_too_many_are_merged_looking_back():
    tokenizer = tiny_tokenizer()
    ids = encode(tokenizer, "a\nbbbb\nc\nd\neeeee\nf")
    assert step_starts(tokenizer, ids) == [0, 2, 7, 9, 11, 17]
    assert step_starts(tokenizer, ids, min_tokens=3) == [0, 7, 11, 17]
    assert step_starts(tokenizer, ids, most_steps=3) == [0, 2, 7]
    assert step_starts(tokenizer, ids, min_tokens=3, most_steps=2) == [0, 7]
    assert step_starts(tokenizer, ids, most_steps=1) == [0]


def test_a_splitter_of_ones_own():
    tokenizer = tiny_tokenizer()
    ids = encode(tokenizer, "ab;cd;ef")
    by_semicolon = step_starts(
        tokenizer, ids, lambda text: [i + 1 for i, c in enumerate(text) if c == ";"][::-1]
    )
    assert by_semicolon == [0, 3, 6]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"min_tokens": 0}, "min_tokens=0"),
        ({"most_steps": 0}, "most_steps=0"),
        ({"splitter": lambda text: [len(text) + 1]}, "position 3 .* text of 2 characters"),
        ({"splitter": lambda text: [-1]}, "position -1"),
        ({"splitter": lambda text: [1.5]}, r"position 1\.5"),
        ({"splitter": lambda text: text.split("a")}, "position '.*Return positions"),
        ({"splitter": lambda text: None}, "it returned None. Return positions"),
    ],
)
def test_bad_options_are_refused(options, reason):
    tokenizer = tiny_tokenizer()
    with pytest.raises(ValueError, match=reason):
        step_starts(tokenizer, encode(tokenizer, "ab"), **options)


# Shared prefixes


def test_equal_prefixes_of_a_group_are_listed_once():
    completions = [[1, 2, 3], [1, 2, 4], [1, 5], [1, 2, 3]]
    starts = [[0, 1, 2], [0, 2], [0, 1], [0, 1]]
    prefixes, table = shared_prefixes(["x", "x", "x", "y"], completions, starts)
    assert prefixes == [Prefix(0, 0), Prefix(0, 1), Prefix(0, 2), Prefix(3, 0), Prefix(3, 1)]
    assert table == [[0, 1, 2], [0, 2], [0, 1], [3, 4]]


@quick
@given(st.data())
def test_prefixes_are_those_of_their_rows(data):
    completions = data.draw(st.lists(st.lists(st.integers(0, 2), max_size=5), max_size=6))
    starts = [
        sorted({0, *data.draw(st.lists(st.integers(0, len(ids) - 1), max_size=3))}) if ids else []
        for ids in completions
    ]
    groups = [row // 3 for row in range(len(completions))]
    prefixes, table = shared_prefixes(groups, completions, starts)

    def content(prefix):
        return groups[prefix.row], tuple(completions[prefix.row][: prefix.length])

    for row, (of_row, indices) in enumerate(zip(starts, table, strict=True)):
        wanted = [(groups[row], tuple(completions[row][:start])) for start in of_row]
        assert [content(prefixes[i]) for i in indices] == wanted
    assert len({content(prefix) for prefix in prefixes}) == len(prefixes)
    assert {i for row in table for i in row} == set(range(len(prefixes)))
