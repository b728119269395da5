"""The evaluator inside TRL's own trainers: it reports, and leaves training as it found it."""

import copy

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import EarlyStoppingCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from tests.tiny import tiny_llama, tiny_prompts, tiny_tokenizer
from trl_ext import GenerationEvaluator
from trl_ext.evals import evaluate_generations

TOKENIZER = tiny_tokenizer()


def share_of_letters(completions, **kwargs):
    return [sum(c.isalpha() for c in text) / max(1, len(text)) for text in completions]


def best_at_step_two(completions, trainer_state, **kwargs):
    return [float(trainer_state.global_step == 2)] * len(completions)


def evaluator(reward_funcs=None, **options):
    return GenerationEvaluator(
        reward_funcs, **{"num_generations": 4, "success_threshold": 0.5, **options}
    )


def make_trainer(folder, *callbacks, base=GRPOTrainer, eval_dataset=None, peft=None, **config):
    config_class = {GRPOTrainer: GRPOConfig, RLOOTrainer: RLOOConfig}[base]
    arguments = {
        "per_device_train_batch_size": 4,
        "num_generations": 2,
        "per_device_eval_batch_size": 8,
        "max_completion_length": 4,
        "max_steps": 3,
        "learning_rate": 1e-2,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
    }
    return base(
        tiny_llama(len(TOKENIZER)),
        share_of_letters,
        args=config_class(str(folder), **{**arguments, **config}),
        train_dataset=tiny_prompts(8),
        eval_dataset=tiny_prompts(2) if eval_dataset is None else eval_dataset,
        processing_class=copy.deepcopy(TOKENIZER),
        callbacks=list(callbacks),
        peft_config=peft,
    )


def attached(folder, ours=None, **config):
    """A trainer and its evaluator."""
    ours = ours or evaluator()
    trainer = make_trainer(folder, ours, **config)
    ours.attach(trainer)
    return trainer, ours


def logged(trainer, name):
    """Step and value of each log row that has `name`."""
    return [(row["step"], row[name]) for row in trainer.state.log_history if name in row]


def timeless(row):
    """A log row without what a clock wrote."""
    return {k: v for k, v in row.items() if "time" not in k and "per_second" not in k}


def test_training_is_the_same_to_the_bit_with_and_without(tmp_path):
    alone = make_trainer(tmp_path / "alone")  # construction seeds the run
    alone.train()
    watched, _ = attached(tmp_path / "watched")
    watched.train()
    assert len(logged(watched, "eval_pass@1")) == 3
    start = tiny_llama(len(TOKENIZER)).state_dict()
    ours = watched.model.state_dict()
    for name, value in alone.model.state_dict().items():
        assert torch.equal(value, ours[name]), name
    assert any(not torch.equal(start[name], ours[name]) for name in start)
    rows = [row for row in watched.state.log_history if "eval_pass@1" not in row]
    assert [timeless(row) for row in rows] == [timeless(row) for row in alone.state.log_history]


@pytest.mark.parametrize("attach", [True, False])
def test_best_model_is_chosen_by_pass_at_1(tmp_path, attach):
    ours = evaluator(best_at_step_two)
    trainer = make_trainer(
        tmp_path,
        ours,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_pass@1",
    )
    if attach:
        ours.attach(trainer)
    trainer.train()
    assert logged(trainer, "eval_pass@1") == [(1, 0.0), (2, 1.0), (3, 0.0)]
    assert trainer.state.best_global_step == 2 and trainer.state.best_metric == 1.0
    best = type(trainer.model).from_pretrained(tmp_path / "checkpoint-2").state_dict()
    last = type(trainer.model).from_pretrained(tmp_path / "checkpoint-3").state_dict()
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, best[name]), name
    assert any(not torch.equal(best[name], last[name]) for name in best)


def test_early_stopping_reads_the_numbers(tmp_path):
    trainer, _ = attached(
        tmp_path,
        evaluator(best_at_step_two),
        max_steps=6,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_pass@1",
    )
    trainer.add_callback(EarlyStoppingCallback(early_stopping_patience=2))
    trainer.train()
    assert trainer.state.global_step == 4


def test_evaluation_before_the_first_step(tmp_path):
    trainer, ours = attached(tmp_path, eval_on_start=True, max_steps=1)
    untrained = evaluate_generations(
        tiny_llama(len(TOKENIZER)),
        TOKENIZER,
        tiny_prompts(2),
        share_of_letters,
        num_generations=4,
        success_threshold=0.5,
        max_completion_length=4,
        batch_size=8,
    )
    trainer.train()
    rows = logged(trainer, "eval_mean_reward")
    assert [step for step, _ in rows] == [0, 1]
    assert rows[0][1] == untrained.metrics()["eval_mean_reward"]
    assert ours.results["eval"].rewards_PG.shape == (2, 4)


def test_evaluate_returns_and_reports_the_numbers(tmp_path):
    class Tracker(TrainerCallback):
        rows = []

        def on_log(self, args, state, control, logs, **kwargs):
            self.rows.append(dict(logs))

    trainer, ours = attached(tmp_path, evaluator(answer_extractor=len, ks=[1, 4]))
    trainer.add_callback(Tracker())
    metrics = trainer.evaluate()
    expected = ours.results["eval"].metrics()
    assert expected.items() <= metrics.items()
    assert {"eval_loss", "eval_reward"} < set(metrics)  # TRL's own are still there
    names = ("pass@1", "pass@4", "maj@1", "maj@4", "pass^4", "mean_length", "truncation_rate")
    for name in names:
        assert metrics[f"eval_{name}"] >= 0 and f"eval_{name}_se" in metrics
    assert [row for row in Tracker.rows if "eval_pass@1" in row] == [{**expected, "epoch": 0}]


def test_completions_of_trl_are_shown_once_per_evaluation(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(
        "trl.trainer.grpo_trainer.print_prompt_completions_sample",
        lambda *args, **kwargs: shown.append(args),
    )
    trainer, _ = attached(tmp_path, log_completions=True)
    trainer.evaluate()
    assert len(shown) == 1


def test_each_of_several_evaluation_sets_has_its_own_numbers(tmp_path):
    def is_short(prompts, **kwargs):
        return [float(len(prompt) < 8) for prompt in prompts]

    sets = {
        "short": Dataset.from_dict({"prompt": ["1+1=", "2+2="]}),
        "long": Dataset.from_dict({"prompt": ["123+456=", "1+1=", "789+456="]}),
    }
    trainer, ours = attached(tmp_path, evaluator(is_short), eval_dataset=sets)
    metrics = trainer.evaluate()
    assert metrics["eval_short_pass@1"] == 1.0
    assert metrics["eval_long_pass@1"] == pytest.approx(1 / 3)
    assert set(ours.results) == {"eval_short", "eval_long"}
    elsewhere = trainer.evaluate(sets["long"], metric_key_prefix="eval_other")
    assert elsewhere["eval_other_pass@1"] == metrics["eval_long_pass@1"]


def test_dataset_and_options_of_its_own_win(tmp_path):
    ours = evaluator(dataset=tiny_prompts(3), max_completion_length=1, disable_tqdm=True)
    trainer, ours = attached(tmp_path, ours, max_completion_length=4)
    trainer.evaluate()
    assert ours.results["eval"].lengths_PG.tolist() == [[1] * 4] * 3


def test_sampling_follows_the_config_of_the_trainer(tmp_path):
    fed = []
    trainer, _ = attached(
        tmp_path,
        temperature=0.7,
        top_p=0.9,
        top_k=5,
        min_p=0.05,
        repetition_penalty=1.1,
        generation_kwargs={"typical_p": 0.8},
    )
    generate = trainer.model.generate
    trainer.model.generate = lambda **kwargs: (
        fed.append(kwargs["generation_config"]) or generate(**kwargs)
    )
    trainer.evaluate()
    theirs, ours = fed[0], fed[-1]
    assert theirs is not ours
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "typical_p")
    for name in (*names, "do_sample", "max_new_tokens", "eos_token_id", "pad_token_id"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert (ours.temperature, ours.top_p, ours.top_k, ours.min_p) == (0.7, 0.9, 5, 0.05)


def test_weights_of_the_trainer_go_with_its_reward_functions(tmp_path):
    trainer, ours = attached(tmp_path, reward_weights=[0.0])
    assert trainer.evaluate()["eval_mean_reward"] == 0.0
    assert ours.results["eval"].rewards_PG.tolist() == [[0.0] * 4] * 2


@pytest.mark.parametrize(
    "options",
    [{"base": RLOOTrainer, "beta": 0.0}, {"peft": LoraConfig(r=2, target_modules=["q_proj"])}],
)
def test_other_trainers_and_adapters(tmp_path, options):
    trainer, ours = attached(tmp_path, max_steps=1, **options)
    trainer.train()
    assert logged(trainer, "eval_pass@1") == [(1, ours.results["eval"].metrics()["eval_pass@1"])]


def test_attaching_adds_the_callback_once(tmp_path):
    ours, trainer = evaluator(), make_trainer(tmp_path)
    ours.attach(trainer), ours.attach(trainer)
    assert sum(callback is ours for callback in trainer.callback_handler.callbacks) == 1
    with pytest.raises(ValueError, match="another trainer"):
        ours.attach(make_trainer(tmp_path))


def test_rewards_are_needed_without_a_trainer(tmp_path):
    with pytest.raises(ValueError, match="reward_funcs=None"):
        make_trainer(tmp_path, evaluator()).evaluate()


def test_tools_are_refused(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.tools = [len]
    with pytest.raises(ValueError, match="tools"):
        evaluator().attach(trainer)


def test_bad_options_are_refused_before_training():
    with pytest.raises(ValueError, match="num_generations=4"):
        evaluator(ks=[8])
    with pytest.raises(TypeError, match="num_generation"):
        GenerationEvaluator(num_generation=8)
