"""Pairs of a dataset, of a record, of both: the loss stays, and an ordered replay is the run."""

import pytest
import torch
from datasets import Dataset

from tests.runs import (
    JUDGED,
    TOKENIZER,
    Gradients,
    build,
    by_letters,
    different,
    logged,
    parameters,
    relative,
    speak,
)
from tests.tiny import tiny_llama, tiny_prompts
from trl_ext import NashTrainer, OnlineDPOTrainer
from trl_ext.data import load_record, shuffled_in_blocks

# Of the logged rows, what a replay cannot know: it holds only the completions that were trained on.
OF_ALL_SAMPLES = ("num_tokens", "completions/", "reward", "frac_reward", "judge/", "epoch")
OF_PAIRS = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")


def preferences(n=8, conversational=False):
    """Prompts with a chosen and a rejected answer of different lengths."""

    def said(text):
        return [{"role": "assistant", "content": text}] if conversational else text

    prompts = tiny_prompts(n, conversational)["prompt"]
    return Dataset.from_dict(
        {
            "prompt": prompts,
            "chosen": [said("ab"[: 1 + i % 2] * 2) for i in range(n)],
            "rejected": [said("xyz"[: 1 + i % 3]) for i in range(n)],
        }
    )


def online(folder, **options):
    options = dict(record_path=str(folder / "record"), max_steps=4) | options
    run = build(OnlineDPOTrainer, folder / "online", **options)
    run.train()
    return run


def replay(folder, dataset, trained_on=2, **options):
    """Of 8 rows per micro-batch in groups of 4, those that were trained on."""
    options = (
        dict(
            pair_source="replay",
            num_generations=trained_on,
            per_device_train_batch_size=2 * trained_on,
            shuffle_dataset=False,
            max_steps=4,
        )
        | options
    )
    arguments = {"train_dataset": dataset}
    run = build(OnlineDPOTrainer, folder / "replay", arguments=arguments, **options)
    run.train()
    return run


def rows_of(run):
    return [
        {k: v for k, v in row.items() if k in OF_PAIRS or not k.startswith(OF_ALL_SAMPLES)}
        for row in logged(run, without=("staleness",))[:-1]
    ]


ROUNDS = {
    "plain": ({}, {}),
    "steps_per_generation": ({"steps_per_generation": 2}, {"steps_per_generation": 2}),
    "num_iterations": ({"num_iterations": 2}, {"num_iterations": 2}),
    "ipo": ({"loss_type": "ipo"}, {"loss_type": "ipo"}),
    "soft": (
        {"judge": by_letters, "soft_labels": True, "loss_type": "ipo"},
        {"loss_type": "ipo", "soft_labels": True},
    ),
}


@pytest.mark.parametrize("case", ROUNDS)
def test_ordered_replay_is_the_online_run_bit_for_bit(case, tmp_path):
    """K = 4 samples, of which the best and the worst were trained on."""
    options, again = ROUNDS[case]
    run = online(tmp_path, **options)
    repeated = replay(tmp_path, load_record(tmp_path / "record"), **again)
    assert torch.equal(parameters(repeated), parameters(run))
    assert rows_of(repeated) == rows_of(run)


def test_all_pairs_are_replayed_bit_for_bit(tmp_path):
    run = online(tmp_path, pair_rule="all_pairs")
    repeated = replay(tmp_path, load_record(tmp_path / "record"), trained_on=4)
    assert torch.equal(parameters(repeated), parameters(run))
    assert rows_of(repeated) == rows_of(run)


def test_two_epochs_are_recorded_and_replayed(tmp_path):
    """Four prompts, two per step: the second epoch samples them again."""
    short = {"train_dataset": tiny_prompts(4)}
    run = online(tmp_path, arguments=short, max_steps=4)
    record = load_record(tmp_path / "record")
    assert len(record) == 8 and len(set(record["prompt"])) == 4
    repeated = replay(tmp_path, record)
    assert torch.equal(parameters(repeated), parameters(run))


def test_shuffled_replay_is_another_run(tmp_path):
    run = online(tmp_path)
    record = load_record(tmp_path / "record")
    same = replay(tmp_path, shuffled_in_blocks(record, 1))
    other = replay(tmp_path, shuffled_in_blocks(record, len(record)))
    assert torch.equal(parameters(same), parameters(run))
    assert (parameters(other) - parameters(run)).abs().max() > 1e-3


def test_a_record_conserves_what_was_trained_on(tmp_path):
    """Every group of every round once, with its scores and pair, in the order of training."""
    scored = {}

    def remembered(prompts, completions, **_):
        values = [float(len(c)) for c in completions]
        for prompt, completion, value in zip(prompts, completions, values, strict=True):
            scored.setdefault(prompt, {})[completion] = value
        return values

    arguments = {"reward_funcs": remembered}
    online(tmp_path, arguments=arguments, steps_per_generation=2, num_iterations=2, max_steps=8)
    files = sorted(p.name for p in (tmp_path / "record").iterdir())
    assert files == ["round-000000-rank-000.parquet", "round-000001-rank-000.parquet"]
    record = load_record(tmp_path / "record")
    assert record["round"] == [0] * 4 + [1] * 4 and record["step"] == [0] * 4 + [4] * 4
    assert [v for row in record["version"] for v in row] == [0] * 8 + [4] * 8
    assert len(set(record["prompt"])) == 8
    for row in record:
        assert TOKENIZER.decode(row["prompt_ids"]) == row["prompt"]
        texts = [TOKENIZER.decode(ids, skip_special_tokens=True) for ids in row["completion_ids"]]
        values = scored[row["prompt"]]
        assert row["rewards"] == [values[text] for text in texts]
        tie = max(values.values()) == min(values.values())
        assert row["selected_weight"] == [0.0 if tie else 1.0]
        if not tie:
            assert row["rewards"] == [max(values.values()), min(values.values())]


def test_a_record_of_another_loss_trains_too(tmp_path):
    """Recorded pairs, scored by a policy and a loss of today."""
    online(tmp_path)
    record = load_record(tmp_path / "record")
    run = replay(tmp_path, record, loss_type="hinge", shuffle_dataset=True, max_steps=8)
    assert run.state.global_step == 8


# Of a dataset


def offline(folder, dataset, max_steps=2, learning_rate=1e-2, **options):
    caught = Gradients()
    run = build(
        OnlineDPOTrainer,
        folder,
        arguments={"train_dataset": dataset, "callbacks": [caught]},
        **(dict(pair_source="offline", num_generations=2, max_steps=max_steps) | options),
        learning_rate=learning_rate,
        shuffle_dataset=False,
    )
    run.train()
    return run, caught.steps


@pytest.mark.parametrize("conversational", [False, True])
def test_offline_trains_on_the_pairs_of_the_dataset(conversational, tmp_path):
    """The gradient is that of a sampler of just these completions, judged right."""
    data = preferences(4, conversational)
    options = dict(max_steps=1, learning_rate=0.0)
    run, (expected,) = offline(tmp_path, data, **options)
    assert run.state.log_history[0]["frac_ties"] == 0.0

    def text(row, i):
        said = row[("chosen", "rejected")[i]]
        return said if isinstance(said, str) else said[0]["content"]

    def rollout(prompts, trainer):
        by_prompt = {str(row["prompt"]): row for row in data}
        ids = [by_prompt[str(p)] for p in prompts]
        spoken = [TOKENIZER(text(row, i % 2)).input_ids for i, row in enumerate(ids)]
        ends = [[*tokens, TOKENIZER.eos_token_id] for tokens in spoken]
        return {"prompt_ids": given_ids(prompts), "completion_ids": ends, "logprobs": None}

    def given_ids(prompts):
        if isinstance(prompts[0], str):
            return TOKENIZER(list(prompts)).input_ids
        template = dict(add_generation_prompt=True, tokenize=True, return_dict=True)
        return TOKENIZER.apply_chat_template(list(prompts), **template)["input_ids"]

    def right(completions, **_):
        return [float(i % 2 == 0) for i in range(len(completions))]

    caught = Gradients()
    arguments = {"train_dataset": data, "rollout_func": rollout, "reward_funcs": right}
    arguments["callbacks"] = [caught]
    twin = build(
        OnlineDPOTrainer,
        tmp_path,
        arguments=arguments,
        num_generations=2,
        shuffle_dataset=False,
        **options,
    )
    twin.train()
    assert expected.norm() > 1e-3
    assert relative(expected, caught.steps[0]) <= 1e-6


def test_offline_learns_which_is_chosen_and_evaluates(tmp_path):
    run, _ = offline(tmp_path, preferences(8), max_steps=20)
    first, last = run.state.log_history[0], run.state.log_history[-2]
    assert first["rewards/margins"] == 0.0 and last["rewards/accuracies"] == 1.0
    assert last["rewards/margins"] > 0.5
    metrics = run.evaluate(eval_dataset=preferences(4).map(swap))
    assert metrics["eval_rewards/accuracies"] == 0.0, "the same pairs the other way round"


def swap(row):
    return {"chosen": row["rejected"], "rejected": row["chosen"]}


def test_at_the_reference_every_margin_is_0_and_accuracy_a_half(tmp_path):
    run, _ = offline(tmp_path, preferences(4), max_steps=1)
    assert run.state.log_history[0]["rewards/accuracies"] == 0.5


def test_hybrid_takes_the_pair_of_the_dataset_and_samples_for_the_kl(tmp_path):
    """The KL term pulls the policy back: with a large weight it stays nearer to the reference."""
    kl = {}
    for coefficient in (0.0, 5.0):
        options = dict(pair_source="hybrid", num_generations=4, kl_coef=coefficient)
        run, _ = offline(tmp_path, preferences(8), max_steps=30, **options)
        kl[coefficient] = sum(row["kl"] for row in run.state.log_history[-6:-1])
        assert run.state.log_history[-2]["rewards/accuracies"] > 0.5
    print("kl by kl_coef", kl)
    assert kl[5.0] < 0.8 * kl[0.0]


def test_hybrid_without_kl_is_offline_to_the_rounding(tmp_path):
    """The samples are drawn and weigh nothing."""
    data, options = preferences(4), dict(max_steps=1, learning_rate=0.0)
    hybrid = dict(pair_source="hybrid", num_generations=4, kl_coef=0.0)
    _, (mixed,) = offline(tmp_path, data, per_device_train_batch_size=16, **hybrid, **options)
    _, (pure,) = offline(tmp_path, data, per_device_train_batch_size=8, **options)
    assert relative(mixed, pure) <= 1e-5


def test_hybrid_one_step_ahead(tmp_path, monkeypatch):
    import trl_ext.trainers.background as background
    from tests.runs import Inline

    monkeypatch.setattr(background, "ProcessSampler", Inline)
    options = dict(pair_source="hybrid", num_generations=4, kl_coef=1.0, schedule="one_step")
    run, _ = offline(tmp_path, preferences(8), max_steps=3, **options)
    ages = [row["sampling/staleness_max"] for row in run.state.log_history[:-1]]
    assert ages == [0, 1, 1]


# What does not fit


@pytest.mark.parametrize(
    ("source", "data", "options", "message"),
    [
        ("offline", tiny_prompts(4), {}, "no column 'chosen'.*needs prompt, chosen and rejected"),
        (
            "offline",
            preferences(4).remove_columns("rejected"),
            {},
            "no column 'rejected'.*pair_source='offline'",
        ),
        ("replay", preferences(4), {}, "no record.*load_record; got columns"),
        ("hybrid", tiny_prompts(4), {"num_generations": 4, "kl_coef": 0.1}, "no column 'chosen'"),
    ],
)
def test_a_dataset_without_its_columns_is_refused(source, data, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        offline(tmp_path, data, pair_source=source, **options)


def test_a_record_with_other_groups_is_refused(tmp_path):
    online(tmp_path, max_steps=1)
    with pytest.raises(ValueError, match=r"num_generations=4: the record holds 2.*generations=2"):
        replay(tmp_path, load_record(tmp_path / "record"), trained_on=4)


@pytest.mark.parametrize(
    ("trainer", "options"),
    [(OnlineDPOTrainer, {"loss_type": "rloo"}), (NashTrainer, {"algorithm": "spo"})],
    ids=["rloo", "spo"],
)
def test_a_record_without_pairs_is_refused(trainer, options, tmp_path):
    record = {"record_path": str(tmp_path / "record"), "max_steps": 1}
    build(trainer, tmp_path, **record, **options).train()
    with pytest.raises(ValueError, match=r"record of a run without pairs.*compares pairs"):
        replay(tmp_path, load_record(tmp_path / "record"), trained_on=4)


@pytest.mark.parametrize("source", ["offline", "replay"])
def test_reward_functions_are_refused(source, tmp_path):
    arguments = {"reward_funcs": by_letters, "train_dataset": preferences(4)}
    options = dict(pair_source=source, num_generations=2)
    with pytest.raises(ValueError, match=r"reward_funcs=.*not applied.*recorded.*funcs=None"):
        build(OnlineDPOTrainer, tmp_path, arguments=arguments, **options)


@pytest.mark.parametrize("source", ["offline", "replay", "hybrid"])
@pytest.mark.parametrize("given", ["rollout_func", "tools", "use_transformers_continuous_batching"])
def test_who_else_would_write_the_completions_is_refused(source, given, tmp_path):
    own = {"num_generations": 4, "kl_coef": 0.1} if source == "hybrid" else {"num_generations": 2}
    data = {"train_dataset": preferences(4)}
    run = build(OnlineDPOTrainer, tmp_path, arguments=data, pair_source=source, **own)
    setattr(run, given, speak(different))
    with pytest.raises(ValueError, match=f"{given}.*pair_source='{source}'"):
        run._refuse_unsupported()


@pytest.mark.parametrize("trainer", JUDGED, ids=lambda t: t.__name__)
def test_record_files_of_a_judged_run(trainer, tmp_path):
    """Any trainer over groups may be recorded."""
    options = dict(record_path=str(tmp_path / "record"), judge=by_letters)
    run = build(trainer, tmp_path, model=tiny_llama(len(TOKENIZER)), **options)
    run.train()
    record = load_record(tmp_path / "record")
    assert len(record) == 4 and all(0 <= r <= 1 for row in record["rewards"] for r in row)
