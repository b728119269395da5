"""What every objective over k samples asks of TRL's options, and the paper that began with them."""

import itertools
import textwrap
from dataclasses import dataclass, field

from trl_ext.trainers.base import refuse_truncated_sampling, warn_if_lengths_reweigh
from trl_ext.trainers.grpo import GRPOConfig

TANG_2025 = {
    "title": "Optimizing Language Models for Inference Time Objectives using Reinforcement "
    "Learning",
    "id": "2503.19595",
    "citation": textwrap.dedent("""\
        @inproceedings{tang2025optimizing,
            title     = {{Optimizing Language Models for Inference Time Objectives using
                          Reinforcement Learning}},
            author    = {Yunhao Tang and Kunhao Zheng and Gabriel Synnaeve and R{\\'e}mi Munos},
            booktitle = {International Conference on Machine Learning},
            year      = 2025,
            eprint    = {arXiv:2503.19595},
        }"""),
}


@dataclass
class KSampleConfig(GRPOConfig):
    """What every k-sample objective asks of TRL's options.

    Args:
        k: samples that the objective looks at, at most `num_generations`.
    """

    loss_type: str = field(
        default="dr_grpo",
        metadata={
            "help": "Normaliser of the loss; 'dr_grpo' and 'luspo' keep the scale of the k-sample "
            "objective, the others reweigh completions by length (arXiv:2503.20783, section 3)."
        },
    )
    scale_rewards: str = field(
        default="none",
        metadata={
            "help": "Only 'none': a k-sample credit has its own baseline, and a group's deviation "
            "would reweigh prompts (arXiv:2503.19595, section 3)."
        },
    )
    k: int = field(
        default=4,
        metadata={
            "help": "Samples that the objective looks at, at most num_generations "
            "(arXiv:2503.19595, section 3)."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        name = type(self).__name__
        if self.scale_rewards != "none":
            raise ValueError(
                f"scale_rewards={self.scale_rewards!r} is not applied: the credit of {name} has "
                "its own baseline, and a group's deviation would change the objective. Leave it "
                "at 'none'."
            )
        if self.multi_objective_aggregation != "sum_then_normalize":
            raise ValueError(
                f"multi_objective_aggregation={self.multi_objective_aggregation!r} is not applied: "
                f"{name} needs one reward per completion. Leave it at 'sum_then_normalize'."
            )
        refuse_truncated_sampling(self, name)
        warn_if_lengths_reweigh(self, stacklevel=4)  # the line that builds the config
        self._check_k()

    @property
    def all_k(self) -> tuple[int, ...]:
        """Every k that the run will use."""
        return (self.k,)

    def smallest_group(self, k: int) -> int:
        """Samples that a group must have for its credit to be defined."""
        return max(k, 2)

    def _check_k(self) -> None:
        names = ("num_generations", "num_generations_eval")
        sizes = {name: size for name in names if (size := getattr(self, name)) is not None}
        for k, (name, size) in itertools.product(self.all_k, sizes.items()):
            if not 1 <= k <= size or self.smallest_group(k) > size:
                raise ValueError(
                    f"k={k} is not defined for {name}={size} in {type(self).__name__}: it needs "
                    f"at least {self.smallest_group(max(k, 1))} samples and k ≥ 1. Lower k or "
                    f"raise {name}."
                )
