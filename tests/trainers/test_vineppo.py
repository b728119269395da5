"""VinePPO's rounds: which prefixes are continued, how, and what is made of the rollouts."""

import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from accelerate.utils import gather_object
from transformers import LlamaForSequenceClassification

import trl_ext.trainers._seam as seam
from tests.processes import leave, run_two_ranks
from tests.runs import (
    TOKENIZER,
    build,
    different,
    each_second_letter,
    parameters,
    settings,
    speak,
    texts_of,
    told_rollouts,
    vowels,
)
from tests.tiny import CHARACTERS, tiny_llama, tiny_prompts, tiny_tokenizer
from trl_ext import VinePPOConfig, VinePPOTrainer
from trl_ext.rollouts.steps import step_starts
from trl_ext.trainers.vineppo import value_columns

EOS = TOKENIZER.eos_token_id


def text_of(ids):
    return TOKENIZER.decode(ids, skip_special_tokens=True)


def trainer(folder, **options):
    return build(VinePPOTrainer, folder, **{"beta": 0.0, "max_steps": 1, **options})


def watched(run):
    """The rounds that a run hands to the credit of tokens, and what that says."""
    rounds, honest = [], run.token_credit

    def credit(sampled):
        told = honest(sampled)
        rounds.append((sampled, told))
        return told

    run.token_credit = credit
    run.train()
    return rounds


def asked(run):
    """What is asked of the sampler of rollouts: prefixes, budgets, K."""
    calls, honest = [], run._continued

    def continued(*arguments):
        calls.append(arguments)
        return honest(*arguments)

    run._continued = continued
    run.train()
    return calls


# Prefixes


def test_each_step_of_each_completion_is_continued_from_its_sampled_ids(tmp_path):
    run = trainer(tmp_path, arguments={"rollout_func": speak(different)})
    ((prefixes, budgets, K),) = asked(run)
    spoken = {(p, different(p, i)) for p in run.train_dataset["prompt"] for i in range(4)}
    allowed = {
        (*TOKENIZER(prompt).input_ids, *TOKENIZER(text[:start]).input_ids)
        for prompt, text in spoken
        for start in [0, *each_second_letter(text)]
    }
    assert K == 2 and set(map(tuple, prefixes)) <= allowed
    lengths = {len(TOKENIZER(p).input_ids) for p in run.train_dataset["prompt"]}
    rows = zip(prefixes, budgets, strict=True)
    assert all(len(ids) + budget - 6 in lengths for ids, budget in rows)


def test_what_was_sampled_is_never_tokenised_again(tmp_path):
    """A token "ab" that no text is tokenised to: each rollout begins with it, and is scored so."""
    tokenizer = tiny_tokenizer([*CHARACTERS, "ab"])
    (joined,) = tokenizer.convert_tokens_to_ids(["ab"])
    assert joined not in tokenizer("abcd").input_ids and tokenizer.decode([joined]) == "ab"
    seen = []

    def judged(completions, completion_ids, **_):
        seen.append((completions, completion_ids))
        return [float(len(text)) for text in completions]

    def rollout(prompts, trainer):
        said = speak(lambda prompt, i: "c")(prompts, trainer)
        return {**said, "completion_ids": [[joined, *ids] for ids in said["completion_ids"]]}

    arguments = {"rollout_func": rollout, "reward_funcs": judged, "processing_class": tokenizer}
    run = trainer(tmp_path, model=tiny_llama(len(tokenizer)), arguments=arguments)
    ((prefixes, *_),) = asked(run)
    assert sorted(ids[-1] == joined for ids in prefixes) == [False, False, True, True]
    _, (texts, ids) = seen
    assert all(row[0] == joined for row in ids[2:4] + ids[6:8])
    assert [text[:2] for text in texts[2:4]] == ["ab", "ab"]


def test_rows_of_a_prompt_share_prefixes_and_prompts_share_none(tmp_path):
    """All say the same to all: one prompt's four rows are one row, two prompts are two."""
    run = trainer(tmp_path, arguments={"rollout_func": speak(lambda prompt, i: "abc")})
    ((prefixes, *_),) = asked(run)
    assert len(prefixes) == 2 * 2 and len(set(map(tuple, prefixes))) == 4
    same = tiny_prompts(1).select([0] * 16)
    again = trainer(
        tmp_path,
        arguments={"rollout_func": speak(lambda prompt, i: "abc"), "train_dataset": same},
    )
    ((prefixes, *_),) = asked(again)
    assert len(prefixes) == 2 * 2 and len(set(map(tuple, prefixes))) == 2


def test_columns_that_a_rollout_func_adds_keep_rows_apart(tmp_path):
    def rollout(prompts, trainer):
        said = speak(lambda prompt, i: "abcd")(prompts, trainer)
        return {**said, "wanted": [float(i) for i in range(len(prompts))]}

    def told(completions, wanted, **_):
        return wanted

    arguments = {"rollout_func": rollout, "reward_funcs": told}
    ((sampled, credit),) = watched(trainer(tmp_path, arguments=arguments))
    assert sampled.rewards_B.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
    assert not credit.credit_BT.any(), "each row's rollouts earn what the row does"


def test_every_token_of_a_completion_has_exactly_one_step_and_pads_have_none(tmp_path):
    """V4"""
    run = trainer(tmp_path, max_completion_length=7, num_generations=8)
    ((sampled, told),) = watched(run)
    lengths = [len(ids) for ids in sampled.completion_ids]
    assert len(set(lengths)) > 1 and sampled.mask_BT.sum(1).tolist() == lengths
    for ids, credit_T, mask_T in zip(
        sampled.completion_ids, told.credit_BT, sampled.mask_BT, strict=True
    ):
        starts = step_starts(TOKENIZER, ids, each_second_letter)
        for begin, end in zip(starts, [*starts[1:], len(ids)], strict=True):
            assert credit_T[begin:end].unique().numel() == 1
        assert not credit_T[mask_T == 0].any()


def test_an_end_inside_of_a_step_belongs_to_it(tmp_path):
    arguments = {"rollout_func": speak(lambda prompt, i: "abc")}
    ((sampled, told),) = watched(trainer(tmp_path, arguments=arguments))
    assert sampled.completion_ids[0][-1] == EOS
    assert told.credit_BT.any() and torch.equal(told.credit_BT[:, 2], told.credit_BT[:, 3])


(ALSO_AN_END,) = TOKENIZER("z").input_ids


@pytest.mark.parametrize("end", [EOS, ALSO_AN_END])
@pytest.mark.parametrize(("eos_step", "steps"), [(True, [2, 1, 2, 3]), (False, [1, 1, 2, 2])])
def test_an_end_behind_a_step_is_one_of_its_own_unless_told_otherwise(
    end, eos_step, steps, tmp_path
):
    """Of several ends that a model knows, not all are special to its tokenizer."""

    def rollout(prompts, trainer):
        said = speak(lambda prompt, i: ("ab", "", "abc", "abcd")[i])(prompts, trainer)
        said["completion_ids"] = [[*ids[:-1], end] for ids in said["completion_ids"]]
        return said

    run = trainer(tmp_path, eos_step=eos_step, arguments={"rollout_func": rollout})
    run.eos_token_ids = [EOS, ALSO_AN_END]
    ((sampled, told),) = watched(run)
    assert [len(ids) for ids in sampled.completion_ids] == [3, 1, 4, 5] * 2
    assert told.metrics["rollouts/steps"][0].tolist() == steps * 2
    with_the_step = torch.equal(told.credit_BT[::4, 1], told.credit_BT[::4, 2])
    assert with_the_step != eos_step
    assert torch.equal(told.credit_BT[2::4, 2], told.credit_BT[2::4, 3])


def test_a_completion_that_the_loss_leaves_out_is_not_continued(tmp_path):
    run = trainer(tmp_path, mask_truncated_completions=True, max_completion_length=3)
    run._sampled = lambda prompt_ids, *_: (
        [[10, 11, 12] if i % 2 else [10, 11, EOS] for i in range(len(prompt_ids))],
        None,
    )
    run._continued = told_rollouts
    ((sampled, told),) = watched(run)
    assert [len(ids) for ids in sampled.completion_ids] == [3, 0] * 4
    assert not told.credit_BT[1::2].any() and told.credit_BT.shape == (8, 3)


# Rollouts


def test_rollouts_are_sampled_under_the_completions_options(tmp_path, monkeypatch):
    seen, honest = [], seam.branch

    def branch(model, prefix_ids, generation_config, **options):
        seen.append((model, generation_config, options, model.training))
        return honest(model, prefix_ids, generation_config, **options)

    monkeypatch.setattr(seam, "branch", branch)
    run = trainer(tmp_path, temperature=0.6, top_p=0.9, num_rollouts=3)
    run.train()
    ((model, config, options, training),) = seen
    assert model is run.model, "values are of the weights of now"
    assert config is run.generation_config and (config.temperature, config.top_p) == (0.6, 0.9)
    assert (options["branches"], options["rows_per_pass"], training) == (3, 8, True)
    seen.clear()
    trainer(tmp_path, rollout_batch_size=5).train()
    assert seen[0][2]["rows_per_pass"] == 5


def test_rollouts_are_scored_as_completions_with_their_prefix_and_columns(tmp_path):
    seen = []

    def judged(prompts, completions, completion_ids, answer, **_):
        seen.append(list(zip(prompts, completions, completion_ids, answer, strict=True)))
        return vowels(completions)

    run = trainer(tmp_path, arguments={"reward_funcs": judged})
    calls = asked(run)
    own, rollouts = seen
    assert run._rewards_B.tolist() == vowels([text for _, text, *_ in own]), "still the round's own"
    answers = dict(zip(run.train_dataset["prompt"], run.train_dataset["answer"], strict=True))
    assert len(own) == 8 and len(rollouts) == 2 * len(calls[0][0])
    begun = {tuple(ids) for ids in calls[0][0]}
    for prompt, text, ids, answer in rollouts:
        assert answers[prompt] == answer and text == text_of(ids) and len(ids) <= 6
        whole = (*TOKENIZER(prompt).input_ids, *ids)
        assert any(whole[:n] in begun for n in range(len(whole)))


@pytest.mark.parametrize("template", [None, "response"])
def test_reward_functions_are_shown_messages_where_prompts_are_messages(
    template, tmp_path, monkeypatch
):
    seen = []

    def judged(completions, **_):
        seen.append(completions)
        return vowels(completions)

    if template:
        monkeypatch.setattr(TOKENIZER, "response_schema", {}, raising=False)
        parse = lambda tokenizer, ids, prefix, tools: {"role": "assistant", "content": "parsed"}  # noqa: E731
        monkeypatch.setattr(seam.grpo_trainer, "parse_response", parse)
    arguments = {"reward_funcs": judged, "train_dataset": tiny_prompts(16, conversational=True)}
    trainer(tmp_path, arguments=arguments).train()
    own, rollouts = ({tuple(message[0]) for message in said} for said in seen)
    assert own == rollouts == {("role", "content")}
    contents = {text for said in seen for text in texts_of(said)}
    assert (contents == {"parsed"}) == (template is not None)


def test_what_reward_functions_log_of_rollouts_is_left_out(tmp_path):
    def telling(completions, log_extra, log_metric, **_):
        log_extra("rows", [len(completions)] * len(completions))
        log_metric("rows", float(len(completions)))
        return vowels(completions)

    run = trainer(
        tmp_path,
        arguments={"reward_funcs": telling},
        log_completions=True,
        num_completions_to_print=0,
        max_steps=2,
    )
    run.train()
    assert [row["rows"] for row in run.state.log_history[:-1]] == [8.0, 8.0]
    table = pd.read_parquet(tmp_path / "completions" / "completions_00002.parquet")
    assert table["rows"].tolist() == [8] * 8


def test_a_reward_model_reads_no_more_rows_at_once_than_of_a_round(tmp_path):
    config = tiny_llama(len(TOKENIZER)).config
    config.num_labels = 1
    torch.manual_seed(0)
    model, read = LlamaForSequenceClassification(config), []
    model.register_forward_pre_hook(
        lambda _, __, kwargs: read.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    arguments = {"reward_funcs": model, "reward_processing_classes": TOKENIZER}
    run = trainer(tmp_path, num_rollouts=3, arguments=arguments)
    ((prefixes, *_),) = asked(run)
    assert sum(read) == 8 + 3 * len(prefixes) > 16 and set(read[:-1]) == {8} and read[-1] <= 8
    assert math.isfinite(run.state.log_history[0]["rollouts/value"])


def test_unscorable_rollouts_are_left_out_of_the_value(tmp_path):
    """Of K = 2 only the second is scored, and the first would have earned something else."""

    def some(completions, **_):
        if len(completions) == 8:
            return [1.0] * 8
        return [None if i % 2 == 0 else 0.25 for i in range(len(completions))]

    ((_, told),) = watched(trainer(tmp_path, arguments={"reward_funcs": some}))
    values, weights = told.metrics["rollouts/value"]
    assert weights.all() and set(values.tolist()) == {0.25}
    assert set(told.credit_BT.unique().tolist()) <= {0.0, 0.75}


def test_nothing_is_branched_in_evaluation(tmp_path):
    run = trainer(
        tmp_path, per_device_eval_batch_size=4, arguments={"eval_dataset": tiny_prompts(4)}
    )
    run._continued = None
    metrics = run.evaluate()
    assert math.isfinite(metrics["eval_loss"]) and "eval_rollouts/value" not in metrics


class FakeEngine:
    """What of TRL's `VLLMGeneration` is asked for completions: it says the letters on its list."""

    def __init__(self):
        self.asked = []

    def sync_weights(self):
        pass

    def generate(self, prompts, images, num_generations, profiler):
        self.asked.append((prompts, num_generations))
        ids = [[*range(10 + i % num_generations, 16), EOS] for i in range(len(prompts))]
        return None, ids, [[[-1.0]] * len(row) for row in ids], None


def served(run):
    """The run with a fake engine in place of the model's own sampling."""
    run.use_vllm, run._last_loaded_step = True, -1
    run.vllm_generation = FakeEngine()
    return run


def test_with_vllm_each_prefix_is_sent_k_times_and_cut_at_its_own_budget(tmp_path):
    run = served(trainer(tmp_path, num_rollouts=3, max_completion_length=7))
    calls, honest = [], run._continued

    def continued(prefix_ids, budgets, K):
        found = honest(prefix_ids, budgets, K)
        calls.append((prefix_ids, budgets, found))
        return found

    run._continued = continued
    run.train()
    ((prefixes, budgets, found),) = calls
    sent, K = run.vllm_generation.asked[1]
    assert K == 3 and sent == [ids for ids in prefixes for _ in range(3)]
    whole = [[*range(10 + k, 16), EOS] for k in range(3)]
    assert found == [[row[:budget] for row in whole] for budget in budgets]
    assert len({len(rows[0]) for rows in found}) > 1


def test_all_processes_send_the_engine_equally_many_prefixes(tmp_path, monkeypatch):
    """Another process has three more: what is sent in their stead is not heard."""
    monkeypatch.setattr(seam, "gather_object", lambda counts: [*counts, counts[0] + 3])
    run = served(trainer(tmp_path))
    found = run._continued([[5, 6], [7]], [9, 4], 2)
    ((sent, K),) = run.vllm_generation.asked
    assert K == 2 and sent == [[5, 6], [5, 6], [7], [7], *[[EOS]] * 6]
    assert [[len(row) for row in rows] for rows in found] == [[7, 6], [4, 4]]


def test_without_any_prefix_the_engine_is_left_alone(tmp_path):
    run = served(trainer(tmp_path))
    assert run._continued([], [], 2) == [] and run.vllm_generation.asked == []


class Together(FakeEngine):
    """Waits for all processes, as TRL's engines do, and counts what each of them sends."""

    def generate(self, prompts, images, num_generations, profiler):
        assert len(set(gather_object([len(prompts)]))) == 1
        return super().generate(prompts, images, num_generations, profiler)


def each_with_prefixes_of_its_own(folder):
    """On each of two ranks: its completions have other steps than those of the other, and of three
    groups the middle one is on both."""

    def said(prompt, i):
        return "abcdefgh"[: 1 + i] if torch.distributed.get_rank() else "a"

    for engine in (None, Together()):
        arguments = {"rollout_func": speak(said), "train_dataset": tiny_prompts(16)}
        options = {"per_device_train_batch_size": 6, "vllm_importance_sampling_correction": False}
        run = trainer(folder, arguments=arguments, **options)
        if engine is not None:
            served(run).vllm_generation = engine
        (sampled, told), *_ = watched(run)
        rows = zip(sampled.labels, map(tuple, sampled.prompt_ids), strict=True)
        assert len(set(rows)) == len(set(sampled.labels)) == 2
        prefixes = len(told.metrics["rollouts/value"][0])
        assert gather_object([prefixes]) == [2, 6], "or else nothing was tried"
        assert run.state.log_history[0]["rollouts/prefixes"] == (2 + 6) / 12
    leave()


def test_processes_with_different_numbers_of_prefixes_do_not_wait_for_each_other(tmp_path):
    run_two_ranks(lambda rank: ["-m", "tests.trainers.test_vineppo", str(tmp_path)])


# What is made of them


def test_whitened_advantages_have_mean_0_and_deviation_1_over_tokens(tmp_path):
    ((sampled, told),) = watched(trainer(tmp_path, whiten=True))
    values = told.credit_BT[sampled.mask_BT.bool()]
    assert float(values.mean()) == pytest.approx(0.0, abs=1e-5)
    assert float(values.std()) == pytest.approx(1.0, rel=1e-2)


def test_the_table_shows_values_along_the_steps_and_where_the_solution_was_lost(tmp_path):
    """Who says "b" has lost: by the rollouts' own letters no value says so before."""

    def without_b(completions, **_):
        return [float("b" not in text) for text in texts_of(completions)]

    def rollouts(prefix_ids, budgets, K):
        return [[[EOS]] * K for _ in prefix_ids]

    def spoken(prompt, i):
        return ("aaa", "aab", "aba", "a")[i]

    run = trainer(
        tmp_path,
        arguments={"rollout_func": speak(spoken), "reward_funcs": without_b},
        log_completions=True,
        log_values=True,
        num_completions_to_print=1,
    )
    run._continued = rollouts
    run.train()
    table = pd.read_parquet(tmp_path / "completions" / "completions_00001.parquet")
    first = table.iloc[:4]
    values = [list(row) for row in first["values"]]
    assert values == [[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1]]
    assert first["lost_step"].fillna("").tolist() == ["", "b", "ab", ""]
    assert first["lost_at_step"].fillna(-1).tolist() == [-1, 1, 0, -1]
    assert first["advantage"].tolist() == pytest.approx([0.0, -1 / 2, -1 / 2, 0.0])


def test_the_table_names_an_end_that_lost_the_solution():
    ids = TOKENIZER("ab").input_ids
    sampled = SimpleNamespace(completion_ids=[[*ids, EOS]], rewards_B=torch.zeros(1))
    values, lost = torch.tensor([[1.0, 1.0]]), torch.tensor([[0.0, -1.0]])
    columns = value_columns(TOKENIZER, sampled, [[0, 2]], values, lost)
    expected = {"values": [[1, 1, 0]], "lost_at_step": [1], "lost_step": [TOKENIZER.eos_token]}
    assert columns == expected


def test_the_table_knows_what_could_not_be_scored(tmp_path):
    """The only rollouts that are scored are those of the whole: the row's one step is lost."""

    def some(completions, **_):
        texts = texts_of(completions)
        if len(texts) == 8:
            return [0.0, None] * 4
        return [1.0 if len(text) < 2 else None for text in texts]

    run = trainer(
        tmp_path,
        arguments={"rollout_func": speak(lambda prompt, i: "abcde"), "reward_funcs": some},
        **{"log_completions": True, "log_values": True, "num_completions_to_print": 0},
    )
    run._continued = lambda prefix_ids, budgets, K: [[[EOS]] * K for _ in prefix_ids]
    run.train()
    table = pd.read_parquet(tmp_path / "completions" / "completions_00001.parquet")
    known = [[None if math.isnan(v) else v for v in map(float, row)] for row in table["values"]]
    assert known[:2] == [[1.0, None, None, 0.0], [1.0, None, None, None]]
    assert table["lost_step"].fillna("").tolist()[:2] == ["ab", ""]
    assert table["lost_at_step"].fillna(-1).tolist()[:2] == [0, -1]
    assert run.state.log_history[0]["rollouts/value"] == 1.0, "the mean over what was scored"


def test_metrics_count_steps_prefixes_and_rollouts(tmp_path):
    run = trainer(tmp_path, arguments={"rollout_func": speak(lambda prompt, i: "abc")})
    run.train()
    row = run.state.log_history[0]
    assert (row["rollouts/steps"], row["rollouts/prefixes"], row["rollouts/samples"]) == (2, 0.5, 1)
    assert row["perf/branching_s"] > 0


# Refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale_rewards": "group"}, "scale_rewards='group' is not applied.*Leave it at 'none'"),
        ({"multi_objective_aggregation": "normalize_then_sum"}, "is not applied: a value is"),
        ({"importance_sampling_level": "sequence"}, "='sequence' is not applied: one ratio per"),
        ({"vllm_structured_outputs_regex": "a+"}, "='a.' is not applied: the pattern would begin"),
        ({"num_rollouts": 0}, "num_rollouts=0 is no count"),
        ({"num_rollouts": 2.5}, r"num_rollouts=2\.5 is no count"),
        ({"num_rollouts": None}, "num_rollouts=None is no count"),
        ({"min_step_tokens": None}, "min_step_tokens=None is no count"),
        ({"min_step_tokens": 0}, "min_step_tokens=0"),
        ({"max_steps_per_completion": 0}, "max_steps_per_completion=0"),
        ({"rollout_batch_size": 0}, "rollout_batch_size=0"),
        ({"log_values": True}, "log_values=True is not applied.*log_completions=True"),
        ({"splitter": "words"}, "splitter='words' names no function"),
        ({"splitter": None}, "splitter=None says not where steps begin. Give 'lines'"),
    ],
    ids=str,
)
def test_config_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        VinePPOConfig("out", **settings(**options))


def test_loss_types_that_divide_by_lengths_warn():
    with pytest.warns(UserWarning, match=r"loss_type='dapo' reweighs.*VinePPOConfig") as caught:
        VinePPOConfig("out", **settings(loss_type="dapo"))
    assert __file__ in {warning.filename for warning in caught}


@pytest.mark.parametrize("splitter", ["lines", "sentences", each_second_letter])
def test_a_splitter_survives_json_and_pickle_by_its_name(splitter):
    import json
    import pickle

    args = VinePPOConfig("out", **settings(splitter=splitter))
    name = splitter if isinstance(splitter, str) else "tests.runs:each_second_letter"
    assert json.loads(args.to_json_string())["splitter"] == name
    assert pickle.loads(pickle.dumps(args)).split is args.split


def tool(a: int) -> int:
    """Adds one.

    Args:
        a: a number.
    """
    return a + 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tools": [tool]}, "does not support tools: a tool would have to be"),
        ({"environment_factories": {"": object}}, "does not support environment_factory"),
        ({"_is_vlm": True}, "does not support a vision-language model"),
        ({"is_fsdp_enabled": True}, "FSDP or DeepSpeed without vLLM.*use_vllm=True, or use DDP"),
        ({"use_transformers_continuous_batching": True}, "continuous_batching.*Set it to False"),
    ],
    ids=["tools", "environments", "vision", "fsdp", "continuous_batching"],
)
def test_what_cannot_be_branched_is_refused_at_construction(changes, message, tmp_path):
    run = trainer(tmp_path)
    run._refuse_unsupported()
    for name, value in changes.items():
        setattr(run, name, value)
    with pytest.raises(ValueError, match=message):
        run._refuse_unsupported()


def test_a_server_that_works_ahead_is_refused(tmp_path):
    run = trainer(tmp_path, schedule="one_step")
    run.use_vllm = True
    run.args.vllm_mode = "server"
    with pytest.raises(ValueError, match=r"use_vllm=True with schedule='one_step'.*'sync'"):
        run._refuse_unsupported()
    told = {**vars(run.args), "schedule": "sync", "scores_text_again": False}
    own = {"presence_penalty": 0.5, "frequency_penalty": 0.5, "structured_outputs": "a"}
    for name, value in {"min_tokens": 3, **own}.items():
        run.args = SimpleNamespace(**told | {"generation_kwargs": {name: value}})
        with pytest.raises(ValueError, match=f"{name}={value!r} in .*: it would begin anew"):
            run._refuse_unsupported()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_new_tokens": 2}, "min_new_tokens=2 is not supported where completions"),
        ({"max_new_tokens": 3}, "max_new_tokens=3 in generation_kwargs.*max_completion_length"),
        ({"max_tokens": 3}, "max_tokens=3 in generation_kwargs.*max_completion_length"),
    ],
    ids=str,
)
def test_options_that_count_from_a_completions_start_are_refused(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, generation_kwargs=options)


def test_such_options_of_the_model_s_own_are_refused_too(tmp_path):
    model = tiny_llama(len(TOKENIZER))
    model.generation_config.min_new_tokens = 2
    with pytest.raises(ValueError, match=r"min_new_tokens=2.* in the model's generation_config"):
        trainer(tmp_path, model=model)


def test_completions_of_several_turns_are_refused(tmp_path):
    def rollout(prompts, trainer):
        said = speak(different)(prompts, trainer)
        return {**said, "env_mask": [[1] * len(ids) for ids in said["completion_ids"]]}

    with pytest.raises(ValueError, match="rollout_func returned env_mask"):
        trainer(tmp_path, arguments={"rollout_func": rollout}).train()


def test_more_rollouts_and_other_splits_are_other_runs(tmp_path):
    runs = []
    for options in (
        {},
        {"num_rollouts": 5},
        {"splitter": "lines"},
        {"min_step_tokens": 3},
        {"max_steps_per_completion": 2},
    ):
        run = trainer(tmp_path, max_steps=2, **options)
        run.train()
        runs.append(parameters(run))
    assert all(not torch.equal(runs[0], other) for other in runs[1:])


if __name__ == "__main__":
    each_with_prefixes_of_its_own(Path(sys.argv[1]))
