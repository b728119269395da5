"""Who wins, who was not judged, and what the judge owes to the order."""

import math

import pytest
import torch
from datasets import Dataset

from tests.runs import build, logged, parameters
from tests.tiny import tiny_llama, tiny_tokenizer
from trl_ext import GRPOTrainer
from trl_ext.evals import WinRateEvaluator, evaluate_win_rate, sample_opponent

TOKENIZER = tiny_tokenizer()


def questions(n=6, conversational=False):
    rows = [{"prompt": f"{i}+{i}=", "completion": f"{2 * i}", "level": i} for i in range(n)]
    if conversational:
        for row in rows:
            row["prompt"] = [{"role": "user", "content": row["prompt"]}]
            row["completion"] = [{"role": "assistant", "content": row["completion"]}]
    return Dataset.from_list(rows)


def compete(dataset=None, policy=None, **options):
    return evaluate_win_rate(
        tiny_llama(len(TOKENIZER)) if policy is None else policy,
        TOKENIZER,
        questions() if dataset is None else dataset,
        **{"max_completion_length": 5, "disable_tqdm": True, **options},
    )


def text(completion):
    return completion if isinstance(completion, str) else completion[0]["content"]


def longer(prompts, first, second):
    """P(first beats second), hard, by the number of characters; a tie is 1/2."""
    lengths = zip(first, second, strict=True)
    return [
        0.5 + 0.5 * math.copysign(a != b, a - b) for a, b in ((len(f), len(s)) for f, s in lengths)
    ]


def length(completions, **kwargs):
    return [float(len(text(c))) for c in completions]


def test_judge_and_gold_reward_of_one_taste_agree():
    judged, gold = compete(judge=longer), compete(reward_func=length)
    assert torch.equal(judged.wins_PG, gold.wins_PG)
    assert torch.equal(judged.lengths_PG, gold.lengths_PG)
    numbers = gold.metrics()
    assert numbers["generation/gold_margin"] == pytest.approx(
        (gold.gold_PG - gold.opponent_gold_PG).mean().item()
    )
    assert gold.opponent_gold_PG.flatten().tolist() == [1.0] * 5 + [2.0]
    assert numbers["generation/gold_score"] == pytest.approx(gold.gold_PG.mean().item())
    assert numbers["generation/win_rate"] == judged.metrics()["generation/win_rate"]
    assert "generation/judge_inconsistency" not in numbers
    assert "generation/gold_score" not in judged.metrics()


def test_ties_are_half_a_win():
    def same(completions, **kwargs):
        return [1.0] * len(completions)

    assert compete(reward_func=same).metrics("")["win_rate"] == 0.5


@pytest.mark.parametrize("conversational", [False, True])
def test_judge_sees_both_orders_in_the_form_of_the_dataset(conversational):
    dataset, calls = questions(4, conversational), []

    def spy(prompts, first, second):
        calls.append((prompts, first, second))
        return [1.0] * len(prompts)

    result = compete(dataset, judge=spy, num_generations=2)
    (prompts, first, second), (again, swapped, back) = calls
    assert prompts == again == [p for p in dataset["prompt"] for _ in range(2)]
    assert (first, second) == (back, swapped)
    assert second == [c for c in dataset["completion"] for _ in range(2)]
    assert all(isinstance(c, list) == conversational for c in first)
    # A judge that always takes the first has no opinion, and contradicts itself every time.
    assert (result.wins_PG == 0.5).all()
    assert result.metrics("")["judge_inconsistency"] == 1.0
    once = compete(dataset, judge=spy, both_orders=False)
    assert once.metrics("")["win_rate"] == 1.0 and len(calls) == 3
    assert "judge_inconsistency" not in once.metrics("")


def test_position_bias_cancels():
    def biased(prompts, first, second):
        return [min(1.0, 0.8 * p + 0.2) for p in longer(prompts, first, second)]

    fair, skewed = compete(judge=longer), compete(judge=biased)
    assert torch.equal(skewed.wins_PG > 0.5, fair.wins_PG > 0.5)
    assert torch.equal(skewed.wins_PG == 0.5, fair.wins_PG == 0.5)
    expected = 0.8 * fair.wins_PG + 0.1
    torch.testing.assert_close(skewed.wins_PG, expected)
    assert skewed.metrics("")["judge_inconsistency"] == 0.0


@pytest.mark.parametrize("lost", [None, math.nan])
def test_what_cannot_be_judged_is_left_out_and_counted(lost):
    """A judge that is silent about every second pair, in one of the two orders."""
    calls = []

    def forgetful(prompts, first, second):
        calls.append(None)
        odd = len(calls) % 2
        return [lost if i % 2 and odd else float(odd) for i in range(len(prompts))]

    result = compete(judge=forgetful, num_generations=2)
    assert result.wins_PG.isnan().tolist() == [[False, True]] * 6
    numbers = result.metrics("")
    assert numbers["win_rate"] == 1.0 and numbers["unjudged_rate"] == 0.5
    assert numbers["judge_inconsistency"] == 0.0


def test_inconsistency_counts_pairs_that_were_judged_twice():
    def first_of_even(prompts, first, second):
        return [None if i % 2 else 1.0 for i in range(len(prompts))]

    result = compete(judge=first_of_even, num_generations=2)
    assert result.metrics("")["judge_inconsistency"] == 1.0


def test_nothing_judged_is_no_number():
    numbers = compete(judge=lambda p, f, s: [None] * len(p)).metrics("")
    assert math.isnan(numbers["win_rate"]) and numbers["unjudged_rate"] == 1.0


def test_unscorable_gold_is_left_out_and_counted():
    def half(completions, level, **kwargs):
        return [None if n % 2 else float(len(c)) for c, n in zip(completions, level, strict=True)]

    result, whole = compete(reward_func=half), compete(reward_func=length)
    assert result.wins_PG.isnan().flatten().tolist() == [False, True] * 3
    assert torch.equal(result.wins_PG[::2], whole.wins_PG[::2])
    numbers = result.metrics("")
    assert numbers["unjudged_rate"] == 0.5
    assert numbers["win_rate"] == pytest.approx(whole.wins_PG[::2].mean().item())


def test_gold_reward_gets_trl_contract():
    calls = []

    def spy(prompts, completions, completion_ids, level, trainer_state, **kwargs):
        calls.append((prompts, completions, completion_ids, level, trainer_state))
        return [0.0] * len(prompts)

    compete(reward_func=spy, num_generations=2, batch_size=4, trainer_state="state")
    assert len(calls) == 6  # three chunks of two prompts; ours, then theirs
    ours, theirs = calls[0], calls[1]
    assert ours[3] == theirs[3] == [0, 0, 1, 1] and ours[4] == "state"
    assert TOKENIZER.batch_decode(ours[2], skip_special_tokens=True) == ours[1]
    assert TOKENIZER.batch_decode(theirs[2]) == ["0</s>", "0</s>", "2</s>", "2</s>"]


def test_opponent_model_samples_with_noise_of_its_own():
    """Two equal policies: completions differ, and neither side wins more than chance allows."""
    dataset = Dataset.from_dict({"prompt": ["1+1="] * 200})
    policy = tiny_llama(len(TOKENIZER))
    result = compete(dataset, policy, judge=longer, opponent=tiny_llama(len(TOKENIZER)))
    numbers = result.metrics("")
    assert abs(numbers["win_rate"] - 0.5) < 3 * numbers["win_rate_se"]
    assert (result.wins_PG != 0.5).any()


def test_kept_completions_of_an_opponent_give_the_numbers_of_the_model():
    opponent, options = tiny_llama(len(TOKENIZER), seed=1), {"num_generations": 3}
    texts = sample_opponent(
        opponent, TOKENIZER, questions(), max_completion_length=5, disable_tqdm=True, **options
    )
    assert [len(group) for group in texts] == [3] * 6
    kept = compete(judge=longer, opponent=texts, **options)
    assert torch.equal(kept.wins_PG, compete(judge=longer, opponent=opponent, **options).wins_PG)


def test_reference_column_by_name_and_one_text_for_all_generations():
    renamed = questions().rename_column("completion", "chosen")
    assert torch.equal(
        compete(renamed, judge=longer, opponent="chosen", num_generations=2).wins_PG,
        compete(judge=longer, num_generations=2).wins_PG,
    )


def test_random_state_is_left_as_found():
    before = torch.get_rng_state()
    compete(judge=longer, opponent=tiny_llama(len(TOKENIZER)))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "neither"),
        ({"judge": longer, "reward_func": length}, "both"),
        ({"judge": longer, "opponent": "reference"}, "opponent='reference'"),
        ({"judge": longer, "opponent": [["a"]] * 5}, "5 groups"),
        ({"judge": longer, "opponent": [["a", "b"]] * 6}, r"\[2\] texts"),
        ({"judge": lambda p, f, s: [2.0] * len(p)}, "2.0 to pair 0"),
        ({"reward_func": torch.nn.Linear(1, 1)}, "Linear"),
        ({"judge": longer, "temperature": -1}, "temperature=-1"),
    ],
)
def test_bad_arguments_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        compete(**options)


def train(folder, *callbacks):
    arguments = {"callbacks": list(callbacks), "eval_dataset": questions(4)}
    trainer = build(GRPOTrainer, folder, arguments=arguments, eval_strategy="steps", eval_steps=1)
    trainer.train()
    return trainer


def test_evaluations_of_a_trainer_report_it_and_training_is_the_same_to_the_bit(tmp_path):
    opponent, sampled = tiny_llama(len(TOKENIZER), seed=1), []
    generate = opponent.generate
    opponent.generate = lambda **kwargs: sampled.append(1) or generate(**kwargs)
    evaluator = WinRateEvaluator(longer, opponent=opponent, num_generations=2)
    alone, watched = train(tmp_path / "a"), train(tmp_path / "b", evaluator)
    assert torch.equal(parameters(alone), parameters(watched))
    rows = [row for row in logged(watched) if "eval_generation/win_rate" in row]
    assert [row["step"] for row in rows] == [1, 2]
    rest = [row for row in logged(watched) if "eval_generation/win_rate" not in row]
    assert rest == logged(alone)
    assert len(sampled) == 1
    watched.evaluate(questions(3), metric_key_prefix="eval_other")
    assert len(sampled) == 2
    assert evaluator.results["eval_other"].wins_PG.shape == (3, 2)
    expected = compete(
        questions(4),
        watched.model,
        judge=longer,
        opponent=opponent,
        num_generations=2,
        max_completion_length=6,
        batch_size=8,
    )
    assert torch.equal(evaluator.results["eval"].wins_PG, expected.wins_PG)


def test_evaluator_refuses_before_training():
    with pytest.raises(ValueError, match="neither"):
        WinRateEvaluator()
    with pytest.raises(TypeError, match="both_order"):
        WinRateEvaluator(longer, both_order=True)
