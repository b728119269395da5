"""Bounds on the likelihood of reference answers: what is scored, and what is said of the rest."""

import copy
import math

import pytest
import torch
from datasets import Dataset

from tests.runs import TOKENIZER, build, by_letters, vowels
from tests.tiny import tiny_llama, tiny_prompts
from trl_ext import GenerationEvaluator, GRPOTrainer, JEPOTrainer, OnlineDPOTrainer
from trl_ext.evals import evaluate_generations
from trl_ext.evals.metrics import nll_bounds
from trl_ext.evals.sampling import Completion
from trl_ext.objectives.jepo import bound_estimate

EOS = TOKENIZER.eos_token
THOUGHTS = ["ab#xy", "c#", "nothing", "#"]  # of each prompt in turn
OPTIONS = {"num_generations": 4, "max_completion_length": 6, "marker": "#", "answer_prefix": ""}


@pytest.fixture
def spoken(monkeypatch):
    """Puts given thoughts in the place of samples, group by group."""

    def put(texts):
        def sample_all(model, prompt_ids, config, batch_size):
            ids = [TOKENIZER(texts[i % len(texts)]).input_ids for i in range(len(prompt_ids))]
            return [Completion([*row, TOKENIZER.eos_token_id], truncated=False) for row in ids]

        monkeypatch.setattr("trl_ext.evals.sampling.sample_all", sample_all)

    put(THOUGHTS)
    return put


def evaluate(rewards=None, dataset=None, policy=None, **options):
    return evaluate_generations(
        tiny_llama(len(TOKENIZER)) if policy is None else policy,
        TOKENIZER,
        tiny_prompts(3) if dataset is None else dataset,
        rewards,
        **{"disable_tqdm": True, **OPTIONS, **options},
    )


def by_hand(context, answer):
    """log π(answer | context) of a row alone."""
    context, answer = TOKENIZER(context).input_ids, TOKENIZER(answer).input_ids
    with torch.no_grad():
        logits = tiny_llama(len(TOKENIZER))(torch.tensor([context + answer])).logits[0]
    logp_TV = logits.double().log_softmax(-1)
    places = range(len(context) - 1, len(context) + len(answer) - 1)
    return sum(logp_TV[t, token].item() for t, token in zip(places, answer, strict=True))


@pytest.mark.parametrize("eos", [True, False])
@pytest.mark.parametrize("conversational", [False, True])
def test_the_answer_is_scored_behind_the_marker(eos, conversational, spoken):
    answers = ["7", "a longer one " * 9, "?"]
    dataset = Dataset.from_dict(
        {"prompt": tiny_prompts(3, conversational)["prompt"], "answer": answers}
    )
    found_PG = evaluate(dataset=dataset, answer_eos=eos).answer_logp_PG
    for p, (text, answer) in enumerate(zip(tiny_prompts(3)["prompt"], answers, strict=True)):
        prompt = f"<s><user>{text}<assistant>" if conversational else text
        told = answer + EOS * eos
        expected = [by_hand(prompt + c, told) for c in ("ab#", "c#", "", "#")]
        expected[2] = math.nan
        assert found_PG[p].tolist() == pytest.approx(expected, abs=1e-4, nan_ok=True)


def test_batches_and_their_padding_change_nothing(spoken):
    whole = evaluate().answer_logp_PG
    single = evaluate(batch_size=1).answer_logp_PG
    torch.testing.assert_close(single, whole, equal_nan=True, atol=1e-5, rtol=0)


def test_without_a_thought_all_bounds_are_the_likelihood():
    numbers = evaluate(marker="", ks=[1, 2, 4]).metrics("")
    rows = zip(*tiny_prompts(3).to_dict().values(), strict=True)
    expected = -sum(by_hand(prompt, answer + EOS) for prompt, answer in rows) / 3
    for k in (1, 2, 4):
        assert numbers[f"nll_L{k}"] == pytest.approx(expected, abs=1e-4)
    assert numbers["marked_rate"] == 1


def test_the_numbers_are_the_bounds_of_marked_thoughts(spoken):
    result = evaluate(vowels)
    logp_PG, numbers = result.answer_logp_PG, result.metrics("")
    assert logp_PG is not None
    marked_P3 = logp_PG[~logp_PG.isnan()].view(3, 3)
    for k in (1, 2):
        bound_P = -bound_estimate(marked_P3, k)
        assert numbers[f"nll_L{k}"] == pytest.approx(bound_P.mean().item(), abs=1e-6)
        assert numbers[f"nll_L{k}_se"] == pytest.approx(bound_P.std().item() / 3**0.5, abs=1e-6)
    assert numbers["nll_L1"] > numbers["nll_L2"]
    assert math.isnan(numbers["nll_L4"])  # no prompt has four thoughts with a marker
    assert numbers["marked_rate"] == 0.75 and numbers["unscorable_rate"] == 0
    assert 0 <= numbers["pass@1"] <= numbers["pass@4"] <= 1


def test_a_prompt_with_too_few_marked_thoughts_takes_no_part():
    logp_PG = torch.tensor([[-1.0, -3.0], [math.nan, -5.0], [math.nan, math.nan]])
    bounds = nll_bounds(logp_PG, (1, 2))
    assert bounds["nll_L1"].tolist() == pytest.approx([2.0, 5.0, math.nan], nan_ok=True)
    log_mean = math.log((math.exp(-1) + math.exp(-3)) / 2)
    expected = pytest.approx([-log_mean, math.nan, math.nan], nan_ok=True)
    assert bounds["nll_L2"].tolist() == expected


def test_without_reward_functions_only_the_likelihood_is_reported():
    result = evaluate(marker="")
    names = {name for name in result.metrics("") if not name.endswith("_se")}
    bounds = {"nll_L1", "nll_L2", "nll_L4", "marked_rate"}
    assert names == bounds | {"mean_length", "truncation_rate"}
    assert result.rewards_PG is None


def test_thoughts_are_samples_of_the_policy_itself():
    policy = tiny_llama(len(TOKENIZER))
    plain = evaluate(vowels, policy=policy, marker="a")
    filtered = copy.deepcopy(policy)
    filtered.generation_config.update(min_p=0.5, typical_p=0.2, epsilon_cutoff=0.1, top_k=1)
    again = evaluate(vowels, policy=filtered, marker="a")
    assert torch.equal(plain.lengths_PG, again.lengths_PG)
    torch.testing.assert_close(plain.answer_logp_PG, again.answer_logp_PG, equal_nan=True)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.7},
        {"top_p": 0.9},
        {"top_k": 5},
        {"generation_kwargs": {"typical_p": 0.8}},
        {"generation_kwargs": {"repetition_penalty": 1.1}},
        {"temperature": 0, "num_generations": 1},
    ],
)
def test_other_samplers_are_refused(options):
    with pytest.raises(ValueError, match=r"marker='#' with .*marker=None"):
        evaluate(**options)
    harmless = {"repetition_penalty": 1.0, "max_new_tokens": 3}
    assert evaluate(marker="", generation_kwargs=harmless).rewards_PG is None


def test_what_else_is_refused():
    with pytest.raises(ValueError, match="marker=None leaves nothing"):
        evaluate(marker=None)
    with pytest.raises(ValueError, match=r"\['prompt', 'answer'\]"):
        evaluate(dataset=tiny_prompts(3).remove_columns("answer"))
    with pytest.raises(ValueError, match="column 'answer' holds 7"):
        evaluate(dataset=Dataset.from_dict({"prompt": ["1="], "answer": [7]}), marker="")
    with pytest.raises(ValueError, match=r"column 'answer' holds ''.*Fill it in"):
        evaluate(dataset=Dataset.from_dict({"prompt": ["1="], "answer": [""]}), marker="")
    with pytest.raises(ValueError, match=r"reference answer of one row have 6.*embeddings=512"):
        evaluate(dataset=Dataset.from_dict({"prompt": ["1="], "answer": ["7" * 600]}), marker="")
    with pytest.raises(ValueError, match="marker='→' is '<unk>' once tokenised"):
        evaluate(marker="→")


# In a trainer


def trainer_with(folder, evaluator, trainer=JEPOTrainer, **options):
    arguments = {"eval_dataset": tiny_prompts(2), "callbacks": [evaluator]}
    own = {} if trainer is GRPOTrainer else {"marker": "", "combine_with_reward": False}
    return build(trainer, folder, arguments=arguments, **{**own, **options})


@pytest.mark.parametrize("rewards", [None, vowels])
def test_in_jepo_the_bounds_stand_beside_the_accuracy(rewards, tmp_path):
    evaluator = GenerationEvaluator(rewards, num_generations=4)
    trainer = trainer_with(tmp_path, evaluator, answer_prefix="", answer_eos=False)
    numbers = trainer.evaluate()
    assert numbers["eval_nll_L1"] == pytest.approx(numbers["eval_nll_L4"])
    rows = zip(*tiny_prompts(2).to_dict().values(), strict=True)
    expected = -sum(by_hand(prompt, answer) for prompt, answer in rows) / 2
    assert numbers["eval_nll_L1"] == pytest.approx(expected, abs=1e-4)
    assert ("eval_pass@1" in numbers) == (rewards is not None)


def test_other_trainers_report_no_bound_unless_told(tmp_path):
    trainer = trainer_with(tmp_path, GenerationEvaluator(num_generations=2), GRPOTrainer)
    numbers = trainer.evaluate()
    assert "eval_pass@1" in numbers and "eval_nll_L1" not in numbers
    told = GenerationEvaluator(num_generations=2, marker="")
    numbers = trainer_with(tmp_path, told, GRPOTrainer).evaluate()
    assert {"eval_pass@1", "eval_nll_L1"} < set(numbers)


def test_a_marker_that_no_completion_can_have_is_refused_before_training(tmp_path):
    with pytest.raises(ValueError, match="marker='→' is '<unk>' once tokenised"):
        trainer_with(tmp_path, GenerationEvaluator(vowels, marker="→"), GRPOTrainer)


def test_greedy_accuracy_in_jepo_goes_without_bounds(tmp_path):
    greedy = {"temperature": 0, "num_generations": 1}
    with pytest.raises(ValueError, match="set marker=None"):
        trainer_with(tmp_path, GenerationEvaluator(vowels, **greedy))
    evaluator = GenerationEvaluator(vowels, marker=None, **greedy)
    numbers = trainer_with(tmp_path, evaluator).evaluate()
    assert "eval_pass@1" in numbers and "eval_nll_L1" not in numbers


def test_scores_that_no_function_gives_are_not_taken_for_rewards(tmp_path):
    """A judge's win rates belong to the round that was judged."""
    arguments = {"eval_dataset": tiny_prompts(2), "callbacks": [GenerationEvaluator()]}
    trainer = build(OnlineDPOTrainer, tmp_path, arguments=arguments, judge=by_letters)
    with pytest.raises(ValueError, match="reward_funcs=None"):
        trainer.evaluate()
