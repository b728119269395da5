"""What the callbacks here share: a trainer to log to, and options taken from its config."""

import dataclasses
from typing import Any, ClassVar

from datasets import Dataset
from transformers import (
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

# Fields of TRL's configs that say how training samples, under the names of `evaluate_generations`.
SHARED_FIELDS = {
    "max_completion_length": "max_completion_length",
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "chat_template_kwargs": "chat_template_kwargs",
    "answer_extractor": "answer_extractor",
    "unparsable": "unparsable",
    "marker": "marker",
    "answer_prefix": "answer_prefix",
    "answer_eos": "answer_eos",
    "per_device_eval_batch_size": "batch_size",
    "disable_tqdm": "disable_tqdm",
}
SHARED_GENERATION_FIELDS = ("min_p", "repetition_penalty", "cache_implementation")


class AttachedCallback(TrainerCallback):
    """A callback that knows its trainer; trl_ext's trainers attach theirs by themselves.

    Attributes:
        trainer: the trainer it is attached to, or `None`.
    """

    trainer: Any = None

    def attach(self, trainer: Trainer) -> None:
        """Takes what it needs from `trainer`, and adds itself to its callbacks where missing."""
        name = type(self).__name__
        if self.trainer is not None and self.trainer is not trainer:
            raise ValueError(
                f"this {name} is attached to another trainer, whose log would receive the numbers. "
                f"Make one {name} per trainer."
            )
        if getattr(trainer, "tools", None) or getattr(trainer, "environment_factories", None):
            raise ValueError(
                f"trainer has tools or environments, which {name} does not call: it would judge "
                "another policy. Evaluate through a reward function of the trainer instead."
            )
        self.bind(trainer)
        self.trainer = trainer
        if self not in trainer.callback_handler.callbacks:
            trainer.add_callback(self)

    def bind(self, trainer: Any) -> None:
        """Takes from `trainer` what was not given; refuses one that it cannot work in."""


class Evaluator(AttachedCallback):
    """Adds the numbers of an evaluation to `Trainer.evaluate()` and, attached, to its trackers.

    Unattached, the numbers are in the metrics and in `state.log_history`, but trackers do not see
    them. A subclass says in `options_class` which options it takes and in `evaluate` what it does.

    Attributes:
        results: prefix of each evaluation set (`"eval"`) to its latest result.
    """

    options_class: ClassVar[type]
    metrics_prefix: ClassVar[str] = ""

    def __init__(
        self,
        dataset: Dataset | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        **options: Any,
    ):
        self.options_class(**options)  # refuses a bad option now, not after hours of training
        self.dataset = dataset
        self.tokenizer = tokenizer
        self.options = options
        self.results: dict[str, Any] = {}

    def evaluate(self, model, tokenizer, dataset: Dataset, state: TrainerState, **options) -> Any:
        """A result whose `metrics(prefix)` gives the numbers."""
        raise NotImplementedError

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Evaluates and writes the numbers into `metrics`, which the caller goes on to read."""
        prefix = metric_prefix(kwargs["metrics"])
        result = self.evaluate(
            kwargs["model"],
            kwargs["processing_class"] if self.tokenizer is None else self.tokenizer,
            kwargs["eval_dataloader"].dataset if self.dataset is None else self.dataset,
            state,
            **{**options_of(args, self.options_class), **self.options},
        )
        self.results[prefix] = result
        numbers = result.metrics(f"{prefix}_{self.metrics_prefix}")
        kwargs["metrics"].update(numbers)
        self._log(numbers, state)

    def _log(self, numbers: dict[str, float], state: TrainerState) -> None:
        if self.trainer is None:
            row = {**numbers, "epoch": state.epoch, "step": state.global_step}
            state.log_history.append(row)
        else:
            # TRL's own `log` would show and upload its completions a second time.
            Trainer.log(self.trainer, numbers)


def metric_prefix(metrics: dict[str, float]) -> str:
    """`metric_key_prefix` of an evaluation: callbacks see it only in front of `_runtime`."""
    return next(key for key in metrics if key.endswith("_runtime")).removesuffix("_runtime")


def options_of(args: TrainingArguments, options_class: type) -> dict[str, Any]:
    """What a trainer's config says about the options of an evaluation."""
    shared = {ours: getattr(args, theirs, None) for theirs, ours in SHARED_FIELDS.items()}
    generation = {name: getattr(args, name, None) for name in SHARED_GENERATION_FIELDS}
    generation |= getattr(args, "generation_kwargs", None) or {}
    shared["generation_kwargs"] = {k: v for k, v in generation.items() if v is not None}
    known = {field.name for field in dataclasses.fields(options_class)}
    return {k: v for k, v in shared.items() if v is not None and k in known}
