"""The pieces of toy studies: words, a small Llama, and figures over seeds."""

import math
import statistics

import pytest
from datasets import Dataset, DatasetDict
from transformers import LlamaForCausalLM

from trl_ext.studies import (
    cpu_arguments,
    mean_and_error,
    over_seeds,
    study_options,
    word_llama,
    word_tokenizer,
    words_of,
)

SPECIAL = ("<pad>", "<unk>", "<eos>")


def test_each_word_is_a_token_behind_the_special_ones():
    tokenizer = word_tokenizer(["red", "fox"], SPECIAL)
    assert tokenizer("fox red").input_ids == [4, 3]
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.padding_side) == (
        0,
        2,
        "left",
    )
    assert tokenizer.decode([4, 3]) == "fox red"


def test_the_words_of_a_dataset_are_those_of_all_splits_and_columns():
    rows = {"prompt": ["b a"], "answer": ["c"]}
    data = DatasetDict(one=Dataset.from_dict(rows), two=Dataset.from_dict({"prompt": ["d a"]}))
    assert words_of(data) == ["a", "b", "c", "d"]


@pytest.mark.parametrize(("special", "token"), [(SPECIAL, "<unk>"), (("<pad>", "<eos>"), "<pad>")])
def test_an_unlisted_word(special, token):
    tokenizer = word_tokenizer(["red"], special)
    assert tokenizer.convert_ids_to_tokens(tokenizer("blue").input_ids) == [token]


def test_the_llama_has_the_tokenizers_tokens_and_the_asked_for_size():
    tokenizer = word_tokenizer(["red", "fox"])
    config = word_llama(tokenizer, width=64, layers=2, context=16)
    assert LlamaForCausalLM(config).get_input_embeddings().weight.shape == (4, 64)
    assert (config.num_hidden_layers, config.max_position_embeddings) == (2, 16)
    assert (config.pad_token_id, config.eos_token_id) == (0, 1)


def test_changes_win_over_the_shared_arguments():
    assert cpu_arguments("out", 3)["report_to"] == "none"
    changed = cpu_arguments("out", 3, report_to="all", beta=0.1)
    assert (changed["seed"], changed["report_to"], changed["beta"]) == (3, "all", 0.1)


def test_options_know_their_folder():
    given = study_options("A study.\n\nMore.", "runs/one").parse_args(["--seeds", "1", "2"])
    assert (given.seeds, str(given.folder), given.quick) == ([1, 2], "runs/one", False)


def test_error_is_that_of_the_mean():
    values = [1.0, 2.0, 4.0]
    mean, error = mean_and_error(values)
    assert mean == pytest.approx(7 / 3)
    assert error == pytest.approx(statistics.stdev(values) / 3**0.5)


def test_unknown_values_do_not_count():
    assert mean_and_error([1.0, None, math.nan, 3.0]) == mean_and_error([1.0, 3.0])


@pytest.mark.parametrize(
    ("values", "form", "text"),
    [
        ([0.5, 0.7], ".2f", "0.60 ± 0.10"),
        ([0.5, 0.7], "+.2f", "+0.60 ± 0.10"),
        ([0.25], ".2f", "0.25"),
        ([math.nan], ".2f", "–"),
        ([], ".2f", "–"),
        ([math.inf, 1.0], ".1e", "inf"),
    ],
)
def test_figures_as_text(values, form, text):
    assert over_seeds(values, form) == text
