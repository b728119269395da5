"""Holds a run to a budget of KL from its reference policy.

The log is the only state: every decision follows from the last measurement in `state.log_history`,
which each checkpoint holds, so that a resumed run decides as the uninterrupted one.
"""

import math
from typing import Any, Literal, get_args

from datasets import Dataset
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from trl_ext.evals.drift import DriftOptions, policy_drift
from trl_ext.evals.evaluator import AttachedCallback, options_of
from trl_ext.evals.likelihood import reference_of_trainer
from trl_ext.evals.shares import first_rows, whole_model

Estimator = Literal["exact", "k1", "k3"]
Action = Literal["stop", "anneal"]

PREFIX = "drift/"
FACTOR = f"{PREFIX}learning_rate_factor"


class KLBudget(AttachedCallback):
    """Measures KL(π‖ref) during training, and stops or anneals the run at a budget.

    Every `every` optimizer steps it samples from the policy and logs `drift/kl_exact`,
    `drift/kl_k1`, `drift/kl_k3`, `drift/reference_perplexity` and `drift/mean_length`, each with
    its standard error `_se`; see [`policy_drift`]. All estimates are masked sums over whole
    completions. A KL that is no number counts as spent.

    Until the budget acts, training is the same to the bit with and without this callback. Samples
    are drawn at temperature 1 unless told, with `model.generate`, whatever training samples with,
    and with the same noise each time, so that the curve is smoother than its error bars.

    Args:
        budget: nats per completion, above 0.
        action: `"stop"` ends training when the KL reaches the budget. `"anneal"` multiplies the
            learning rate by `clamp((budget - KL) / (budget - anneal_from), 0, 1)` from each
            measurement to the next: inside the optimizer step only, so that the scheduler, its
            checkpoint and the logged `learning_rate` keep their own values.
        estimator: `"exact"`, `"k1"` or `"k3"`: which estimate is held against the budget.
        every: optimizer steps between measurements.
        anneal_from: nats in [0, budget), where annealing begins; default half of the budget.
        prompts: a dataset with a column `prompt`; default the trainer's evaluation dataset where it
            is a single one, else the training dataset, the first `max_prompts` of it.
        reference: default the trainer's own, or the policy without its PEFT adapter.
        tokenizer: default the trainer's `processing_class`.
        options: fields of [`DriftOptions`]; `max_prompts` is 256 unless told. `batch_size`,
            `max_completion_length`, `chat_template_kwargs` and `disable_tqdm` default to the
            trainer's config.

    Raises:
        ValueError: an argument out of range; on attaching, a trainer without a reference
            (`beta=0`), with a reference that moves, with a model sharded by FSDP or ZeRO-3, or, to
            anneal, under DeepSpeed, which steps the optimizer where no callback sees it.

    Example:

    ```python
    budget = KLBudget(10.0, action="anneal", every=50)
    trainer = OnlineDPOTrainer(..., callbacks=[budget])
    ```
    """

    def __init__(
        self,
        budget: float,
        *,
        action: Action = "stop",
        estimator: Estimator = "exact",
        every: int = 100,
        anneal_from: float | None = None,
        prompts: Dataset | None = None,
        reference: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        **options: Any,
    ):
        _check(budget, action, estimator, every, anneal_from)
        DriftOptions(**options)
        self.budget, self.action, self.estimator, self.every = budget, action, estimator, every
        self.anneal_from = budget / 2 if anneal_from is None else anneal_from
        self.prompts: Any = prompts
        self.tokenizer: Any = tokenizer
        self.reference = reference
        self.options = {"max_prompts": 256, **options}
        self._learning_rates: list[Any] | None = None

    @property
    def history(self) -> list[dict[str, float]]:
        """The measurements of the run so far, as logged: step, epoch and the numbers by name."""
        rows = [] if self.trainer is None else self.trainer.state.log_history
        return [
            {name.removeprefix(PREFIX): value for name, value in row.items()}
            for row in rows
            if f"{PREFIX}kl_exact" in row
        ]

    def bind(self, trainer: Any) -> None:
        """Takes reference, prompts, tokenizer and sampling options from `trainer`."""
        whole_model(trainer.model)
        if self.reference is None:
            _refuse_moving_reference(trainer)
        self.reference = reference_of_trainer(trainer, self.reference)
        if self.action == "anneal" and getattr(trainer, "is_deepspeed_enabled", False):
            raise ValueError(
                "action='anneal' is not supported with DeepSpeed, which steps the optimizer where "
                "no callback can scale its learning rate. Use action='stop', or DDP."
            )
        budgets = [c for c in trainer.callback_handler.callbacks if isinstance(c, KLBudget)]
        if any(other is not self for other in budgets):
            raise ValueError(
                "callbacks holds two KLBudgets: they would read each other's log. Keep one."
            )
        if self.prompts is None:
            self.prompts = _prompts_of(trainer)
        self.prompts = first_rows(self.prompts, self.options["max_prompts"])
        self.tokenizer = self.tokenizer or trainer.processing_class
        # The temperature and filters that training samples with are not the policy's own.
        taken = {"batch_size", "max_completion_length", "chat_template_kwargs", "disable_tqdm"}
        shared = options_of(trainer.args, DriftOptions)
        self.options = {k: v for k, v in shared.items() if k in taken} | self.options

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuses to watch a run whose trainer it does not know."""
        if self.trainer is None:
            raise ValueError(
                "KLBudget is attached to no trainer, whose reference it could use. Call "
                "budget.attach(trainer) before training; trl_ext's trainers do so themselves."
            )

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Scales the learning rate for this optimizer step alone."""
        factor = self.factor(state)
        if factor == 1:
            return
        groups = kwargs["optimizer"].param_groups
        self._learning_rates = [group["lr"] for group in groups]
        for group in groups:
            group["lr"] = group["lr"] * factor

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Gives the scheduler its learning rates back."""
        if self._learning_rates is None:
            return
        groups = kwargs["optimizer"].param_groups
        for group, learning_rate in zip(groups, self._learning_rates, strict=True):
            group["lr"] = learning_rate
        self._learning_rates = None

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measures, logs, and stops a run whose budget is spent."""
        if state.global_step % self.every == 0:
            drift = policy_drift(
                kwargs["model"],
                self.tokenizer,
                self.prompts,
                reference=self.reference,
                **self.options,
            )
            self._log(drift.metrics(PREFIX), control)
        if self.action == "stop" and self.factor(state) == 0:
            control.should_training_stop = True

    def factor(self, state: TrainerState) -> float:
        """What the last measurement multiplies the learning rate by, in [0, 1].

        Under `"stop"` it is 1, and 0 once the budget is spent: a run resumed after its last step
        takes one more before it can stop, and that one must change nothing.
        """
        name = f"{PREFIX}kl_{self.estimator}"
        kl = next((row[name] for row in reversed(state.log_history) if name in row), -math.inf)
        return self.factor_at(kl)

    def factor_at(self, kl: float) -> float:
        """The factor at a KL in nats; 0 where it is NaN."""
        if not kl < self.budget:
            return 0.0
        if self.action == "stop" or kl <= self.anneal_from:
            return 1.0
        return (self.budget - kl) / (self.budget - self.anneal_from)

    def _log(self, numbers: dict[str, float], control: TrainerControl) -> None:
        if self.action == "anneal":
            numbers[FACTOR] = self.factor_at(numbers[f"{PREFIX}kl_{self.estimator}"])
        # The host takes a logged row for the one that this step was to log.
        should_log = control.should_log
        Trainer.log(self.trainer, numbers)
        control.should_log = should_log


def _check(
    budget: float, action: str, estimator: str, every: int, anneal_from: float | None
) -> None:
    if not 0 < budget < math.inf:
        raise ValueError(f"budget={budget} must be a finite number of nats above 0.")
    if action not in get_args(Action):
        raise ValueError(f"action={action!r} is none of {', '.join(get_args(Action))}.")
    if estimator not in get_args(Estimator):
        raise ValueError(f"estimator={estimator!r} is none of {', '.join(get_args(Estimator))}.")
    if every < 1:
        raise ValueError(f"every={every} would never measure. Give at least 1 optimizer step.")
    if anneal_from is None:
        return
    if action == "stop":
        raise ValueError(
            f"anneal_from={anneal_from} has no effect under action='stop'. Remove it, or set "
            "action='anneal'."
        )
    if not 0 <= anneal_from < budget:
        raise ValueError(
            f"anneal_from={anneal_from} must be at least 0 and below budget={budget}: the learning "
            "rate falls between the two."
        )


def _refuse_moving_reference(trainer: Any) -> None:
    if getattr(trainer.args, "sync_ref_model", False):
        raise ValueError(
            "sync_ref_model=True moves the reference during training: a budget against it would "
            "never be spent. Pass reference=<the model that training starts from>."
        )


def _prompts_of(trainer: Any) -> Dataset:
    """The evaluation dataset where it is a single one, else the training dataset."""
    for dataset in (trainer.eval_dataset, trainer.train_dataset):
        if isinstance(dataset, Dataset) and "prompt" in dataset.column_names:
            return dataset
    raise ValueError(
        "prompts=None, and the trainer has no datasets.Dataset with a column 'prompt' to take "
        "them from. Pass prompts=<a dataset>."
    )
