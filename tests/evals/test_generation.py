"""Sampling and scoring with a tiny model: what reward functions see, and what stays untouched."""

import asyncio
import functools
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset

from tests.processes import run_two_ranks
from tests.tiny import tiny_llama, tiny_prompts, tiny_tokenizer
from trl_ext.evals import evaluate_generations
from trl_ext.evals.sampling import Completion, _until_end, generation_config, sample

TOKENIZER = tiny_tokenizer()


@functools.cache
def model():
    return tiny_llama(len(TOKENIZER))


def starts_with_letter(completions, **kwargs):
    """A reward that an untrained model earns sometimes."""
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [float(text[:1].isalpha()) for text in texts]


def evaluate(rewards=starts_with_letter, dataset=None, policy=None, **options):
    dataset = tiny_prompts(5) if dataset is None else dataset
    defaults = {"num_generations": 4, "max_completion_length": 6, "disable_tqdm": True}
    return evaluate_generations(
        policy or model(), TOKENIZER, dataset, rewards, **{**defaults, **options}
    )


def first_letter(text):
    return text[:1] or None


def test_same_arguments_same_numbers_whatever_the_global_seed():
    torch.manual_seed(1)
    first = evaluate()
    torch.manual_seed(2)
    again, other = evaluate(), evaluate(seed=1)
    assert torch.equal(first.rewards_PG, again.rewards_PG)
    assert torch.equal(first.lengths_PG, again.lengths_PG)
    assert not torch.equal(first.rewards_PG, other.rewards_PG)


def test_chunks_and_completions_of_a_prompt_draw_different_noise():
    twice = Dataset.from_dict({"prompt": ["1+1="] * 8})
    seen = []

    def record(completions, **kwargs):
        seen.extend(completions)
        return [0.0] * len(completions)

    evaluate(record, twice, batch_size=4)
    assert len(set(seen)) == len(seen) == 32


def test_random_states_and_training_modes_are_left_as_found():
    policy = tiny_llama(len(TOKENIZER)).train()
    policy.model.layers[0].eval()
    modes = [module.training for module in policy.modules()]
    random.seed(3), np.random.seed(4), torch.manual_seed(5)
    before = random.getstate(), str(np.random.get_state()), torch.get_rng_state()

    def noisy(completions, **kwargs):
        assert not policy.training
        return [random.random() + np.random.rand() + torch.rand(()).item() for _ in completions]

    first = evaluate(noisy, policy=policy)
    assert random.getstate() == before[0]
    assert str(np.random.get_state()) == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])
    assert [module.training for module in policy.modules()] == modes
    assert torch.equal(first.rewards_PG, evaluate(noisy, policy=policy).rewards_PG)


def test_random_state_survives_a_reward_that_raises():
    before = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError):
        evaluate(lambda completions, **kwargs: 1 / 0)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("conversational", [False, True])
def test_reward_functions_get_trl_contract(conversational):
    dataset, calls = tiny_prompts(5, conversational), []

    def spy(prompts, completions, completion_ids, answer, log_metric, log_extra, **kwargs):
        log_metric("a", 1.0), log_extra("b", [1])
        calls.append((prompts, completions, completion_ids, answer, kwargs))
        return [0.0] * len(prompts)

    # 2 prompts of 4 completions fit into a batch of 11
    result = evaluate(spy, dataset, batch_size=11, trainer_state="state")
    assert [len(call[0]) for call in calls] == [8, 8, 4]
    prompts, completions, ids, answers = ([x for c in calls for x in c[j]] for j in range(4))
    assert prompts == [p for p in dataset["prompt"] for _ in range(4)]
    assert answers == [a for a in dataset["answer"] for _ in range(4)]
    texts = TOKENIZER.batch_decode(ids, skip_special_tokens=True)
    if conversational:
        texts = [[{"role": "assistant", "content": text}] for text in texts]
    assert completions == texts
    assert result.lengths_PG.flatten().tolist() == [len(row) for row in ids]
    assert calls[0][4]["trainer_state"] == "state"


def test_conversational_prompts_are_rendered_by_the_chat_template():
    fed = []
    policy = tiny_llama(len(TOKENIZER))
    generate = policy.generate
    policy.generate = lambda **kwargs: fed.append(kwargs["input_ids"]) or generate(**kwargs)
    evaluate(dataset=tiny_prompts(1, conversational=True), policy=policy)
    assert TOKENIZER.decode(fed[0][0]) == "<s><user>0+0=<assistant>"


def test_left_padding_changes_nothing():
    config = generation_config(
        model(), TOKENIZER, {"max_new_tokens": 8, "temperature": 0, "top_p": 1.0, "top_k": 0}
    )
    prompts = [TOKENIZER(p)["input_ids"] for p in ("1+1=", "123+456+789+1234567=")]
    together = sample(model(), prompts, config)
    assert together == [sample(model(), [prompt], config)[0] for prompt in prompts]


def test_completion_ends_with_its_first_end_token():
    assert _until_end([5, 2, 7, 2], {2, 3}) == Completion([5, 2], truncated=False)
    assert _until_end([5, 6], {2, 3}) == Completion([5, 6], truncated=True)


def test_sampled_frequencies_match_the_model():
    """One token from one prompt: its probability is known, so pass@1 and truncation are too."""
    prompt, temperature = "7+8=", 1.7
    with torch.no_grad():
        logits = model()(torch.tensor([TOKENIZER(prompt)["input_ids"]])).logits[0, -1]
    p = (logits / temperature).softmax(-1)
    letter = torch.tensor([t.isalpha() for t in TOKENIZER.convert_ids_to_tokens(range(len(p)))])
    dataset = Dataset.from_dict({"prompt": [prompt] * 100})
    numbers = evaluate(
        dataset=dataset,
        num_generations=32,
        ks=[1],
        max_completion_length=1,
        temperature=temperature,
        batch_size=3200,
    ).metrics("")
    error = numbers["pass@1_se"]
    assert error < 0.01
    assert abs(numbers["pass@1"] - p[letter].sum().item()) < 3 * error
    truncated = 1 - p[TOKENIZER.eos_token_id].item()
    assert abs(numbers["truncation_rate"] - truncated) < 3 * numbers["truncation_rate_se"]
    assert numbers["mean_length"] == 1


def test_defaults_that_the_model_brings_do_not_change_the_distribution():
    policy = tiny_llama(len(TOKENIZER))
    policy.generation_config.update(top_k=1, top_p=0.1, temperature=0.1, repetition_penalty=9.0)
    texts = ([], [])

    def record(texts):
        return lambda completions, **kwargs: texts.extend(completions) or [0.0] * len(completions)

    evaluate(record(texts[0]), policy=policy, max_completion_length=20)
    evaluate(record(texts[1]), policy=model(), max_completion_length=20)
    assert texts[0] == texts[1]


def test_end_tokens_of_the_model_end_a_completion():
    policy = tiny_llama(len(TOKENIZER))
    policy.generation_config.eos_token_id = list(range(6, len(TOKENIZER)))
    result = evaluate(policy=policy, max_completion_length=20)
    assert result.lengths_PG.double().mean() < 2 and not result.truncated_PG.any()


def test_group_larger_than_the_batch_is_sampled_in_parts_and_scored_whole():
    sizes = []

    def spy(completions, **kwargs):
        sizes.append(len(completions))
        return [1.0] * len(completions)

    assert evaluate(spy, batch_size=3).rewards_PG.shape == (5, 4)
    assert sizes == [4] * 5


def test_rewards_are_weighted_summed_and_skipped_where_none():
    def position(completions, **kwargs):
        return [None if i % 4 == 0 else float(i % 4) for i in range(len(completions))]

    async def later(completions, **kwargs):
        await asyncio.sleep(0)
        return [None if i % 2 == 0 else 1.0 for i in range(len(completions))]

    result = evaluate([position, later], reward_weights=[2.0, 0.5], batch_size=8)
    expected = torch.tensor([torch.nan, 2.5, 4.0, 6.5], dtype=torch.float64).repeat(5, 1)
    torch.testing.assert_close(result.rewards_PG, expected, equal_nan=True)
    numbers = result.metrics()
    assert numbers["eval_unscorable_rate"] == 0.25
    assert numbers["eval_pass@1"] == 1.0 and numbers["eval_pass@2"] == 1.0
    assert numbers["eval_mean_reward"] == pytest.approx(13 / 3)
    assert result.correct_P.tolist() == [3] * 5
    assert "eval_maj@1" not in numbers


def test_votes_count_equal_answers():
    result = evaluate(answer_extractor=first_letter, temperature=0.1, num_generations=8)
    texts = []

    def record(completions, **kwargs):
        texts.extend(completions)
        return [0.0] * len(completions)

    evaluate(record, temperature=0.1, num_generations=8)
    for p in range(5):
        answers = [first_letter(text) for text in texts[8 * p : 8 * p + 8]]
        for i in range(8):
            for j in range(8):
                same = result.labels_PG[p, i] == result.labels_PG[p, j]
                assert same == (answers[i] == answers[j])
            assert (result.labels_PG[p, i] == -1) == (answers[i] is None)
    assert {"eval_maj@1", "eval_maj@8"} < set(result.metrics())


def test_extractor_by_name_is_the_function():
    by_name = evaluate(answer_extractor="tests.evals.test_generation:first_letter")
    assert torch.equal(by_name.labels_PG, evaluate(answer_extractor=first_letter).labels_PG)


def test_max_prompts_takes_the_first():
    whole, part = evaluate(batch_size=4), evaluate(batch_size=4, max_prompts=2)
    assert torch.equal(part.rewards_PG, whole.rewards_PG[:2])


def test_greedy_decoding_needs_no_luck():
    greedy = [evaluate(num_generations=1, temperature=0, seed=s).lengths_PG for s in (0, 1)]
    assert torch.equal(*greedy)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_generations": 0}, "num_generations=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"max_prompts": 0}, "max_prompts=0"),
        ({"ks": [8]}, "num_generations=4"),
        ({"seed": -1}, "seed=-1"),
        ({"temperature": 0}, "temperature=0"),
        ({"generation_kwargs": {"temperature": 0}}, "temperature=0"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"generation_kwargs": {"num_return_sequences": 2}}, "num_return_sequences"),
        ({"generation_kwargs": {"temprature": 2}}, "temprature"),
        ({"reward_weights": [1.0, 2.0]}, "reward_weights"),
        ({"answer_extractor": "no.such.module:f"}, "answer_extractor"),
        ({"answer_extractor": "tests.tiny"}, "answer_extractor"),
        ({"answer_extractor": lambda text: [text]}, "answer_extractor"),
        ({"rewards": []}, "reward_funcs"),
        ({"rewards": torch.nn.Linear(1, 1)}, "Linear"),
        ({"rewards": lambda completions, **kwargs: [1.0]}, "returned 1 rewards"),
        ({"rewards": lambda completions, **kwargs: [float("inf")] * 20}, "row 0"),
        ({"dataset": [{"prompt": "1"}]}, "datasets.Dataset"),
        ({"dataset": Dataset.from_dict({"question": ["1"]})}, "prompt"),
        ({"dataset": Dataset.from_dict({"prompt": []})}, "0 rows"),
    ],
)
def test_bad_arguments_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        evaluate(**options)


def test_unknown_option_is_refused():
    with pytest.raises(TypeError, match="num_generation"):
        evaluate(num_generation=4)


def test_sharded_model_is_refused():
    policy = tiny_llama(len(TOKENIZER))
    next(policy.parameters()).ds_id = 0  # how DeepSpeed marks a partitioned parameter
    with pytest.raises(ValueError, match="ZeRO-3"):
        evaluate(policy=policy)


WORKER = """
import sys
from tests.evals.test_generation import report
from tests.processes import leave
report(sys.argv[1])
leave()
"""


def report(path):
    """Evaluates as one of several processes and writes down what this one did and got."""
    scored = []

    def spy(prompts, completions, **kwargs):
        scored.extend(prompts)
        return starts_with_letter(completions)

    result = evaluate(spy, answer_extractor=first_letter, batch_size=8)
    tables = [result.rewards_PG, result.labels_PG, result.lengths_PG, result.truncated_PG]
    Path(path).write_text(json.dumps([len(scored), [table.tolist() for table in tables]]))


def test_two_processes_share_the_work_and_give_the_numbers_of_one(tmp_path):
    report(tmp_path / "single.json")
    run_two_ranks(lambda rank: ["-c", WORKER, str(tmp_path / f"{rank}.json")])
    names = ("single", "0", "1")
    (single, tables), (first, of_first), (second, of_second) = (
        json.loads((tmp_path / f"{name}.json").read_text()) for name in names
    )
    assert of_first == tables and of_second == tables
    # 5 prompts in chunks of 2, 2 and 1, dealt out in turn; 4 completions each
    assert (single, first, second) == (20, 12, 8)
