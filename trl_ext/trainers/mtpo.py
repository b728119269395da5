"""MTPO: conversations of many turns, compared when they are over.

| options                | method          | what a conversation earns                        |
|------------------------|-----------------|--------------------------------------------------|
| `judge`                | MTPO            | win rate against the others of its context − 1/2 |
| `judge`, `tau` > 0     | MTPO-τ          | the same; all of them are led by π^(1−τ) ref^τ   |
| reward functions alone | multi-turn RLHF | reward − mean of the others'                     |

Conversations come from TRL's `environment_factory` or `tools`, or from a `rollout_func` with an
`env_mask`; a turn is a run of tokens that the policy sampled between what others say. Without any
of these a completion is a single turn. With `tau` a `rollout_func` itself samples from the mixture
(`rollouts.sample` with an `Opponent`), whose samples its conversations are taken for. Each turn's
advantage is what the conversation earned minus `beta` times the log-ratio to the reference from
this turn on, as objectives/mtpo.py has it.

The loss is PPO's with a turn for an action. Fresh samples of the policy give the gradient of the
regularised game against the policy itself, held fixed, exactly. In later passes over a round, and
with `tau`, states and opponent stay those of the policy that sampled: a step of mirror descent.

A conversation that `max_completion_length` cut is judged as far as it went. One that could not be
judged behaves as if it had never been drawn. One without any turn of the policy's own is judged,
and learns nothing.
"""

import math
import textwrap
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from trl_ext.objectives.kl import vocab_kl
from trl_ext.objectives.mtpo import turn_advantages, turn_kl_loss, turn_policy_loss, win_credit
from trl_ext.objectives.pair_rules import win_rates
from trl_ext.objectives.segments import runs, segment_sums
from trl_ext.objectives.sequence_policy import leave_one_out_advantage
from trl_ext.rollouts import Opponent
from trl_ext.trainers._seam import GroupTrainer
from trl_ext.trainers.base import refuse_ignored, refuse_truncated_sampling, refuse_unknown
from trl_ext.trainers.group import GroupConfig
from trl_ext.trainers.group_rows import Group, Metrics, Selection

SHANI_2024 = {
    "title": "Multi-turn Reinforcement Learning from Preference Human Feedback",
    "id": "2405.14655",
    "citation": textwrap.dedent("""\
        @article{shani2024multiturn,
            title  = {{Multi-turn Reinforcement Learning from Preference Human Feedback}},
            author = {Lior Shani and Aviv Rosenberg and Asaf Cassel and Oran Lang and others},
            year   = 2024,
            eprint = {arXiv:2405.14655},
        }"""),
}
CHOICES = {"turn_kl": ("sampled", "vocab"), "kl_baseline": ("leave_one_out", "none")}


@dataclass
class MTPOConfig(GroupConfig):
    """Configuration of [`MTPOTrainer`].

    Args:
        beta: weight of the KL to the reference, the paper's α; by default the paper's value.
        tau: the reference's share in the policy that leads all conversations.
        turn_kl: how the KL at a turn itself is estimated.
        kl_baseline: what is subtracted from the KL from a turn on.
    """

    num_generations: int | None = field(
        default=2,
        metadata={"help": "Conversations per context, at least 2 (arXiv:2405.14655, table 4)."},
    )
    beta: float | None = field(  # type: ignore[assignment]
        default=None,
        metadata={
            "help": "Weight α of the KL to the reference; None: 0.005, with tau > 0 0.0025, with "
            "rewards in place of preferences 0.01 (arXiv:2405.14655, table 4)."
        },
    )
    tau: float = field(
        default=0.0,
        metadata={
            "help": "Share of the reference in the geometric mixture that all conversations are "
            "sampled from: 0 is MTPO, the paper's MTPO-τ has 0.0375 (arXiv:2405.14655, table 4)."
        },
    )
    turn_kl: str = field(
        default="sampled",
        metadata={
            "help": "KL at a turn itself, exact in both forms: 'sampled', the turn's log-ratio in "
            "its advantage, or 'vocab', from full next-token laws, which has less variance and "
            "costs one more forward pass of policy and reference (arXiv:2405.14655, section 5)."
        },
    )
    kl_baseline: str = field(
        default="leave_one_out",
        metadata={
            "help": "Baseline of the KL from a turn on: 'leave_one_out', the mean of the group's "
            "other conversations, or 'none' (arXiv:2405.14655, section 5, has a critic)."
        },
    )

    def __post_init__(self) -> None:
        if self.beta is None:
            of_preferences = 0.0025 if self.tau else 0.005
            self.beta = 0.01 if self.judge is None else of_preferences  # type: ignore[assignment]
        super().__post_init__()
        refuse_unknown(self, CHOICES)
        refuse_ignored(self, ["loss_type"], "the loss is a mean over conversations")
        refuse_truncated_sampling(self, "MTPO")
        self.refuse_tempered("MTPO")
        for name, most in (("tau", 1.0), ("beta", math.inf)):
            value: Any = getattr(self, name)
            if not isinstance(value, int | float) or not 0 <= value <= most:
                raise ValueError(f"{name}={value!r} is no weight. Give a number from 0 to {most}.")
        if not 0 < self.epsilon < 1:
            raise ValueError(f"epsilon={self.epsilon} must lie in (0, 1): ratios stay in 1 ± ε.")
        if self.beta == 0:
            refuse_ignored(self, ["turn_kl", "kl_baseline"], "beta=0 leaves no KL")
        if self.tau:
            self._check_mixture()

    def _check_mixture(self) -> None:
        if self.beta == 0:
            raise ValueError(
                f"tau={self.tau} with beta=0: there is no reference to mix with. Set beta > 0, or "
                "tau=0."
            )
        for name, needed in (
            ("use_vllm", False),
            ("use_transformers_continuous_batching", False),
            ("schedule", "sync"),
        ):
            if getattr(self, name) != needed:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is not supported with tau={self.tau}: the "
                    "mixture with the reference is sampled by model.generate, and scored by the "
                    f"weights that sampled it. Set {name}={needed!r}, or tau=0."
                )


class MTPOTrainer(GroupTrainer):
    """Multi-turn preference optimisation. See this module's table."""

    config_class = MTPOConfig
    _tag_names = ["trl", "trl_ext", "mtpo"]
    _name = "MTPO"
    _paper = SHANI_2024

    @property
    def uses_old_logp(self) -> bool:
        return True

    @property
    def opponent(self) -> Opponent | None:
        return Opponent(self.args.tau, group_size=None) if self.args.tau else None

    def select(self, rewards_PG, preferences_PGG, rows) -> Selection:
        index_PG = torch.arange(rewards_PG.size(1), device=rewards_PG.device).expand_as(rewards_PG)
        if preferences_PGG is None:
            credit_PG = reward_credit(rewards_PG)
            return Selection(index_PG, {"credit": credit_PG}, credit_PG.nan_to_num())
        win_PG = win_rates(preferences_PGG)
        credit_PG = win_credit(win_PG)
        return Selection(index_PG, {"credit": credit_PG, "win": win_PG}, credit_PG.nan_to_num())

    def group_loss(self, group: Group) -> tuple[Tensor, Metrics]:
        return group_loss(self.args, group)


def reward_credit(rewards_PG: Tensor) -> Tensor:
    """RLOO's advantage among the scored conversations; NaN where unscored, or scored alone."""
    scored_PG = ~rewards_PG.isnan()
    scored_P1 = scored_PG.sum(1, keepdim=True)
    # Undone: the factor that makes a mean over scored and unscored rows one over the scored.
    credit_PG = leave_one_out_advantage(rewards_PG) * scored_P1 / rewards_PG.size(1)
    return credit_PG.masked_fill(~scored_PG | (scored_P1 < 2), torch.nan)


def group_loss(args: MTPOConfig, group: Group) -> tuple[Tensor, Metrics]:
    """`(P,)`: mean over the judged conversations of a context of the loss of their turns."""
    assert args.beta is not None
    (P, M, _), turn_BT = group.mask_PMT.shape, runs(group.mask_PMT.flatten(0, 1))
    H = max(int(turn_BT.max()) + 1, 1)

    def by_turn(values_PMT: Tensor) -> Tensor:
        return segment_sums(values_PMT.flatten(0, 1), turn_BT, H).view(P, M, H)

    credit_PM = group.stored["credit"].to(group.logp_PMT.dtype)
    sampled_PMT = group.stored.get("sampled_logp", group.old_logp_PMT)
    logp_PMH, old_PMH, sampled_PMH = map(by_turn, (group.logp_PMT, group.old_logp_PMT, sampled_PMT))
    advantage_PMH = turn_advantages(
        credit_PM,
        by_turn(group.logp_PMT - group.ref_logp_PMT),
        args.beta,
        sampled_log_ratio_PGH=by_turn(sampled_PMT - group.ref_logp_PMT),
        include_own=args.turn_kl == "sampled",
        baseline=args.kl_baseline == "leave_one_out",
    )
    spoken_PMH = by_turn(torch.ones_like(group.logp_PMT)) > 0
    loss_PMH = turn_policy_loss(logp_PMH, old_PMH, sampled_PMH, advantage_PMH, args.epsilon)
    loss_PM = torch.where(spoken_PMH, loss_PMH, 0.0).sum(2)
    if args.turn_kl == "vocab":
        loss_PM = loss_PM + args.beta * own_kl(group, sampled_PMT, turn_BT)
    judged_PM = (~credit_PM.isnan()).to(loss_PM.dtype)
    loss_P = (loss_PM * judged_PM).sum(1) / judged_PM.sum(1).clamp(min=1)
    return loss_P, logged(group, credit_PM, spoken_PMH)


def own_kl(group: Group, sampled_PMT: Tensor, turn_BT: Tensor) -> Tensor:
    """`(P, M)`: loss with the gradient of the KL at each turn itself."""
    # One row at a time and recomputed in the backward pass: only the logits stay in memory.
    rows = zip(*group.logits(), strict=True)
    kl_BT = torch.stack([checkpoint(vocab_kl, *row, use_reentrant=False) for row in rows])
    logp_BT, sampled_BT = group.logp_PMT.flatten(0, 1), sampled_PMT.flatten(0, 1)
    loss_BT = turn_kl_loss(kl_BT, logp_BT, sampled_BT, turn_BT)
    return loss_BT.sum(1).view(group.mask_PMT.shape[:2])


def logged(group: Group, credit_PM: Tensor, spoken_PMH: Tensor) -> Metrics:
    """Turns of a conversation, and how many win where they are compared."""
    turns_PM = spoken_PMH.sum(2).to(credit_PM.dtype)
    metrics = {"turns": (turns_PM, torch.ones_like(turns_PM))}
    if "win" in group.stored:
        win_PM = group.stored["win"].to(credit_PM.dtype)
        metrics["win_rate"] = (win_PM.nan_to_num(), 1.0 - win_PM.isnan().to(win_PM.dtype))
    return metrics
