"""Reference answers behind sampled thoughts: where a thought ends, and what stands in a row."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AddedToken, PreTrainedTokenizerFast

from tests.exact import TabularConfig
from tests.tiny import tiny_llama, tiny_tokenizer
from trl_ext.rollouts.splice import (
    answer_token_ids,
    check_context,
    check_marker,
    cut,
    end_of_answer,
    thought_length,
    with_answers,
)

CHARACTERS = tiny_tokenizer()
TEXT = "so the final answer is 42. The final answer is naïve: 你好, the final answer is 🙂🙂."


def byte_pairs():
    """A byte-level tokenizer whose merges cross the marker's ends, as real ones do."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([TEXT] * 20, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", clean_up_tokenization_spaces=False
    )


def with_a_space_of_its_own():
    """A tokenizer that puts a space before any text, as that of Llama 2."""
    vocabulary = {
        token: i for i, token in enumerate(["▁", *"abcdefghijklmnopqrstuvwxyz0123456789"])
    }
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="▁"))
    prepend, replace = normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([prepend, replace])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)


def joining(*tokens):
    """The tokenizer of characters with further tokens of several."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(list(tokens))
    return tokenizer


PAIRS = byte_pairs()


def test_the_thought_ends_with_the_token_that_completes_the_marker():
    ids = CHARACTERS("12#7#").input_ids
    assert thought_length(ids, CHARACTERS, "#") == 3
    assert thought_length(ids, CHARACTERS, "#7") == 4
    assert thought_length(ids, CHARACTERS, "") == 0
    assert thought_length(ids, CHARACTERS, "8") is None
    assert thought_length([], CHARACTERS, "8") is None


@given(st.text(max_size=12), st.text(max_size=12))
def test_no_shorter_thought_has_the_marker(before, after):
    marker = "answer is"
    ids = PAIRS(f"{before}{marker}{after}").input_ids
    n = thought_length(ids, PAIRS, marker)
    assert n is not None and marker in PAIRS.decode(ids[:n])
    assert all(marker not in PAIRS.decode(ids[:m]) for m in range(n))


def test_a_token_that_runs_on_does_not_complete_the_marker():
    """It would put the beginning of the sampled answer, or of another word, into the thought."""
    tokenizer = joining("#4", "#:", "isn")
    assert thought_length(tokenizer("ab#42").input_ids, tokenizer, "#") is None
    assert thought_length(tokenizer("ab#42#7").input_ids, tokenizer, "#") == 5
    assert thought_length(tokenizer("ab#:42").input_ids, tokenizer, "#") == 3
    assert thought_length(tokenizer("it isn't").input_ids, tokenizer, "is") is None
    assert thought_length(tokenizer("it isn't: it is 4").input_ids, tokenizer, "is") == 13


def test_an_answer_is_tokenised_on_its_own():
    row = {"prompt": "1+1=", "answer": "42 is"}
    told = answer_token_ids(PAIRS, row, " ", PAIRS.eos_token_id)
    assert PAIRS.decode(told) == " 42 is<eos>" and told[-1] == PAIRS.eos_token_id
    assert answer_token_ids(PAIRS, row, " ", None) == told[:-1]
    assert answer_token_ids(PAIRS, row, "", None) == PAIRS("42 is").input_ids != told[:-1]


def test_an_answer_has_no_beginning_of_sequence():
    tokenizer = tiny_tokenizer()
    begin = ("<s>", tokenizer.bos_token_id)
    template = processors.TemplateProcessing(single="<s> $A", special_tokens=[begin])
    tokenizer.backend_tokenizer.post_processor = template
    assert tokenizer("4").input_ids[0] == tokenizer.bos_token_id
    told = answer_token_ids(tokenizer, {"answer": "42"}, " ", tokenizer.eos_token_id)
    assert tokenizer.decode(told) == " 42</s>"


TURNS = "{% for m in messages %}<t>{{ m['content'] }}TAIL{% endfor %}"


@pytest.mark.parametrize(
    ("tail", "end"),
    [
        ("<end_of_turn>\n", "<end_of_turn>"),  # Gemma: not the tokenizer's own end
        ("{{ eos_token }}", "</s>"),
        ("\n", "</s>"),
        ("", "</s>"),
    ],
)
def test_an_answer_ends_as_a_turn_of_the_conversation_does(tail, end):
    tokenizer = tiny_tokenizer()
    turn = AddedToken("<end_of_turn>", special=True)
    tokenizer.add_special_tokens({"additional_special_tokens": [turn]})
    tokenizer.chat_template = TURNS.replace("TAIL", tail)
    conversation = [{"role": "user", "content": "1+1="}]
    assert tokenizer.decode(end_of_answer(tokenizer, conversation)) == end
    assert end_of_answer(tokenizer, "1+1=") == tokenizer.eos_token_id


@pytest.mark.parametrize("answer", [None, 7, ["7"], "", " \n"])
def test_an_answer_is_a_text_that_is_not_empty(answer):
    with pytest.raises(ValueError, match=r"column 'answer' holds .*Fill it in, or leave the row"):
        answer_token_ids(CHARACTERS, {"prompt": "1=", "answer": answer}, " ", None)


@pytest.mark.parametrize(
    ("tokenizer", "marker", "prefix"),
    [
        (CHARACTERS, "#", ""),
        (CHARACTERS, "the final answer is", " "),
        (CHARACTERS, "", " "),
        (PAIRS, "the final answer is", " "),
        (PAIRS, "你好", " "),
        (with_a_space_of_its_own(), "answer", ""),
        (joining("#:", "is 4"), "#", ""),
    ],
)
def test_markers_that_can_be_written(tokenizer, marker, prefix):
    check_marker(tokenizer, marker, prefix)


@pytest.mark.parametrize(
    ("tokenizer", "marker", "prefix", "says"),
    [
        (CHARACTERS, "→ is", " ", r"marker='→ is' is '<unk> is' once tokenised and decoded"),
        (CHARACTERS, None, " ", "marker=None is no text"),
        (joining("#x"), "#", "", r"marker='#' with answer_prefix=''.*with the answer 'x'"),
        (
            joining("#1"),
            "#",
            "",
            r"joins the marker's end with the answer '1'.*without white space",
        ),
        (joining(" 1"), "is ", "", "marker='is ' with answer_prefix=''"),
        (with_a_space_of_its_own(), "answer", " ", r"answer_prefix=' '.*Set answer_prefix=''"),
    ],
)
def test_markers_that_no_completion_could_have(tokenizer, marker, prefix, says):
    with pytest.raises(ValueError, match=says):
        check_marker(tokenizer, marker, prefix)


def test_rows_beyond_the_context_are_refused():
    model = tiny_llama(10)
    check_context([512, 3], model, "prompt and answer")
    check_context([], model, "prompt and answer")
    with pytest.raises(
        ValueError, match=r"prompt and answer of one row have 513 .*_embeddings=512"
    ):
        check_context([3, 513], model, "prompt and answer")
    check_context([10**6], SimpleNamespace(config=TabularConfig()), "prompt and answer")


def test_rows_hold_thought_and_answer_or_what_was_sampled():
    ids = torch.tensor([[5, 6, 7, 0], [8, 9, 0, 0], [4, 4, 4, 4]])
    mask = (ids != 0).long()
    rows = with_answers(ids, mask, [2, None, 4], [[1, 2], [3], [2]], pad_token_id=0)
    assert rows["completion_ids"].tolist() == [[5, 6, 1, 2, 0], [8, 9, 0, 0, 0], [4, 4, 4, 4, 2]]
    assert rows["completion_mask"].tolist() == [[1, 1, 1, 1, 0], [1, 1, 0, 0, 0], [1] * 5]
    assert rows["answer_mask"].tolist() == [[0, 0, 1, 1, 0], [0] * 5, [0, 0, 0, 0, 1]]


@pytest.mark.parametrize("width", [3, 5])
def test_what_is_known_of_a_token_stays_with_it(width):
    logps = torch.tensor([[-1.0, -2.0, -3.0, -4.0], [-5.0, -6.0, 0.0, 0.0]])
    kept = cut(logps, [2, None], width)
    assert kept[0, :2].tolist() == [-1.0, -2.0] and kept[0, 2:].isnan().all()
    assert kept[1, :2].tolist() == [-5.0, -6.0] and kept.shape == (2, width)
