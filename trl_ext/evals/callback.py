"""Brings `evaluate_generations` into `Trainer.evaluate()`."""

from collections.abc import Sequence
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase, TrainerState

from trl_ext.evals.evaluator import Evaluator, options_of
from trl_ext.evals.generation import evaluate_generations
from trl_ext.evals.options import EvaluationOptions
from trl_ext.evals.scoring import RewardFunc, checked_reward_funcs
from trl_ext.rollouts.splice import check_marker


class GenerationEvaluator(Evaluator):
    """Adds pass@k, maj@k, pass^k, length and truncation to every evaluation of a trainer.

    In a `JEPOTrainer`, or with a `marker`, it also reports, from the same samples, the bounds
    `nll_L1`, `nll_L2`, ... on the negative log-likelihood of the column `answer`, in nats, and
    `marked_rate`, the share of thoughts with a marker, of which alone the bounds are.

    Works in GRPO-family trainers of trl_ext and TRL. The numbers go into the dictionary that
    `trainer.evaluate()` returns, so that `metric_for_best_model="eval_pass@1"` and early stopping
    read them; an `EarlyStoppingCallback` must come after this one in `callbacks`. transformers
    takes a larger value to be better for every metric whose name does not end in `loss`: set
    `greater_is_better=False` to select by length or truncation.

    Training is the same to the bit with and without this callback. It samples with
    `model.generate`, also where training samples with vLLM or a `rollout_func`.

    Args:
        reward_funcs: default the trainer's own with its weights; needed unless attached, or unless
            a `marker` is known: then only the bounds are reported.
        dataset: default the dataset under evaluation. With several evaluation sets each is
            evaluated under its own prefix, `eval_<name>_`.
        tokenizer: default the trainer's `processing_class`.
        options: fields of [`EvaluationOptions`]. Those that say how to sample
            (`max_completion_length`, `temperature`, `top_p`, `top_k`, `generation_kwargs`,
            `chat_template_kwargs`), where the answer stands (`marker`, `answer_prefix`,
            `answer_eos`), `reward_weights` and `disable_tqdm` default to the trainer's config, and
            `batch_size` to its `per_device_eval_batch_size`.

    Attributes:
        results: prefix of each evaluation set (`"eval"`) to the latest [`EvaluationResult`].

    Example:

    ```python
    evaluator = GenerationEvaluator(num_generations=16, answer_extractor=last_number)
    trainer = GRPOTrainer(..., eval_dataset=held_out, callbacks=[evaluator])
    evaluator.attach(trainer)  # trl_ext's trainers do this by themselves
    ```
    """

    options_class = EvaluationOptions

    def __init__(
        self,
        reward_funcs: RewardFunc | Sequence[RewardFunc] | None = None,
        dataset: Dataset | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        **options: Any,
    ):
        super().__init__(dataset, tokenizer, **options)
        self.reward_funcs = None if reward_funcs is None else checked_reward_funcs(reward_funcs)

    def bind(self, trainer: Any) -> None:
        """Takes reward functions and their weights from `trainer`."""
        if self.reward_funcs is None and getattr(trainer.args, "score_name", None) is None:
            self.reward_funcs = checked_reward_funcs(getattr(trainer, "reward_funcs", []))
            weights = getattr(trainer.args, "reward_weights", None)
            self.options = {"reward_weights": weights, **self.options}
        # refuses now what does not go together, not after hours of training
        told = {**options_of(trainer.args, EvaluationOptions), **self.options}
        options = EvaluationOptions(**told)
        if options.marker is not None:
            tokenizer = trainer.processing_class if self.tokenizer is None else self.tokenizer
            check_marker(tokenizer, options.marker, options.answer_prefix)

    def evaluate(self, model, tokenizer, dataset: Dataset, state: TrainerState, **options) -> Any:
        """An [`EvaluationResult`]."""
        if self.reward_funcs is None and options.get("marker") is None:
            raise ValueError(
                "GenerationEvaluator has reward_funcs=None and is attached to no trainer whose "
                "functions it could use. Pass reward_funcs, or call evaluator.attach(trainer) with "
                "a trainer that has some."
            )
        return evaluate_generations(
            model, tokenizer, dataset, self.reward_funcs, trainer_state=state, **options
        )
