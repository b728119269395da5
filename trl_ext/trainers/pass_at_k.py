"""Training for pass@k: at least one of k samples is correct.

| `estimator`        | expected gradient, in units of ∇F_k                     | needs           |
|--------------------|---------------------------------------------------------|-----------------|
| `"loo"`            | ∇F_k (Tang et al.), averaged over the k-subsets of G    | k ≥ 1           |
| `"centred"`        | ∇F_{k−1}: the exact gradient of the (k−1)-sample        | k ≥ 2           |
|                    | objective, with less variance                           |                 |
| `"s"`              | ∇F_k (PKPO), no baseline                                | k ≥ 1           |
| `"sloo"`           | ∇F_k (PKPO), leave-one-out                              | k ≤ G − 1       |
| `"sloo_minus_one"` | ∇F_k (PKPO's default); equals `"loo"`                   | k ≥ 2           |
| `"analytic"`       | (1/k − 1/G) ∇pass@k, then each prompt divided by σ      | k < G, rewards  |
|                    | (Pass@k Training): a reweighting of prompts             | 0 or 1          |

F_k = E max(r₁ … r_k); for rewards in {0, 1} it is pass@k. The scale holds exactly with
`loss_type="dr_grpo"` (divided by the constant `max_completion_length`) or `"luspo"`; the other loss
types divide by lengths and reweigh completions.

Sources: arXiv:2503.19595 (Tang et al.), arXiv:2505.15201 (PKPO), arXiv:2508.10751.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor

from trl_ext.objectives.pass_at_k import centred_pass_at_k_credit, pass_at_k_credit
from trl_ext.objectives.pass_at_k_training import analytic_credit
from trl_ext.objectives.pkpo import pkpo_credit
from trl_ext.trainers.grpo import GRPOTrainer
from trl_ext.trainers.k_sample import TANG_2025, KSampleConfig

ESTIMATORS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "loo": pass_at_k_credit,
    "centred": centred_pass_at_k_credit,
    "s": partial(pkpo_credit, baseline="none"),
    "sloo": partial(pkpo_credit, baseline="loo"),
    "sloo_minus_one": partial(pkpo_credit, baseline="loo_minus_one"),
    "analytic": analytic_credit,
}
SMALLEST_K = {"centred": 2, "sloo_minus_one": 2}
BELOW_G = ("sloo", "analytic")


@dataclass
class PassAtKConfig(KSampleConfig):
    """Configuration of [`PassAtKTrainer`].

    Args:
        estimator: which estimate of the gradient; see `trl_ext.trainers.pass_at_k`.
        k_schedule: from which optimizer step on which k holds, e.g. `{0: 8, 1500: 1}`.
    """

    estimator: str = field(
        default="loo",
        metadata={
            "help": "'loo' or 'centred' (arXiv:2503.19595, section 3), 's', 'sloo' or "
            "'sloo_minus_one' (arXiv:2505.15201, section 4), 'analytic' (arXiv:2508.10751, "
            "section 2; rewards 0 or 1)."
        },
    )
    k_schedule: dict | str | None = field(
        default=None,
        metadata={
            "help": "Annealing of k: from which optimizer step on which k holds, e.g. "
            '\'{"0": 8, "1500": 1}\'; replaces k (arXiv:2505.15201, section 5).'
        },
    )

    def __post_init__(self) -> None:
        if self.estimator not in ESTIMATORS:
            raise ValueError(f"estimator={self.estimator!r} is none of {', '.join(ESTIMATORS)}.")
        if min(self.k_from_step, default=-1) != 0:
            raise ValueError(f"k_schedule={self.k_schedule!r} must say which k holds from step 0.")
        if self.k_schedule is not None:
            self.k_schedule = self.k_from_step
        super().__post_init__()

    @property
    def k_from_step(self) -> dict[int, int]:
        """From which optimizer step on which k holds."""
        given = {0: self.k} if self.k_schedule is None else self.k_schedule
        try:
            given = json.loads(given) if isinstance(given, str) else given
            return {int(step): int(k) for step, k in given.items()}
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(
                f"k_schedule={self.k_schedule!r} is no map from steps to k. Write it like "
                '{"0": 8, "1500": 1}.'
            ) from error

    @property
    def all_k(self) -> tuple[int, ...]:
        return tuple(self.k_from_step.values())

    def smallest_group(self, k: int) -> int:
        return max(k + 1 if self.estimator in BELOW_G else k, 2)

    def _check_k(self) -> None:
        super()._check_k()
        smallest = SMALLEST_K.get(self.estimator, 1)
        if min(self.all_k) < smallest:
            raise ValueError(
                f"k={min(self.all_k)} is not defined for estimator={self.estimator!r}, which "
                f"compares with k − 1 samples. Use k ≥ {smallest}, or estimator='loo'."
            )

    def k_at(self, step: int) -> int:
        """The k that holds in an optimizer step."""
        return self.k_from_step[max(start for start in self.k_from_step if start <= step)]


class PassAtKTrainer(GRPOTrainer):
    """Trains for E max of k rewards: P(at least one of k is correct). Formulas: `objectives`."""

    config_class = PassAtKConfig
    _tag_names = ["trl", "trl_ext", "pass-at-k"]
    _name = "Pass@k"
    _paper = TANG_2025

    @property
    def k(self) -> int:
        return self.args.k_at(self.state.global_step)

    @property
    def min_samples(self) -> int:
        return self.args.smallest_group(self.k)

    def credit(self, rewards_PG: Tensor) -> Tensor:
        if self.args.estimator == "analytic" and not ((rewards_PG == 0) | (rewards_PG == 1)).all():
            raise ValueError(
                f"estimator='analytic' needs rewards of exactly 0 or 1, got "
                f"{rewards_PG.unique().tolist()[:5]}. Use estimator='sloo_minus_one' for others."
            )
        return ESTIMATORS[self.args.estimator](rewards_PG, self.k)
