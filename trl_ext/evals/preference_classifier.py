"""The policy as a classifier of given pairs: does it prefer the chosen completion?

Kept apart from the quality of what the policy generates, with which it has little to do: policies
trained online classify at chance and generate better (arXiv:2405.08448, section 5).
"""

from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerState

from trl_ext.completions import completion_token_ids, tokenize_prompt
from trl_ext.evals import likelihood
from trl_ext.evals.evaluator import Evaluator
from trl_ext.evals.metrics import summarise, won
from trl_ext.evals.options import BatchOptions
from trl_ext.evals.shares import first_rows, rows_of_all_processes, whole_model

COLUMNS = ("prompt", "chosen", "rejected")


@dataclass(frozen=True, kw_only=True)
class PreferenceOptions(BatchOptions):
    """Options of `evaluate_preferences` and `PreferenceClassifier`, and [`BatchOptions`].

    Args:
        beta: above 0. With it, `loss` is reported: −log σ(β·margin), how well the policy's implicit
            Bradley-Terry model predicts the labels.
    """

    beta: float | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.beta is not None and not self.beta > 0:
            raise ValueError(f"beta={self.beta} scales the margin and must be above 0, or None.")


@dataclass(frozen=True)
class PreferenceResult:
    """Log-ratios of the two completions of each of P pairs.

    Attributes:
        chosen_log_ratio_P, rejected_log_ratio_P: float64, nats; log π(y) − log ref(y), summed over
            the completion's tokens, end of sequence included.
        beta: scale of the implicit reward, or `None`.
    """

    chosen_log_ratio_P: Tensor
    rejected_log_ratio_P: Tensor
    beta: float | None = None

    @property
    def margin_P(self) -> Tensor:
        """`(P,)`, nats: log-ratio of the chosen minus that of the rejected completion."""
        return self.chosen_log_ratio_P - self.rejected_log_ratio_P

    def per_pair(self) -> dict[str, Tensor]:
        """Each number before averaging, `(P,)`. A margin of 0 is half right: nothing was chosen."""
        margin_P = self.margin_P
        numbers = {
            "accuracy": won(margin_P),
            "margin": margin_P,
            "chosen_log_ratio": self.chosen_log_ratio_P,
            "rejected_log_ratio": self.rejected_log_ratio_P,
        }
        if self.beta is not None:
            numbers["loss"] = F.softplus(-self.beta * margin_P)
        return numbers

    def metrics(self, prefix: str = "classifier/") -> dict[str, float]:
        """Means over pairs and their standard errors, as `{prefix + name: number}`."""
        return {prefix + k: v for k, v in summarise(self.per_pair()).items()}


def evaluate_preferences(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    *,
    reference: PreTrainedModel | None = None,
    **options: Any,
) -> PreferenceResult:
    """Classifies pairs by the sign of the margin of log-ratios.

    margin = [log π(y_w|x) − log ref(y_w|x)] − [log π(y_l|x) − log ref(y_l|x)]

    Args:
        model: the policy π.
        tokenizer: of both models.
        dataset: columns `prompt`, `chosen`, `rejected`: strings, or message lists.
        reference: default the policy without its PEFT adapter, see `policy_drift`.
        options: fields of [`PreferenceOptions`].

    Raises:
        ValueError: an option out of range, no reference, a completion whose rendering does not
            continue its prompt's, or a model sharded by FSDP or ZeRO-3.

    A policy equal to its reference has margin 0 and accuracy 1/2, exactly.
    Source: arXiv:2405.08448, section 5.
    """
    checked = PreferenceOptions(**options)
    model = likelihood.check_reference(whole_model(model), reference)

    def rows_of(_: int, columns: dict[str, list]) -> list[float]:
        rows = [
            row
            for prompt, *pair in zip(*(columns[name] for name in COLUMNS), strict=True)
            for row in _tokenized(tokenizer, prompt, pair, checked.chat_template_kwargs or {})
        ]
        return _log_ratios(model, reference, rows, checked.batch_size)

    log_ratios = rows_of_all_processes(
        rows_of,
        first_rows(dataset, checked.max_prompts, COLUMNS),
        model,
        size=max(1, checked.batch_size // 2),
        title="Classifying pairs",
        disable_tqdm=checked.disable_tqdm,
    )
    chosen_P, rejected_P = torch.tensor(log_ratios, dtype=torch.float64).view(-1, 2).unbind(1)
    return PreferenceResult(chosen_P, rejected_P, checked.beta)


def _tokenized(
    tokenizer: PreTrainedTokenizerBase, prompt: Any, pair: list, template: dict[str, Any]
) -> list[likelihood.Row]:
    prompt_ids = tokenize_prompt(tokenizer, prompt, template)
    return [
        (prompt_ids, completion_token_ids(tokenizer, prompt, completion, prompt_ids, template))
        for completion in pair
    ]


def _log_ratios(
    model: PreTrainedModel,
    reference: PreTrainedModel | None,
    rows: list[likelihood.Row],
    batch_size: int,
) -> list[float]:
    """log π(y) − log ref(y) of each completion, nats."""
    log_ratios = []
    for batch in likelihood.in_batches(model, rows, batch_size):
        ours = likelihood.completion_logps(model, batch)
        with likelihood.reference_policy(model, reference) as ref:
            theirs = likelihood.completion_logps(ref, batch)
        log_ratios += [left - right for left, right in zip(ours, theirs, strict=True)]
    return log_ratios


class PreferenceClassifier(Evaluator):
    """Adds `eval_classifier/accuracy`, `margin` and log-ratios to every evaluation of a trainer.

    Training is the same to the bit with and without this callback.

    Args:
        dataset: held-out pairs in columns `prompt`, `chosen`, `rejected`; default the dataset under
            evaluation.
        reference: default the reference of the trainer it is attached to, or the policy without
            its PEFT adapter.
        tokenizer: default the trainer's `processing_class`.
        options: fields of [`PreferenceOptions`]; `batch_size`, `chat_template_kwargs` and
            `disable_tqdm` default to the trainer's config.

    Attributes:
        results: prefix of each evaluation set (`"eval"`) to the latest [`PreferenceResult`].
    """

    options_class = PreferenceOptions
    metrics_prefix = "classifier/"

    def __init__(
        self,
        dataset: Dataset | None = None,
        reference: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        **options: Any,
    ):
        super().__init__(dataset, tokenizer, **options)
        self.reference = reference

    def bind(self, trainer: Any) -> None:
        """Takes the reference from `trainer`."""
        self.reference = likelihood.reference_of_trainer(trainer, self.reference)

    def evaluate(self, model, tokenizer, dataset: Dataset, state: TrainerState, **options) -> Any:
        """A [`PreferenceResult`]."""
        return evaluate_preferences(model, tokenizer, dataset, reference=self.reference, **options)
