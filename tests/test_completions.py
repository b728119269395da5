"""Given completions as the policy would have sampled them."""

import pytest

from tests.tiny import tiny_tokenizer
from trl_ext.completions import completion_texts, completion_token_ids, tokenize_prompt

TOKENIZER = tiny_tokenizer()
EOS = TOKENIZER.eos_token_id
QUESTION = [{"role": "user", "content": "1+1="}]
ANSWER = [{"role": "assistant", "content": "2!"}]
# Writes a line break behind the end of each turn, as many templates do.
WITH_BREAKS = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
# Opens a thought in the generation prompt that old answers do not have.
WITHOUT_PREFIX = WITH_BREAKS.replace("<assistant>{% endif %}", "<assistant>think{% endif %}")


def tokens(prompt, completion, template=None, **chat_template_kwargs):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template or tokenizer.chat_template
    prompt_ids = tokenize_prompt(tokenizer, prompt, chat_template_kwargs)
    ids = completion_token_ids(tokenizer, prompt, completion, prompt_ids, chat_template_kwargs)
    return tokenizer.decode(ids), ids


@pytest.mark.parametrize("text", ["2!", " 2", ""])
def test_plain_text_ends_with_one_end_token(text):
    for given in (text, f"{text}</s>"):
        decoded, ids = tokens("1+1=", given)
        assert decoded == f"{text}</s>" and ids.count(EOS) == 1


def test_plain_text_gets_no_other_special_token():
    tokenizer = tiny_tokenizer()
    tokenizer.add_bos_token = True
    ids = completion_token_ids(tokenizer, "1", "2", tokenizer("1")["input_ids"])
    assert ids == [tokenizer.convert_tokens_to_ids("2"), EOS]


@pytest.mark.parametrize("answer", [ANSWER, "2!"])
def test_messages_are_what_the_template_writes_behind_the_prompt(answer):
    assert tokens(QUESTION, answer)[0] == "2!</s>"


def test_line_break_behind_the_last_end_is_not_sampled():
    assert tokens(QUESTION, ANSWER, WITH_BREAKS)[0] == "2!</s>"
    turns = [*ANSWER, *QUESTION, *ANSWER]
    decoded, _ = tokens(QUESTION, turns, WITH_BREAKS)
    assert decoded == "2!</s>\n<user>1+1=</s>\n<assistant>2!</s>"


def test_text_behind_the_last_end_is_kept():
    template = WITH_BREAKS.replace("{{ eos_token }}\n", "{{ eos_token }}.")
    assert tokens(QUESTION, ANSWER, template)[0] == "2!</s>."


def test_template_options_reach_prompt_and_completion():
    template = "{{ start }}" + WITH_BREAKS
    assert tokens(QUESTION, ANSWER, template, start="abc")[0] == "2!</s>"


def test_template_that_renders_another_prompt_is_refused_by_row():
    with pytest.raises(ValueError, match=r"2!.*1\+1=.*chat template"):
        tokens(QUESTION, ANSWER, WITHOUT_PREFIX)


def test_completion_of_no_tokens_is_refused():
    template = "{% for m in messages[:1] %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(ValueError, match="chat template"):
        tokens(QUESTION, ANSWER, template)


def test_mixed_forms_and_a_missing_end_are_refused():
    with pytest.raises(ValueError, match="same form"):
        tokens("1+1=", ANSWER)
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="eos_token=None"):
        completion_token_ids(tokenizer, "1", "2", [7])


def test_text_of_a_completion():
    parts = [{"role": "assistant", "content": [{"type": "text", "text": "a"}, {"text": "b"}]}]
    assert completion_texts(["x", ANSWER, parts, QUESTION]) == ["x", "2!", "ab", ""]
