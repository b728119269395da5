"""The budget inside real trainers: it watches without a trace, stops, anneals, and resumes."""

import math

import pytest
import torch
import trl
from peft import LoraConfig
from transformers import TrainerCallback

from tests.runs import TOKENIZER, build, logged, parameters
from tests.tiny import tiny_llama, tiny_prompts
from trl_ext import GRPOTrainer
from trl_ext.evals import KLBudget, policy_drift

NAMES = ("kl_exact", "kl_k1", "kl_k3", "reference_perplexity", "mean_length")


def start(folder, budget=None, *, base=GRPOTrainer, more=(), arguments=None, **options):
    callbacks = [budget, *more] if budget else list(more)
    arguments = {"callbacks": callbacks, **(arguments or {})}
    return build(base, folder, arguments=arguments, **{"max_steps": 4, **options})


def watching(budget=1e9, **options):
    return KLBudget(budget, **{"every": 1, "max_prompts": 6, **options})


def without_drift(rows):
    return [row for row in rows if "drift/kl_exact" not in row]


class Rates(TrainerCallback):
    """The learning rate that each optimizer step used, and the one that the scheduler was left."""

    def __init__(self):
        self.used, self.left = [], []

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self.used.append(optimizer.param_groups[0]["lr"])

    def on_step_end(self, args, state, control, optimizer=None, lr_scheduler=None, **kwargs):
        self.left.append((optimizer.param_groups[0]["lr"], lr_scheduler.get_last_lr()[0]))


@pytest.mark.parametrize("action", ["stop", "anneal"])
def test_watching_leaves_no_trace_in_training(tmp_path, action):
    alone = start(tmp_path / "alone")
    alone.train()
    budget = watching(action=action)
    watched = start(tmp_path / "watched", budget)
    watched.train()
    assert len(budget.history) == 4
    assert torch.equal(parameters(alone), parameters(watched))
    assert without_drift(logged(watched)) == logged(alone)
    assert not torch.equal(parameters(watched), parameters(start(tmp_path / "fresh")))


def test_numbers_are_those_of_policy_drift(tmp_path):
    budget = watching(every=2, max_prompts=3, seed=5)
    trainer = start(tmp_path, budget)
    trainer.train()
    assert [row["step"] for row in budget.history] == [2, 4]
    drift = policy_drift(
        trainer.model,
        TOKENIZER,
        tiny_prompts(3),
        reference=tiny_llama(len(TOKENIZER)),
        seed=5,
        max_completion_length=6,
        batch_size=8,
        disable_tqdm=True,
    ).metrics()
    row = next(r for r in reversed(trainer.state.log_history) if "drift/kl_exact" in r)
    for name in NAMES:
        assert row[f"drift/{name}"] == pytest.approx(drift[f"drift/{name}"], rel=1e-5)
        assert row[f"drift/{name}_se"] == pytest.approx(drift[f"drift/{name}_se"], rel=1e-4)
    assert drift["drift/kl_exact"] > 0 and budget.history[-1]["kl_exact"] == row["drift/kl_exact"]


def test_sampling_temperature_of_training_is_not_that_of_the_measurement(tmp_path):
    """TRL's fused head divides by it inside its own log-probabilities only."""
    numbers = []
    for temperature in (1.0, 0.5):
        budget = watching(every=1)
        trainer = start(tmp_path, budget, max_steps=1, temperature=temperature, learning_rate=0.0)
        trainer.model.lm_head.weight.data *= 1.1
        trainer.train()
        numbers.append(budget.history[-1]["kl_exact"])
    assert numbers[0] == numbers[1] > 0


@pytest.mark.parametrize("estimator", ["exact", "k1", "k3"])
def test_run_stops_at_the_first_measurement_past_the_budget(tmp_path, estimator):
    watch = watching()
    start(tmp_path / "watch", watch, max_steps=6).train()
    values = [row[f"kl_{estimator}"] for row in watch.history]
    limit = max(values[:3])
    expected = next((i + 1 for i, v in enumerate(values) if v >= limit))
    budget = watching(limit, estimator=estimator)
    trainer = start(tmp_path / "stop", budget, max_steps=6)
    trainer.train()
    assert trainer.state.global_step == expected <= 3


def test_run_resumed_after_its_last_step_changes_nothing_more(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 1, "max_steps": 6}
    stopped = start(tmp_path, watching(1e-9, every=2), **saving)
    stopped.train()
    assert stopped.state.global_step == 2
    again = start(tmp_path / "again", watching(1e-9, every=4), max_steps=6, weight_decay=0.1)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert again.state.global_step == 3
    assert torch.equal(parameters(again), parameters(stopped))


def annealed(folder, limit, rates=None, **options):
    budget = watching(limit, action="anneal", anneal_from=limit / 10, every=2)
    more = [rates] if rates else []
    options = {"max_steps": 6, "lr_scheduler_type": "cosine", "weight_decay": 0.1, **options}
    return start(folder, budget, more=more, **options), budget


def test_learning_rate_falls_as_stated_and_the_scheduler_keeps_its_own(tmp_path):
    plain_rates = Rates()
    plain = start(tmp_path / "a", more=[plain_rates], max_steps=6, lr_scheduler_type="cosine")
    plain.train()
    limit = 0.2
    trainer, budget = annealed(tmp_path / "b", limit, rates := Rates())
    trainer.train()
    factors = [1.0] * 6
    for row in budget.history:
        expected = min(1.0, max(0.0, (limit - row["kl_exact"]) / (limit - limit / 10)))
        assert row["learning_rate_factor"] == pytest.approx(expected, abs=1e-12)
        step = int(row["step"])
        factors[step : step + 2] = [row["learning_rate_factor"]] * len(factors[step : step + 2])
    assert any(0 < factor < 1 for factor in factors), factors
    expected = [rate * factor for rate, factor in zip(plain_rates.used, factors, strict=True)]
    assert rates.used == pytest.approx(expected, rel=1e-12)
    assert rates.left == plain_rates.left
    learning = [row["learning_rate"] for row in logged(trainer) if "learning_rate" in row]
    assert learning == [row["learning_rate"] for row in logged(plain) if "learning_rate" in row]


def test_scheduler_that_multiplies_the_last_rate_keeps_its_own(tmp_path):
    """`ExponentialLR` starts from what it finds in the optimizer, scaled or not."""
    left = []
    for limit in (1e9, 1e-9):
        model, rates = tiny_llama(len(TOKENIZER)), Rates()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        callbacks = [watching(limit, action="anneal"), rates]
        arguments = {"callbacks": callbacks, "optimizers": (optimizer, scheduler)}
        build(GRPOTrainer, tmp_path, model=model, arguments=arguments, max_steps=4).train()
        left.append(rates.left)
    assert left[0] == left[1] and left[0][-1][0] == pytest.approx(0.1 / 16)
    assert rates.used[1:] == [0, 0, 0]


def test_spent_budget_holds_the_weights_still(tmp_path):
    class Weights(TrainerCallback):
        seen = []

        def on_step_end(self, args, state, control, model=None, **kwargs):
            self.seen.append(torch.cat([p.detach().flatten().clone() for p in model.parameters()]))

    trainer, _ = annealed(tmp_path, 1e-9, Weights())
    trainer.train()
    assert trainer.state.global_step == 6
    assert not torch.equal(Weights.seen[0], Weights.seen[1])
    assert all(torch.equal(Weights.seen[1], seen) for seen in Weights.seen[2:])


@pytest.mark.parametrize("scheduler", ["cosine", "linear", "constant_with_warmup"])
def test_annealed_run_resumes_to_the_bit_at_every_step(tmp_path, scheduler):
    options = {"lr_scheduler_type": scheduler, "save_steps": 1}
    full, budget = annealed(tmp_path, 0.2, save_strategy="steps", **options)
    full.train()
    assert 0 < budget.history[0]["learning_rate_factor"] < 1
    for k in range(1, 6):
        again, resumed = annealed(tmp_path / f"{k}", 0.2, **options)
        again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{k}"))
        assert torch.equal(parameters(again), parameters(full)), k
        assert resumed.history == budget.history
        assert logged(again)[:-1] == logged(full)[:-1]


def test_factor_of_a_kl():
    budget = KLBudget(4.0, action="anneal", anneal_from=1.0)
    kls = (-1.0, 0.0, 1.0, 2.5, 4.0, 9.0, math.nan, math.inf)
    assert [budget.factor_at(kl) for kl in kls] == [1, 1, 1, 0.5, 0, 0, 0, 0]
    assert [KLBudget(4.0).factor_at(kl) for kl in kls] == [1, 1, 1, 1, 0, 0, 0, 0]
    assert KLBudget(4.0, action="anneal").factor_at(3.0) == 0.5


def test_adapter_and_accumulation(tmp_path):
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    runs = []
    for budget in (None, watching(every=1)):
        arguments = {"peft_config": lora}
        trainer = start(
            tmp_path,
            budget,
            arguments=arguments,
            gradient_accumulation_steps=2,
            beta=0.0,
            learning_rate=0.1,
        )
        trainer.train()
        runs.append(parameters(trainer))
    assert torch.equal(*runs)
    assert len(budget.history) == 4 and budget.history[-1]["kl_exact"] > 0


def test_attached_by_hand_to_a_trainer_of_trl(tmp_path):
    budget = watching(reference=tiny_llama(len(TOKENIZER)))
    trainer = start(tmp_path, budget, base=trl.GRPOTrainer)
    with pytest.raises(ValueError, match="attach"):
        trainer.train()
    budget.attach(trainer)
    trainer.train()
    assert len(budget.history) == 4


def test_evaluation_prompts_come_first(tmp_path):
    held_out = tiny_prompts(5)
    budget = watching(max_prompts=4)
    start(tmp_path, budget, arguments={"eval_dataset": held_out})
    assert budget.prompts["prompt"] == held_out["prompt"][:4]
    several = watching()
    start(tmp_path, several, arguments={"eval_dataset": {"a": held_out, "b": held_out}})
    assert several.prompts["prompt"] == tiny_prompts(16)["prompt"][:6]


def test_given_reference_wins(tmp_path):
    budget = watching(reference=tiny_llama(len(TOKENIZER), seed=3))
    start(tmp_path, budget, beta=0.0, max_steps=1).train()
    assert budget.history[0]["kl_exact"] > 1e-2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0.0}, "budget=0.0"),
        ({"budget": math.inf}, "budget=inf"),
        ({"action": "pause"}, "action='pause'"),
        ({"estimator": "k2"}, "estimator='k2'"),
        ({"every": 0}, "every=0"),
        ({"anneal_from": 0.5}, "no effect"),
        ({"action": "anneal", "anneal_from": 1.0}, "anneal_from=1.0"),
        ({"temperature": 0}, "temperature=0"),
    ],
)
def test_bad_arguments_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        KLBudget(**{"budget": 1.0, **options})


def test_unfit_trainers_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no reference policy"):
        start(tmp_path, watching(), beta=0.0)
    with pytest.raises(ValueError, match="sync_ref_model=True"):
        start(tmp_path, watching(), sync_ref_model=True, ref_model_sync_steps=2)
    with pytest.raises(ValueError, match="two KLBudgets"):
        start(tmp_path, watching(), more=[watching()])
    stream = {"train_dataset": tiny_prompts(8).to_iterable_dataset()}
    with pytest.raises(ValueError, match="prompts=None"):
        start(tmp_path, watching(), arguments=stream)
    trainer = start(tmp_path)
    trainer.is_deepspeed_enabled = True
    with pytest.raises(ValueError, match="DeepSpeed"):
        watching(action="anneal").attach(trainer)
