"""Each trainer raises its own objective on prompts it has not seen."""

import pytest

from tests.runs import OURS, build
from tests.tiny import tiny_llama, tiny_prompts, tiny_tokenizer
from trl_ext import (
    AGROTrainer,
    GRPOTrainer,
    JEPOTrainer,
    MajorityVoteTrainer,
    MTPOTrainer,
    NashTrainer,
    OnlineDPOTrainer,
    PassAtKTrainer,
    VinePPOTrainer,
)
from trl_ext.evals import evaluate_generations

TOKENIZER = tiny_tokenizer("0123456789+=ab")


def twice_the_same(completions, **_):
    """A pattern over two tokens, which a policy has to find: about one completion in twenty."""
    return [float(len(c) > 1 and c[0] == c[1] and c[0].isdigit()) for c in completions]


def the_same_twice(prompts, first, second):
    """A judge who likes that pattern, and else cannot tell."""
    wins = zip(twice_the_same(first), twice_the_same(second), strict=True)
    return [0.5 + 0.5 * (a - b) for a, b in wins]


def first_digit(text):
    return text[0] if text[:1].isdigit() else None


OBJECTIVE = {
    GRPOTrainer: ("pass@1", {"beta": 0.01}),
    PassAtKTrainer: ("pass@4", {"k": 4, "beta": 0.0}),
    MajorityVoteTrainer: ("maj@4", {"k": 4, "beta": 0.0, "answer_extractor": first_digit}),
    OnlineDPOTrainer: ("pass@1", {"beta": 0.1}),
    AGROTrainer: ("pass@1", {"beta": 0.01}),
    # The answers say nothing of the pattern: likelihood has the small weight of short answers.
    JEPOTrainer: (
        "pass@1",
        {
            **{"combine_with_reward": True, "marker": "a", "format_penalty": 0.0},
            **{"supervised_coef": 0.01, "beta": 0.01},
        },
    ),
    MTPOTrainer: ("pass@1", {"judge": the_same_twice, "beta": 0.01}),
    NashTrainer: ("pass@1", {"algorithm": "nash_md", "judge": the_same_twice, "beta": 0.01}),
    VinePPOTrainer: ("pass@1", {"beta": 0.0, "splitter": "tests.runs:each_letter"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("trainer", OURS, ids=lambda t: t.__name__)
def test_own_objective_rises_on_held_out_prompts(trainer, tmp_path):
    objective, options = OBJECTIVE[trainer]
    prompts = tiny_prompts(48)
    train, held_out = prompts.select(range(32)), prompts.select(range(32, 48))
    model = tiny_llama(len(TOKENIZER), hidden=64)

    def measured():
        result = evaluate_generations(
            model,
            TOKENIZER,
            held_out,
            [twice_the_same],
            num_generations=16,
            answer_extractor=first_digit,
            max_completion_length=3,
            disable_tqdm=True,
        )
        return result.metrics("")

    before = measured()
    run = build(
        trainer,
        tmp_path,
        model=model,
        arguments={
            "train_dataset": train,
            "reward_funcs": None if "judge" in options else twice_the_same,
            "processing_class": TOKENIZER,
        },
        max_steps=40,
        per_device_train_batch_size=64,
        num_generations=8,
        max_completion_length=3,
        learning_rate=3e-3,
        **options,
    )
    run.train()
    after = measured()
    noise = (before[f"{objective}_se"] ** 2 + after[f"{objective}_se"] ** 2) ** 0.5
    print(objective, before[objective], after[objective], noise)
    assert after[objective] > before[objective] + 0.2 + 3 * noise
