"""What TRL asks of every reward function, and what a YAML asks of a named one."""

import inspect
import pickle
import subprocess
import sys

import pytest

import trl_ext.rewards
from trl_ext.rewards import (
    boxed_answer_reward,
    exact_match_reward,
    format_reward,
    length_reward,
    math_reward,
    with_options,
)

REWARDS = [
    boxed_answer_reward,
    exact_match_reward,
    format_reward,
    length_reward,
    math_reward,
]
TEXTS = ["7", r"\boxed{7}", "<think>3 + 4</think> \\boxed{7}", r"\boxed{8}"]
EXTRAS = {
    "prompts": ["3 + 4 ="] * 4,
    "completion_ids": [[1] * n for n in (1, 17_000, 19_000, 30_000)],
    "answer": ["7"] * 4,
    "difficulty": [1, 2, 3, 4],
    "trainer_state": object(),
    "environments": [None] * 4,
    "log_extra": lambda column, values: None,
    "log_metric": lambda name, value: None,
}


def conversation(text: str) -> list[dict]:
    return [
        {"role": "assistant", "content": r"calls a tool \boxed{0}"},
        {"role": "tool", "content": r"\boxed{1}"},
        {"role": "assistant", "content": text},
        {"role": "tool", "content": r"\boxed{2}"},
    ]


def in_parts(text: str) -> list[dict]:
    parts = [{"type": "text", "text": text[:3]}, {"type": "text", "text": text[3:]}]
    return [{"role": "assistant", "content": parts}]


@pytest.mark.parametrize("reward", REWARDS)
def test_plain_and_conversational_completions_score_alike(reward):
    plain = reward(completions=TEXTS, **EXTRAS)
    assert len(plain) == 4 and all(isinstance(value, float) for value in plain)
    assert len(set(plain)) > 1
    for form in (conversation, in_parts, lambda text: [{"content": text}]):
        assert reward(completions=[form(text) for text in TEXTS], **EXTRAS) == plain


@pytest.mark.parametrize("reward", [boxed_answer_reward, format_reward, math_reward])
def test_a_conversation_without_assistant_text_earns_nothing(reward):
    completions = [[], [{"role": "tool", "content": r"\boxed{7}"}], [{"content": None}]]
    assert reward(completions=completions, answer=["7"] * 3) == [0.0] * 3


@pytest.mark.parametrize("reward", [boxed_answer_reward, format_reward, math_reward])
def test_what_is_no_completion_is_refused(reward):
    with pytest.raises(ValueError, match="completions holds a int"):
        reward(completions=[7], answer=["7"])


@pytest.mark.parametrize("reward", REWARDS)
def test_an_empty_batch_is_scored(reward):
    assert reward(completions=[], completion_ids=[], answer=[]) == []


def test_every_public_reward_is_in_these_tests():
    public = {name for name in trl_ext.rewards.__all__ if name.endswith("_reward")}
    assert public == {reward.__name__ for reward in REWARDS}


@pytest.mark.parametrize("reward", REWARDS)
def test_a_reward_is_a_function_that_can_be_sent_to_another_process(reward):
    assert inspect.isfunction(reward)
    assert pickle.loads(pickle.dumps(reward)) is reward


def test_options_are_bound_named_and_picklable():
    short = with_options(length_reward, max_length=10, buffer=5, name="short")
    assert short.__name__ == "short" and length_reward.__name__ == "length_reward"
    for reward in (short, pickle.loads(pickle.dumps(short))):
        assert reward.__name__ == "short"
        assert reward(completions=["x"], completion_ids=[[1] * 8]) == [-0.6]
    assert with_options(format_reward, pattern="a").__name__ == "format_reward"


@pytest.mark.parametrize(
    ("reward", "options", "message"),
    [
        (length_reward, {"max_len": 10}, "max_len: not an option .* buffer, max_length"),
        (length_reward, {"completion_ids": []}, "completion_ids: not an option"),
        (exact_match_reward, {"strict": True}, "strict: not an option .* none"),
        (length_reward, {"max_length": 10, "buffer": 11}, "buffer=11 exceeds"),
        (format_reward, {"pattern": "("}, "pattern="),
        (math_reward, {"limit_s": 0}, "limit_s=0"),
        (math_reward, {"log_metric": print}, "log_metric: not an option"),
    ],
)
def test_bad_options_are_refused_before_the_run(reward, options, message):
    with pytest.raises(ValueError, match=message):
        with_options(reward, **options)


def test_import_is_light():
    heavy = "{'torch', 'transformers', 'trl', 'datasets', 'math_verify', 'sympy'}"
    code = f"import sys, trl_ext.rewards; print({heavy} & sys.modules.keys())"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"
