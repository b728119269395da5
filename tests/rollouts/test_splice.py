"""Reference answers behind sampled thoughts: where a thought ends, and what stands in a row."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tests.tiny import tiny_tokenizer
from trl_ext.rollouts.splice import cut, thought_length, with_answers

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
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)


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
    assert kept[0, :2].tolist() == [-1.0, -2.0] and not kept[0, 2:].any()
    assert kept[1, :2].tolist() == [-5.0, -6.0] and kept.shape == (2, width)
