"""Brings `evaluate_generations` into `Trainer.evaluate()`."""

from collections.abc import Sequence
from typing import Any

from datasets import Dataset
from transformers import (
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from trl_ext.evals.generation import evaluate_generations
from trl_ext.evals.options import EvaluationOptions
from trl_ext.evals.result import EvaluationResult
from trl_ext.evals.scoring import RewardFunc, checked_reward_funcs

# Fields of TRL's configs that say how training samples, under the names of `evaluate_generations`.
SHARED_FIELDS = {
    "max_completion_length": "max_completion_length",
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "chat_template_kwargs": "chat_template_kwargs",
    "answer_extractor": "answer_extractor",
    "unparsable": "unparsable",
    "per_device_eval_batch_size": "batch_size",
    "disable_tqdm": "disable_tqdm",
}
SHARED_GENERATION_FIELDS = ("min_p", "repetition_penalty", "cache_implementation")


class GenerationEvaluator(TrainerCallback):
    """Adds pass@k, maj@k, pass^k, length and truncation to every evaluation of a trainer.

    Works in GRPO-family trainers of trl_ext and TRL. The numbers go into the dictionary that
    `trainer.evaluate()` returns, so that `metric_for_best_model="eval_pass@1"` and early stopping
    read them; an `EarlyStoppingCallback` must come after this one in `callbacks`. transformers
    takes a larger value to be better for every metric whose name does not end in `loss`: set
    `greater_is_better=False` to select by length or truncation.

    Training is the same to the bit with and without this callback. It samples with
    `model.generate`, also where training samples with vLLM or a `rollout_func`.

    Args:
        reward_funcs: default the trainer's own with its weights; needed unless attached.
        dataset: default the dataset under evaluation. With several evaluation sets each is
            evaluated under its own prefix, `eval_<name>_`.
        tokenizer: default the trainer's `processing_class`.
        options: fields of [`EvaluationOptions`]. Those that say how to sample
            (`max_completion_length`, `temperature`, `top_p`, `top_k`, `generation_kwargs`,
            `chat_template_kwargs`), `reward_weights` and `disable_tqdm` default to the trainer's
            config, and `batch_size` to its `per_device_eval_batch_size`.

    Attributes:
        results: prefix of each evaluation set (`"eval"`) to the latest [`EvaluationResult`].

    Example:

    ```python
    evaluator = GenerationEvaluator(num_generations=16, answer_extractor=last_number)
    trainer = GRPOTrainer(..., eval_dataset=held_out, callbacks=[evaluator])
    evaluator.attach(trainer)  # trl_ext's trainers do this by themselves
    ```
    """

    def __init__(
        self,
        reward_funcs: RewardFunc | Sequence[RewardFunc] | None = None,
        dataset: Dataset | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        **options: Any,
    ):
        EvaluationOptions(**options)  # refuses a bad option now, not after hours of training
        self.reward_funcs = None if reward_funcs is None else checked_reward_funcs(reward_funcs)
        self.dataset = dataset
        self.tokenizer = tokenizer
        self.options = options
        self.results: dict[str, EvaluationResult] = {}
        self.trainer: Any = None

    def attach(self, trainer: Trainer) -> None:
        """Takes reward functions from `trainer` and sends the numbers to its trackers.

        Without it the numbers are in the metrics and in `state.log_history`, but trackers do not
        see them, and `reward_funcs` must have been given. Adds the callback where it is missing.
        """
        if self.trainer is not None and self.trainer is not trainer:
            raise ValueError(
                "this GenerationEvaluator is attached to another trainer, whose log would receive "
                "the numbers. Make one evaluator per trainer."
            )
        if getattr(trainer, "tools", None) or getattr(trainer, "environment_factories", None):
            raise ValueError(
                "trainer has tools or environments, which the evaluator does not call: it would "
                "judge another policy. Evaluate through a reward function of the trainer instead."
            )
        if self.reward_funcs is None:
            self.reward_funcs = checked_reward_funcs(getattr(trainer, "reward_funcs", []))
            weights = getattr(trainer.args, "reward_weights", None)
            self.options = {"reward_weights": weights, **self.options}
        self.trainer = trainer
        if self not in trainer.callback_handler.callbacks:
            trainer.add_callback(self)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Evaluates and writes the numbers into `metrics`, which the caller goes on to read."""
        if self.reward_funcs is None:
            raise ValueError(
                "GenerationEvaluator has reward_funcs=None and is attached to no trainer whose "
                "functions it could use. Pass reward_funcs or call evaluator.attach(trainer)."
            )
        prefix = metric_prefix(kwargs["metrics"])
        result = evaluate_generations(
            kwargs["model"],
            kwargs["processing_class"] if self.tokenizer is None else self.tokenizer,
            kwargs["eval_dataloader"].dataset if self.dataset is None else self.dataset,
            self.reward_funcs,
            trainer_state=state,
            **{**options_of(args), **self.options},
        )
        self.results[prefix] = result
        numbers = result.metrics(f"{prefix}_")
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


def options_of(args: TrainingArguments) -> dict[str, Any]:
    """What a trainer's config says about sampling, as arguments of `evaluate_generations`."""
    shared = {ours: getattr(args, theirs, None) for theirs, ours in SHARED_FIELDS.items()}
    generation = {name: getattr(args, name, None) for name in SHARED_GENERATION_FIELDS}
    generation |= getattr(args, "generation_kwargs", None) or {}
    shared["generation_kwargs"] = {k: v for k, v in generation.items() if v is not None}
    return {k: v for k, v in shared.items() if v is not None}
