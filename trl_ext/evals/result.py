"""What an evaluation keeps: enough to compare two policies prompt by prompt."""

from dataclasses import dataclass

from torch import Tensor

from trl_ext.evals.metrics import nll_bounds, per_prompt_estimates, successes, summarise
from trl_ext.objectives.majority import Unparsable


@dataclass(frozen=True)
class EvaluationResult:
    """What was sampled and how it was judged, one row per prompt in the dataset's order.

    Attributes:
        rewards_PG: `(P, G)` float64, NaN where unscorable; `None` without reward functions.
        labels_PG: `(P, G)` int64, equal for equal answers of one prompt, -1 where none was found;
            `None` without an answer extractor.
        lengths_PG: `(P, G)` int64, tokens per completion, end of sequence included.
        truncated_PG: `(P, G)` bool, no end of sequence within the limit.
        ks: the values of k that `metrics` reports.
        success_threshold: least reward of a correct completion.
        unparsable: what completions without an answer do in a vote.
        answer_logp_PG: `(P, G)` float64, log-probability of the reference answer behind each
            thought, nats, NaN where the thought has no marker; `None` without a marker to look for.
    """

    rewards_PG: Tensor | None
    labels_PG: Tensor | None
    lengths_PG: Tensor
    truncated_PG: Tensor
    ks: tuple[int, ...]
    success_threshold: float
    unparsable: Unparsable = "null"
    answer_logp_PG: Tensor | None = None

    @property
    def correct_P(self) -> Tensor:
        """`(P,)` int64, correct completions per prompt."""
        assert self.rewards_PG is not None, "no reward function said what is correct"
        return (successes(self.rewards_PG, self.success_threshold) == 1).sum(1)

    def per_prompt(self) -> dict[str, Tensor]:
        """Each number before averaging, `(P,)`; differences of these compare two policies."""
        estimates = {}
        if self.rewards_PG is not None:
            estimates |= per_prompt_estimates(
                self.rewards_PG,
                self.labels_PG,
                self.ks,
                success_threshold=self.success_threshold,
                unparsable=self.unparsable,
            )
            estimates["unscorable_rate"] = self.rewards_PG.isnan().double().mean(1)
        if self.answer_logp_PG is not None:
            estimates |= nll_bounds(self.answer_logp_PG, self.ks)
            estimates["marked_rate"] = (~self.answer_logp_PG.isnan()).double().mean(1)
        estimates["mean_length"] = self.lengths_PG.double().mean(1)
        estimates["truncation_rate"] = self.truncated_PG.double().mean(1)
        return estimates

    def metrics(self, prefix: str = "eval_") -> dict[str, float]:
        """Means over prompts and their standard errors, as `{prefix + name: number}`."""
        return {prefix + k: v for k, v in summarise(self.per_prompt()).items()}
