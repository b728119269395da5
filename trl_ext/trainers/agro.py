"""AGRO: rewards with a KL, learned from completions of any origin by one loss.

| `data_source` | who wrote the completions                  | who scored them             |
|---------------|--------------------------------------------|-----------------------------|
| `"online"`    | the policy, fresh or stale                 | reward functions or a judge |
| `"offline"`   | the column `responses`, a list per row     | the column `scores`         |
| `"mixed"`     | that column first, then the policy         | reward functions or a judge |
| `"replay"`    | the record of an earlier run               | the record                  |

A round may take some of its groups from a replay buffer of the rounds before it, `replay_rounds`.

The loss of a group is half the variance of R = r − β log π/ref over its completions, divided by β,
with the log-ratios of the policy of now at every optimizer step. No importance ratio, no clip and
no normaliser stands in it: at its optimum, π* ∝ ref · exp(r/β), the gradient of every group is 0,
whatever policy it came from, so that sampling with a temperature, `top_p` or stale weights costs no
exactness. `mode="full"` differentiates the law of the samples as well, and needs fresh ones of the
policy itself. Two relatives differ by a function:

| `loss_type` | loss of a completion, R as above                            | source     |
|-------------|-------------------------------------------------------------|------------|
| `"agro"`    | −(R − mean of the others' R) log π, R held fixed            | 2503.19612 |
| `"copg"`    | the mean of (R − R′)²/(4β) over pairs, R differentiated:    | 2406.19185 |
|             | the gradient of `"agro"`, and a value that is 0 at π*       |            |
| `"topr"`    | −w r log π, no KL and no baseline: w = 1 where r ≥ 0, else  | 2503.14286 |
|             | min(π/μ, 1), held fixed; r is ±1 in the paper               |            |

TOPR alone asks who wrote a completion: μ is the policy that sampled the round, or, offline, the one
of the column `logps`, which lists per row the log μ of each whole completion.
"""

import functools
import math
import textwrap
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from trl_ext.objectives.agro import (
    agro_full_loss,
    agro_loss,
    copg_loss,
    regularised_reward,
    taper,
    topr_loss,
)
from trl_ext.objectives.sequence_policy import leave_one_out_advantage
from trl_ext.rollouts.splice import check_context
from trl_ext.trainers._seam import GroupTrainer
from trl_ext.trainers.base import refuse_ignored, refuse_truncated_sampling, refuse_unknown
from trl_ext.trainers.group import GroupConfig
from trl_ext.trainers.group_rows import Group, Metrics, Selection
from trl_ext.trainers.pair_sources import (
    listed_completions,
    listed_logps,
    listed_scores,
    recorded_completions,
)
from trl_ext.trainers.replay_buffer import ReplayBuffer, replayed_groups

TANG_2025 = {
    "title": "RL-finetuning LLMs from on- and off-policy data with a single algorithm",
    "id": "2503.19612",
    "citation": textwrap.dedent("""\
        @article{tang2025rl,
            title  = {{RL-finetuning LLMs from on- and off-policy data with a single algorithm}},
            author = {Yunhao Tang and Taco Cohen and David W. Zhang and Michal Valko and others},
            year   = 2025,
            eprint = {arXiv:2503.19612},
        }"""),
}
CHOICES = {
    "loss_type": ("agro", "copg", "topr"),
    "mode": ("frozen", "full"),
    "data_source": ("online", "offline", "mixed", "replay"),
}
# What stands in the dataset's lists: a completion may not be missing, a score may.
LISTED = {
    "responses": ("a text or a list of messages", lambda item: isinstance(item, str | list)),
    "scores": ("a number or None", lambda item: not isinstance(item, str | list | dict)),
}


@dataclass
class AGROConfig(GroupConfig):
    """Configuration of [`AGROTrainer`].

    Args:
        loss_type: see `trl_ext.trainers.agro`.
        beta: weight of the KL to the reference; the paper's value is not known.
        mode: whether the law of the samples is differentiated.
        data_source: see `trl_ext.trainers.agro`.
        replay_rounds: size of the replay buffer.
        replay_share: how much of a round is taken from it.
    """

    loss_type: str = field(
        default="agro",
        metadata={
            "help": "'agro' (arXiv:2503.19612), 'copg', of the same gradient (arXiv:2406.19185), "
            "or 'topr', which has no KL (arXiv:2503.14286)."
        },
    )
    beta: float | None = field(
        default=None,
        metadata={
            "help": "β > 0, the weight of the KL to the reference; None: 0.05, and 0 for 'topr' "
            "(arXiv:2503.19612)."
        },
    )
    mode: str = field(
        default="frozen",
        metadata={
            "help": "'frozen': the variance over completions as they are, of any origin. 'full': "
            "the law of the policy's own fresh samples is differentiated too (arXiv:2503.19612)."
        },
    )
    data_source: str = field(
        default="online",
        metadata={
            "help": "'online' samples; 'offline' takes the columns responses and scores; 'mixed' "
            "fills a group that begins with the column responses; 'replay' takes the record of "
            "an earlier run (arXiv:2503.19612)."
        },
    )

    replay_rounds: int = field(
        default=0,
        metadata={
            "help": "Rounds whose groups are kept in memory and may be trained on again; a "
            "checkpoint holds them (arXiv:2503.19612)."
        },
    )
    replay_share: float = field(
        default=0.5,
        metadata={
            "help": "Share of each round's groups that replay_rounds > 0 takes from the rounds "
            "before (arXiv:2503.19612)."
        },
    )

    def __post_init__(self) -> None:
        refuse_unknown(self, CHOICES)
        if self.beta is None:
            self.beta = 0.0 if self.loss_type == "topr" else 0.05  # type: ignore[assignment]
        super().__post_init__()
        refuse_ignored(self, ["epsilon"], "the loss has no ratio that ε clips")
        if self.loss_type != "agro":
            refuse_ignored(self, ["mode"], f"loss_type={self.loss_type!r} has no such choice")
        if self.loss_type == "topr":
            self._check_topr()
        elif not 0 < self.beta < math.inf:
            raise ValueError(
                f"beta={self.beta} must be positive and finite: without a KL every constant reward "
                "is an optimum of the variance. For rewards alone use trl_ext.GRPOTrainer."
            )
        if self.judge is not None and not self.asks_judge:
            raise ValueError(
                f"judge={self.judge!r} is not applied: the loss is of the rewards themselves. "
                "Leave it unset, or pass a judge, whose win rates then are the rewards."
            )
        if self.mode == "full":
            self._check_full()
        if self.data_source in ("offline", "replay"):
            what = f"data_source={self.data_source!r} samples nothing"
            refuse_ignored(self, ["judge", "schedule", "replay_rounds"], what)
        self._check_replay()

    def _check_replay(self) -> None:
        if not self.replay_rounds:
            refuse_ignored(self, ["replay_share"], "replay_rounds=0 keeps no rounds")
        if self.replay_rounds < 0 or not 0 < self.replay_share <= 1:
            raise ValueError(
                f"replay_rounds={self.replay_rounds} must be ≥ 0 and replay_share="
                f"{self.replay_share} in (0, 1]."
            )
        rows = self.per_device_train_batch_size * (self.steps_per_generation or 1)
        groups = rows // (self.num_generations or 1)
        if self.replay_rounds and not replayed_groups(self.replay_share, groups):
            raise ValueError(
                f"replay_share={self.replay_share} of the {groups} groups that a process samples "
                "per round is none: nothing would be trained on again. Raise replay_share, "
                "per_device_train_batch_size or steps_per_generation."
            )

    def _check_topr(self) -> None:
        if self.beta != 0:
            raise ValueError(
                f"beta={self.beta} is not applied: loss_type='topr' has no KL to the reference. "
                "Leave it unset, or at 0."
            )
        if self.data_source in ("mixed", "replay") or self.replay_rounds:
            raise ValueError(
                f"data_source={self.data_source!r} with replay_rounds={self.replay_rounds} is not "
                "supported with loss_type='topr', which compares with the policy that wrote each "
                "completion. Use 'online', or 'offline' with the column logps, and replay_rounds=0."
            )
        if self.data_source == "online":
            refuse_truncated_sampling(self, "loss_type='topr'")
            self.refuse_tempered("loss_type='topr'")

    def _check_full(self) -> None:
        elsewhere = self.data_source != "online" or self.replay_rounds
        if elsewhere or self.schedule != "sync" or self.steps_per_round > 1:
            raise ValueError(
                f"mode='full' with data_source={self.data_source!r}, replay_rounds="
                f"{self.replay_rounds}, schedule={self.schedule!r} and {self.steps_per_round} "
                "optimizer steps per round: it differentiates the law of the samples, which must "
                "be the policy's of now. Use data_source='online', no replay, schedule='sync', "
                "num_iterations=1 and steps_per_generation=gradient_accumulation_steps, or "
                "mode='frozen'."
            )
        refuse_truncated_sampling(self, "mode='full'")
        self.refuse_tempered("mode='full'")

    @property
    def score_name(self) -> str | None:
        recorded = self.data_source in ("offline", "replay")
        return "recorded" if recorded else super().score_name

    @property
    def other_writer(self) -> str | None:
        return None if self.data_source == "online" else f"data_source={self.data_source!r}"


class AGROTrainer(GroupTrainer):
    """Any-generation reward optimisation. See this module's table."""

    config_class = AGROConfig
    _tag_names = ["trl", "trl_ext", "agro"]
    _name = "AGRO"
    _paper = TANG_2025

    @property
    def uses_old_logp(self) -> bool:
        return self.args.loss_type == "topr" and self.args.data_source == "online"

    @functools.cached_property
    def replay_buffer(self) -> ReplayBuffer:
        return ReplayBuffer(self.args.replay_rounds, self.args.replay_share)

    def given_completions(self, inputs, prompt_ids):
        if self.args.data_source == "online":
            return None
        if self.args.data_source == "replay":
            return recorded_completions(inputs, self.group_size)
        return listed(self, inputs, prompt_ids)

    def given_scores(self, inputs, completion_ids):
        if self.args.data_source == "replay":
            return [row["rewards"][i % self.group_size] for i, row in enumerate(inputs)]
        if self.args.data_source == "offline":
            return listed_scores(inputs, self.group_size)
        return []

    def select(self, rewards_PG, preferences_PGG, rows) -> Selection:
        return select_all(self.args, rewards_PG, rows)

    def group_loss(self, group: Group) -> tuple[Tensor, Metrics]:
        loss = tapered_loss if self.args.loss_type == "topr" else variance_loss
        return loss(self.args, group)


def listed(trainer: Any, rows: list, prompt_ids: list) -> list[list[int] | None]:
    """Token ids of the column `responses`, None where the list has ended and one is sampled."""
    for row in rows:
        check_lists(row)
    offline = trainer.args.data_source == "offline"
    known = (rows, prompt_ids, trainer.group_size, trainer.processing_class)
    given = listed_completions(*known, trainer.chat_template_kwargs, everyone=offline)
    if trainer.use_vllm and len({*gather_object([len(row["responses"]) for row in rows])}) > 1:
        raise ValueError(
            "the column 'responses' has lists of different lengths, which is not supported with "
            "use_vllm=True: vLLM is asked for equally many samples of each prompt. Make the lists "
            "equally long, or set use_vllm=False."
        )
    lengths = [len(p) + len(c) for p, c in zip(prompt_ids, given, strict=True) if c is not None]
    model = trainer.accelerator.unwrap_model(trainer.model)
    check_context(lengths, model, "prompt and response")
    return given


def check_lists(row: dict[str, Any]) -> None:
    """Refuses a text in the place of a list, which would be read letter by letter, and the like."""
    for column, (items, fits) in LISTED.items():
        told = row.get(column, ())
        a_list = hasattr(told, "__len__") and not isinstance(told, str)
        if not a_list or not all(map(fits, told)):
            raise ValueError(
                f"the column {column!r} holds {str(told)[:60]!r} for the prompt "
                f"{str(row['prompt'])[:60]!r}: give a list per row, {items} for each completion."
            )


def select_all(args: AGROConfig, rewards_PG: Tensor, rows: list) -> Selection:
    """Every completion of each group, and what the dataset says of its writer if that is asked."""
    index_PG = torch.arange(rewards_PG.size(1), device=rewards_PG.device).expand_as(rewards_PG)
    if args.loss_type != "topr":
        return Selection(index_PG, {}, leave_one_out_advantage(rewards_PG))
    stored = {}
    if args.data_source == "offline":
        stored = {"writer_logp": listed_logps(rows, rewards_PG.size(1)).to(rewards_PG)}
    return Selection(index_PG, stored, rewards_PG.nan_to_num())


def variance_loss(args: AGROConfig, group: Group) -> tuple[Tensor, Metrics]:
    """`(P,)`: the mean loss of each prompt's completions, and what is logged of their returns."""
    assert args.beta is not None
    rewards_PM = group.stored["rewards"].to(group.logp_PM.dtype)
    R_PM = regularised_reward(rewards_PM, group.logp_PM, group.ref_logp_PM, args.beta)
    if args.loss_type == "copg":
        loss_PM = copg_loss(rewards_PM, group.logp_PM, group.ref_logp_PM, args.beta)
    elif args.mode == "full":
        loss_PM = agro_full_loss(R_PM, group.logp_PM, args.beta)
    else:
        loss_PM = agro_loss(R_PM, group.logp_PM)
    away_PM = leave_one_out_advantage(R_PM) * R_PM.nan_to_num()  # its mean is R's variance
    compared_P = ((~R_PM.isnan()).sum(1) > 1).to(R_PM.dtype)
    return loss_PM.mean(1), {
        "return": _scored(R_PM),
        "return_variance": (away_PM.mean(1), compared_P),
    }


def tapered_loss(args: AGROConfig, group: Group) -> tuple[Tensor, Metrics]:
    """`(P,)`: TOPR's mean loss, and what is logged: rewards, and the weights w."""
    rewards_PM = group.stored["rewards"].to(group.logp_PM.dtype)
    writer_PM = group.stored.get("writer_logp", group.old_logp_PM).to(rewards_PM.dtype)
    known = rewards_PM, group.logp_PM, writer_PM
    return_PM, scored_PM = _scored(rewards_PM)
    metrics = {"return": (return_PM, scored_PM), "taper": (taper(*known), scored_PM)}
    return topr_loss(*known).mean(1), metrics


def _scored(values_PM: Tensor) -> tuple[Tensor, Tensor]:
    """Values, and weights that leave out the unscorable."""
    return values_PM.nan_to_num(), 1.0 - values_PM.isnan().to(values_PM.dtype)
