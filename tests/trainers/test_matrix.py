"""Every public trainer × what a user does with one. Nothing escapes: trainers are collected."""

import datetime
import importlib
import json
import pkgutil
from contextlib import nullcontext

import pytest
import torch
import trl
from peft import LoraConfig

import trl_ext.trainers
from tests.runs import (
    ALGORITHMS,
    JUDGED,
    METHODS,
    OF_GROUPS,
    OURS,
    TOKENIZER,
    build,
    by_letters,
    case,
    lacking,
    parameters,
    vowels,
)
from tests.tiny import tiny_llama, tiny_prompts
from trl_ext import JEPOTrainer, MTPOTrainer, NashTrainer, OnlineDPOTrainer
from trl_ext.trainers.group import IGNORED

each_trainer = pytest.mark.parametrize("trainer", OURS, ids=lambda t: t.__name__)


def test_every_trainer_has_a_row():
    for module in pkgutil.iter_modules(trl_ext.trainers.__path__):
        names = vars(importlib.import_module(f"trl_ext.trainers.{module.name}"))
        for found in names.values():
            own = isinstance(found, type) and issubclass(found, trl.GRPOTrainer)
            if own and module.name != "_seam" and found.__module__.startswith("trl_ext.trainers."):
                assert found in METHODS or found.__module__.endswith("_seam"), found


def refusal(trainer, options):
    """What a trainer over groups answers to an option of a loss over tokens; else no refusal."""
    if lacking(trainer, options):
        return pytest.raises(TypeError, match=f"unexpected .*{lacking(trainer, options)[0]}")
    ignored = [name for name in options if name in IGNORED]
    if trainer in OF_GROUPS and ignored:
        return pytest.raises(ValueError, match=f"{ignored[0]}=.* is not applied: .*whole groups")
    if trainer is JEPOTrainer and "kl_gradient" in options:
        return pytest.raises(ValueError, match=r"kl_gradient='sequence_vocab' is none of sequence,")
    if trainer is JEPOTrainer and "temperature" in options:
        return pytest.raises(ValueError, match=r"temperature=0\.7 is not supported with bound=")
    if trainer in (MTPOTrainer, NashTrainer) and "temperature" in options:
        return pytest.raises(ValueError, match=r"temperature=.*scale_logps_by_temperature=True")
    return nullcontext()


def learns(trainer):
    before = parameters(trainer)
    trainer.train()
    after = parameters(trainer)
    assert torch.isfinite(after).all() and not torch.equal(before, after)
    return trainer


@each_trainer
def test_two_steps(trainer, tmp_path):
    rows = learns(build(trainer, tmp_path)).state.log_history
    assert rows[0]["kl"] == 0.0 and rows[1]["kl"] > 0.0


@each_trainer
@pytest.mark.parametrize("size", [2, 4])
def test_evaluate(trainer, size, tmp_path):
    options = dict(per_device_eval_batch_size=4, num_generations_eval=4 if size == 4 else None)
    run = build(trainer, tmp_path, arguments={"eval_dataset": tiny_prompts(size)}, **options)
    before = parameters(run)
    metrics = run.evaluate()
    assert metrics["eval_loss"] == metrics["eval_loss"]
    assert torch.equal(before, parameters(run))


@each_trainer
def test_save_and_reload_with_plain_transformers(trainer, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = learns(build(trainer, tmp_path))
    run.save_model(str(tmp_path / "saved"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    ids = torch.tensor([[5, 6, 7]])
    run.model.eval()
    assert torch.equal(again(ids).logits, run.model(ids).logits)
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").eos_token == TOKENIZER.eos_token


# Without a copy of the policy, for which an adapter would have to be copied too.
WITH_ADAPTER = [(trainer, {}) for trainer in OURS] + [ALGORITHMS["xpo"], ALGORITHMS["inpo"]]


@pytest.mark.parametrize(("trainer", "options"), WITH_ADAPTER, ids=str)
def test_peft_adapter(trainer, options, tmp_path):
    model = tiny_llama(len(TOKENIZER))
    base = {name: p.clone() for name, p in model.named_parameters()}
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    run = build(trainer, tmp_path, model=model, arguments={"peft_config": lora}, **options)
    learns(run)
    assert run.ref_model is None, "the adapter turned off is the reference, and the opponent"
    for name, p in run.model.get_base_model().named_parameters():
        if "lora" not in name:
            assert torch.equal(p, base[name.replace(".base_layer", "")]), name


@each_trainer
@pytest.mark.parametrize(
    "options",
    [
        {"num_iterations": 2},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
        {"steps_per_generation": 2},
        {"kl_gradient": "sequence_vocab"},
        {"kl_gradient": "sequence_total", "kl_baseline": "leave_one_out"},
        {"mask_truncated_completions": True, "max_completion_length": 32, "max_steps": 3},
        {"temperature": 0.7},
        {"temperature": 0.7, "scale_logps_by_temperature": True},
        {"log_completions": True, "num_completions_to_print": 0},
        {"gradient_checkpointing": True},
    ],
    ids=str,
)
def test_options(trainer, options, tmp_path):
    expected = refusal(trainer, options)
    if "scale_logps_by_temperature" in options and trainer in JUDGED:
        expected = nullcontext()
    with expected:
        learns(build(trainer, tmp_path, **options))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    return {t: parameters(learns(build(t, folder, max_steps=3))) for t in OF_GROUPS}


@pytest.mark.parametrize(
    ("trainer", "options"),
    [
        *ALGORITHMS.values(),
        *[
            (OnlineDPOTrainer, options)
            for options in [
                {"loss_type": "ipo"},
                {"loss_type": "ipo_normalised", "length_normalised": True},
                {"loss_type": "hinge"},
                {"loss_type": "robust", "label_smoothing": 0.2},
                {"loss_type": "rpo", "rpo_eta": 0.5},
                {"loss_type": "best_of_k_sft"},
                {"loss_type": "best_of_k_sft", "beta": 0.0},
                {"loss_type": "rloo"},
                {"pair_rule": "first_two"},
                {"pair_rule": "all_pairs"},
                {"pair_rule": "all_pairs", "judge": "bradley_terry", "soft_labels": True},
                {"judge": by_letters, "judge_both_orders": True, "pair_rule": "first_two"},
                {"missing_eos": "subtract", "missing_eos_value": 1.5},
                {"missing_eos": "replace", "missing_eos_value": -1.0},
                {"f_divergence": "forward_kl"},
                {"f_divergence": "js"},
                {"f_divergence": "alpha", "f_alpha": 0.3},
            ]
        ],
        *[
            (NashTrainer, options)
            for options in [
                {"mixture_coefficient": 0.0, "beta": 0.0},
                {"mixture_coefficient": 1.0},
                {"judge": by_letters, "judge_both_orders": True},
                {"judge": "tests.runs:by_letters", "algorithm": "spo", "num_generations": 2},
            ]
        ],
    ],
    ids=case,
)
def test_each_loss_and_algorithm_learns(trainer, options, plain, tmp_path):
    """Against the plain run each makes a difference of its own: none is silently another one."""
    run = learns(build(trainer, tmp_path, max_steps=3, **options))
    assert not torch.equal(parameters(run), plain[trainer])
    assert all(row["loss"] == row["loss"] for row in run.state.log_history[:-1])


def test_completions_table_shows_who_was_chosen(tmp_path):
    import pandas as pd

    learns(build(OnlineDPOTrainer, tmp_path, log_completions=True, num_completions_to_print=0))
    for step in (1, 2):
        table = pd.read_parquet(tmp_path / "completions" / f"completions_{step:05d}.parquet")
        for _, group in table.groupby(table.index // 4):
            scores, role = group["vowels"].to_numpy(), group["advantage"].to_numpy()
            decided = scores.max() > scores.min()
            assert sorted(role) == ([-1, 0, 0, 1] if decided else [0, 0, 0, 0])
            if decided:
                assert (scores[role == 1], scores[role == -1]) == (scores.max(), scores.min())


@each_trainer
def test_several_reward_functions(trainer, tmp_path):
    def short(completions, **_):
        return [-0.1 * len(c) for c in completions]

    run = build(
        trainer, tmp_path, arguments={"reward_funcs": [vowels, short]}, reward_weights=[1.0, 0.5]
    )
    rows = learns(run).state.log_history
    expected = rows[0]["rewards/vowels/mean"] + 0.5 * rows[0]["rewards/short/mean"]
    assert rows[0]["reward"] == pytest.approx(expected, abs=1e-6)


@each_trainer
def test_unscorable_completions(trainer, tmp_path):
    def some(completions, **_):
        return [None if i % 4 == 1 else r for i, r in enumerate(vowels(completions))]

    def none(completions, **_):
        return [None] * len(completions)

    learns(build(trainer, tmp_path, arguments={"reward_funcs": some}, num_generations=8))
    if trainer is JEPOTrainer:
        return  # which then learns from the reference answers
    own = {} if trainer in OF_GROUPS else {"beta": 0.0}  # whose KL moves without rewards
    run = build(trainer, tmp_path, arguments={"reward_funcs": none}, **own)
    before = parameters(run)
    run.train()
    assert torch.equal(before, parameters(run)), "nothing was scored, so nothing may move"


@each_trainer
def test_a_reward_function_may_log_anything(trainer, tmp_path):
    def telling(completions, log_extra, log_metric, **_):
        log_extra("when", [datetime.date(2026, 1, 1)] * len(completions))
        log_metric("length", 1.0)
        return vowels(completions)

    options = dict(log_completions=True, save_strategy="steps", save_steps=1, max_steps=2)
    run = learns(build(trainer, tmp_path, arguments={"reward_funcs": telling}, **options))
    assert run.state.log_history[0]["length"] == 1.0


@each_trainer
def test_async_reward_functions(trainer, tmp_path):
    async def later(completions, **_):
        return vowels(completions)

    learns(build(trainer, tmp_path, arguments={"reward_funcs": later}))


@each_trainer
@pytest.mark.parametrize("conversational", [False, True])
def test_prompts_of_different_lengths(trainer, conversational, tmp_path):
    data = tiny_prompts(16, conversational)
    assert len({len(str(p)) for p in data["prompt"]}) > 1
    learns(build(trainer, tmp_path, arguments={"train_dataset": data}))


@each_trainer
def test_iterable_dataset(trainer, tmp_path):
    data = tiny_prompts(16).to_iterable_dataset()
    learns(build(trainer, tmp_path, arguments={"train_dataset": data}))


@each_trainer
def test_config_survives_json(trainer, tmp_path):
    run = build(trainer, tmp_path)
    config, own = METHODS[trainer]
    again = json.loads(run.args.to_json_string())
    assert all(name in again for name in own)
    assert isinstance(run.args, config)


@pytest.mark.parametrize("trainer", JUDGED, ids=lambda t: t.__name__)
def test_a_judge_survives_json_and_pickle_by_its_name(trainer, tmp_path):
    import pickle

    args = build(trainer, tmp_path, judge=by_letters).args
    assert json.loads(args.to_json_string())["judge"] == "tests.runs:by_letters"
    again = pickle.loads(pickle.dumps(args))
    runs = [learns(build(trainer, tmp_path, judge=judge)) for judge in (by_letters, again.judge)]
    assert torch.equal(*map(parameters, runs))
