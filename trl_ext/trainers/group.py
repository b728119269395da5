"""What every trainer over whole groups asks of TRL's options, and where preferences come from."""

from dataclasses import dataclass, field
from typing import Any

from trl_ext.resolve import name_of, resolve
from trl_ext.trainers.base import BaseConfig, refuse_ignored

# Options of TRL's policy loss, for which a loss over groups has no place.
IGNORED = (
    *("epsilon_high", "delta", "importance_sampling_level", "scale_rewards"),
    *("multi_objective_aggregation", "mask_truncated_completions", "top_entropy_quantile"),
    *("entropy_coef", "use_adaptive_entropy", "off_policy_mask_threshold"),
    *("use_bias_correction_kl", "sapo_temperature_neg", "sapo_temperature_pos"),
    *("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg"),
    *("entropy_coef_min", "entropy_coef_max", "entropy_coef_delta", "entropy_target"),
    *("vllm_importance_sampling_correction", "vllm_importance_sampling_mode"),
    *("vllm_importance_sampling_clip_max", "vllm_importance_sampling_clip_min"),
)


@dataclass
class GroupConfig(BaseConfig):
    """What losses over whole groups have in common.

    Args:
        judge: who compares two completions, in place of reward functions.
        judge_both_orders: ask twice, each completion first once.
        scale_logps_by_temperature: score policy and reference as the sampler draws.
        record_path: folder of the record of what was sampled, scored and trained on.
    """

    judge: str | None = field(
        default=None,
        metadata={
            "help": "Pairwise judge, callable or 'module:function': (prompts, first, second) -> "
            "P(first beats second) per pair, or None. 'bradley_terry' makes one of the reward "
            "functions: σ(rᵢ − rⱼ) (arXiv:2312.00886, section 3)."
        },
    )
    judge_both_orders: bool = field(
        default=False,
        metadata={
            "help": "Ask the judge twice, each completion first once, and average: its taste for "
            "a position cancels (arXiv:2405.08448, section 3)."
        },
    )
    scale_logps_by_temperature: bool = field(
        default=False,
        metadata={
            "help": "Divide the logits of policy and reference by the sampling temperature where "
            "they are scored (arXiv:2410.18252, released code). False: temperature 1."
        },
    )
    record_path: str | None = field(
        default=None,
        metadata={
            "help": "Folder for a Parquet record of each round: prompts, completions, scores, "
            "pairs, in the order of training (arXiv:2405.08448, section 4)."
        },
    )
    scale_rewards: str = field(
        default="none",
        metadata={"help": "Not applied: rewards only order completions (arXiv:2402.04792, Eq. 1)."},
    )
    vllm_importance_sampling_correction: bool = field(
        default=False,
        metadata={
            "help": "Not applied: a loss over groups has its own correction, or none is due "
            "(arXiv:2410.18252, section 3)."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_ignored(self, IGNORED, f"{type(self).__name__} has its own loss over whole groups")
        if self.asks_judge and self.judge is not None:
            resolve(self.judge, "judge")
        if self.judge_both_orders and not self.asks_judge:
            raise ValueError(
                f"judge_both_orders=True is not applied with judge={self.judge!r}: rewards have no "
                "order. Leave it at False."
            )

    @property
    def asks_judge(self) -> bool:
        """Whether a judge is called; Bradley and Terry's needs only the rewards."""
        return self.judge is not None and self.judge != "bradley_terry"

    @property
    def scoring_temperature(self) -> float:
        return self.temperature if self.scale_logps_by_temperature else 1.0

    @property
    def score_name(self) -> str | None:
        return "win_rate" if self.asks_judge else None

    @property
    def other_writer(self) -> str | None:
        """The option by which not all completions are samples of the policy; None if all are."""
        return None

    def refuse_tempered(self, what: str) -> None:
        """A policy gradient is that of the policy which sampled."""
        if self.temperature != self.scoring_temperature:
            raise ValueError(
                f"temperature={self.temperature} with scale_logps_by_temperature=False is not "
                f"supported with {what}: completions would come from another policy than the one "
                "that is scored. Set temperature=1.0 or scale_logps_by_temperature=True."
            )

    @property
    def judge_name(self) -> str | None:
        """What stands for the judge in files."""
        return None if self.judge is None else name_of(self.judge)

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "judge": self.judge_name}

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "judge": self.judge_name}
