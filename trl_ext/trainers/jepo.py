"""JEPO: chains of thought learned from reference answers, without a verifier.

| `bound`      | what is raised, with p = π(a*|x, c)                | source     |
|--------------|----------------------------------------------------|------------|
| `"multi"`    | L_G = E log (1/G) Σ p, tighter with more samples   | 2503.19618 |
| `"single"`   | L₁ = E log p                                       | 2503.19618 |
| `"verifree"` | E p, which RLOO with an exact match estimates too  | 2505.21493 |
| `"latro"`    | L₁ − β KL of the thought, the KL in its reward     | 2411.04282 |

A completion is cut behind the first token that completes `marker`: that is the thought c. The
reference answer, tokenised on its own, stands behind it, and one forward pass of prompt, thought
and answer gives log π(c|x) and log p, both with their gradient and of the policy of now. The loss
has two terms: the thought's score times its advantage, and the answer's log-likelihood times
`supervised_coef`. The KL is that of the thought's law. A completion without marker, cut short or
not, has no answer: it is masked from the bound and learns from `format_penalty` and the KL alone.

With `combine_with_reward` a prompt that some sample solved is left to RLOO on the rewards of whole
completions, normalised and clipped as the bound's advantages are; the format penalty stays.

With `supervised_coef=1`, `format_penalty=0`, `advantage_clip=inf` and `advantage_scale="none"` the
gradient is exactly that of the bound.
"""

import math
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from trl_ext.objectives.jepo import (
    bound_estimate,
    format_advantage,
    latro,
    multi_bound,
    normalised,
    single_bound,
    unsolved,
    verifree,
)
from trl_ext.objectives.kl import sequence_kl_loss, sequence_total_kl_loss
from trl_ext.objectives.sequence_policy import leave_one_out_advantage, proximal_loss
from trl_ext.rollouts.splice import (
    answer_token_ids,
    check_context,
    check_marker,
    cut,
    end_of_answer,
    thought_length,
    with_answers,
)
from trl_ext.trainers._seam import GroupTrainer
from trl_ext.trainers.base import refuse_ignored, refuse_truncated_sampling, refuse_unknown
from trl_ext.trainers.group import GroupConfig
from trl_ext.trainers.group_rows import Group, Metrics, Selection

TANG_2025 = {
    "title": "Beyond Verifiable Rewards: Scaling Reinforcement Learning in Language Models to "
    "Unverifiable Data",
    "id": "2503.19618",
    "citation": textwrap.dedent("""\
        @article{tang2025beyond,
            title  = {{Beyond Verifiable Rewards: Scaling Reinforcement Learning in Language
                      Models to Unverifiable Data}},
            author = {Yunhao Tang and Sid Wang and Lovish Madaan and R{\\'e}mi Munos},
            year   = 2025,
            eprint = {arXiv:2503.19618},
        }"""),
}
CHOICES = {
    "bound": ("single", "multi", "verifree", "latro"),
    "advantage_scale": ("group", "batch", "none"),
    "kl_gradient": ("sequence", "sequence_total"),
}
KL_LOSSES = {"sequence": sequence_kl_loss, "sequence_total": sequence_total_kl_loss}


@dataclass
class JEPOConfig(GroupConfig):
    """Configuration of [`JEPOTrainer`].

    Args:
        bound: see `trl_ext.trainers.jepo`.
        marker: text behind which the answer stands.
        supervised_coef: weight of the answer's log-likelihood.
        combine_with_reward: use reward functions where some sample solved the prompt.
    """

    bound: str = field(
        default="multi",
        metadata={
            "help": "'multi', 'single' (arXiv:2503.19618, sections 3 and 4), 'verifree' "
            "(arXiv:2505.21493) or 'latro' (arXiv:2411.04282)."
        },
    )
    beta: float = field(
        default=1e-3,
        metadata={"help": "Weight of the KL of the thought (arXiv:2503.19618, section 5)."},
    )
    num_generations: int | None = field(
        default=4,
        metadata={"help": "n thoughts per prompt, at least 2 (arXiv:2503.19618, section 5)."},
    )
    marker: str = field(
        default="the final answer is",
        metadata={
            "help": "Text that ends the thought and announces the answer; empty for no thought "
            "(arXiv:2503.19618, appendix B)."
        },
    )
    answer_prefix: str = field(
        default=" ",
        metadata={
            "help": "Text between marker and answer, tokenised with the answer "
            "(arXiv:2503.19618, appendix B)."
        },
    )
    answer_eos: bool = field(
        default=True,
        metadata={
            "help": "Whether the end of sequence, in conversations that of a turn, belongs to the "
            "answer (arXiv:2503.19618, appendix B)."
        },
    )
    supervised_coef: float = field(
        default=1.0,
        metadata={
            "help": "Weight of the answer's log-likelihood: 1 for the bound itself and for long "
            "answers, 0 to 0.01 for short ones (arXiv:2503.19618, appendix B.2)."
        },
    )
    format_penalty: float = field(
        default=10.0,
        metadata={
            "help": "Penalty p of a completion without marker (arXiv:2503.19618, appendix B.2)."
        },
    )
    advantage_clip: float = field(
        default=1.0,
        metadata={
            "help": "Advantages are clipped to ± this after scaling; inf for none "
            "(arXiv:2503.19618, appendix B.2)."
        },
    )
    advantage_scale: str = field(
        default="group",
        metadata={
            "help": "Deviation that advantages are divided by: of the 'group', of the 'batch' (one "
            "micro-batch), or 'none' (arXiv:2503.19618, appendix B.2)."
        },
    )
    kl_gradient: str = field(
        default="sequence",
        metadata={
            "help": "Exact form of the KL's gradient: 'sequence' or 'sequence_total' "
            "(arXiv:2506.09477)."
        },
    )
    combine_with_reward: bool = field(
        default=False,
        metadata={
            "help": "Policy gradient on the reward functions where some sample earned a reward, "
            "the bound where none did; the format penalty in both (arXiv:2503.19618, section 5)."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_unknown(self, CHOICES)
        refuse_ignored(self, ["loss_type"], "`bound` says which loss")
        refuse_ignored(self, ["judge"], "the reference answer takes the place of a judge")
        self._check_ranges()
        if self.bound == "latro":
            refuse_ignored(self, ["kl_gradient"], "bound='latro' has the KL in its reward")
        if self.beta == 0:
            refuse_ignored(self, ["kl_gradient"], "beta=0 leaves no KL")
        what = "a record would show reference answers as if they had been sampled"
        refuse_ignored(self, ["record_path"], what)
        refuse_truncated_sampling(self, f"bound={self.bound!r}")
        if self.temperature != 1.0:
            raise ValueError(
                f"temperature={self.temperature} is not supported with bound={self.bound!r}: "
                "thoughts would come from another policy than the one whose answers are scored, "
                "which is the policy itself. Set temperature=1.0."
            )

    def _check_ranges(self) -> None:
        weights = self.beta, self.supervised_coef, self.format_penalty
        if not (all(0 <= w < math.inf for w in weights) and self.advantage_clip > 0):
            raise ValueError(
                f"beta={self.beta}, supervised_coef={self.supervised_coef} and format_penalty="
                f"{self.format_penalty} must be finite and ≥ 0, and advantage_clip="
                f"{self.advantage_clip} positive."
            )
        if not 0 < self.epsilon < 1:
            raise ValueError(f"epsilon={self.epsilon} must lie in (0, 1): ratios stay in 1 ± ε.")

    @property
    def score_name(self) -> str | None:
        return None if self.combine_with_reward else "marked"


class JEPOTrainer(GroupTrainer):
    """Jensen's evidence lower bound on the reference answer. See this module's table."""

    config_class = JEPOConfig
    _tag_names = ["trl", "trl_ext", "jepo"]
    _name = "JEPO"
    _paper = TANG_2025

    @property
    def uses_old_logp(self) -> bool:
        return True

    def _refuse_unsupported(self) -> None:
        super()._refuse_unsupported()
        refuse_what_a_splice_lacks(self)

    def given_scores(self, inputs, completion_ids):
        if self.args.combine_with_reward:
            return []
        return [float(self._thought_length(ids) is not None) for ids in completion_ids]

    def select(self, rewards_PG, preferences_PGG, rows) -> Selection:
        index_PG = torch.arange(rewards_PG.size(1), device=rewards_PG.device).expand_as(rewards_PG)
        by_bound_P = torch.ones_like(rewards_PG[:, 0], dtype=torch.bool)
        if self.args.combine_with_reward:
            by_bound_P = unsolved(rewards_PG)
        return Selection(index_PG, {"by_bound": by_bound_P}, rewards_PG.nan_to_num())

    def rewritten(self, output, kept, rows):
        ids_BT, mask_BT = output["completion_ids"], output["completion_mask"].bool()
        sampled = [ids[mask].tolist() for ids, mask in zip(ids_BT, mask_BT, strict=True)]
        marked = [self._thought_length(ids) for ids in sampled]
        kept.stored["marked"] = _found(marked, kept.stored["by_bound"])
        return answered(self, output, by_the_bound(marked, kept.stored["by_bound"]), rows)

    def _thought_length(self, token_ids: list[int]) -> int | None:
        return thought_length(token_ids, self.processing_class, self.args.marker)

    def group_loss(self, group: Group) -> tuple[Tensor, Metrics]:
        return group_loss(self.args, group)


def refuse_what_a_splice_lacks(trainer: Any) -> None:
    """A thought is what the policy alone sampled, and ends in a marker that it can write."""
    for name in ("tools", "environment_factories"):
        if getattr(trainer, name):
            raise ValueError(
                f"{name.replace('_factories', '_factory')} is not supported with JEPOTrainer: what "
                "a tool or an environment writes is no thought of the policy. Leave it unset."
            )
    check_marker(trainer.processing_class, trainer.args.marker, trainer.args.answer_prefix)


def _found(lengths: list[int | None], like_P: Tensor) -> Tensor:
    """`(P, G)`, whether a completion has a marker."""
    found_B = torch.tensor([n is not None for n in lengths], device=like_P.device)
    return found_B.view(len(like_P), -1)


def by_the_bound(lengths: list[int | None], by_bound_P: Tensor) -> list[int | None]:
    """Lengths of the thoughts behind which a reference answer belongs; None of all others."""
    bound_B = by_bound_P.repeat_interleave(len(lengths) // len(by_bound_P)).tolist()
    return [n if bound else None for n, bound in zip(lengths, bound_B, strict=True)]


def answered(
    trainer: Any, output: dict, lengths: list[int | None], rows: list[dict[str, Any]]
) -> dict:
    """The batch with the reference answers of the dataset's rows behind its thoughts."""
    args, tokenizer = trainer.args, trainer.processing_class
    end = end_of_answer(tokenizer, rows[0]["prompt"]) if args.answer_eos else None
    answers = [answer_token_ids(tokenizer, row, args.answer_prefix, end) for row in rows]
    asked = output["prompt_mask"].sum(1).tolist()
    told = [
        prompt + n + len(answer)
        for prompt, n, answer in zip(asked, lengths, answers, strict=True)
        if n is not None
    ]
    model = trainer.accelerator.unwrap_model(trainer.model)
    check_context(told, model, "prompt, thought and reference answer")
    ids_BT, mask_BT = output["completion_ids"], output["completion_mask"]
    spliced = with_answers(ids_BT, mask_BT, lengths, answers, tokenizer.pad_token_id)
    if output["old_logp"] is not None:
        width = spliced["completion_ids"].size(1)
        spliced["old_logp"] = cut(output["old_logp"], lengths, width)
    return {**output, **spliced}


def group_loss(args: JEPOConfig, group: Group) -> tuple[Tensor, Metrics]:
    """`(P,)`: policy gradient of the thoughts, likelihood of the answers, KL of the thoughts."""
    answer_PMT = group.stored["answer_mask"]
    thought_PMT = group.mask_PMT * (1 - answer_PMT)
    answer_PM = (group.logp_PMT * answer_PMT).sum(-1)
    thought_PM = (group.logp_PMT * thought_PMT).sum(-1)
    old_PM = (group.old_logp_PMT * thought_PMT).sum(-1)
    scored_PM = answer_PMT.any(-1)
    told_PM = torch.where(scored_PM, answer_PM.detach(), math.nan)
    ratio_PM = ((group.logp_PMT - group.ref_logp_PMT) * thought_PMT).sum(-1).detach()
    advantage_PM, weight_PM = _bound(args, told_PM, ratio_PM)
    advantage_PM = _combined(args, group, advantage_PM, scored_PM)
    # At the policy that sampled, the clip does nothing and the gradient is REINFORCE's.
    loss_PM = proximal_loss(thought_PM, old_PM, advantage_PM, args.epsilon)
    loss_PM = loss_PM - args.supervised_coef * weight_PM * answer_PM
    loss_P = loss_PM.mean(1)
    if args.beta and args.bound != "latro":
        loss_P = loss_P + args.beta * _kl(args, group, thought_PMT)
    return loss_P, _logged(told_PM, scored_PM, group)


def _bound(args: JEPOConfig, told_PM: Tensor, log_ratio_PM: Tensor) -> tuple[Tensor, Tensor]:
    if args.bound == "latro":
        return latro(told_PM, log_ratio_PM, args.beta)
    rules: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]]
    rules = {"single": single_bound, "multi": multi_bound, "verifree": verifree}
    return rules[args.bound](told_PM)


def _combined(args: JEPOConfig, group: Group, bound_PM: Tensor, scored_PM: Tensor) -> Tensor:
    """The thoughts' advantages: of the bound or of rewards, and of the format; each normalised."""

    def scaled(advantage_PM: Tensor, counted_PM: Tensor) -> Tensor:
        return normalised(
            advantage_PM, counted_PM, args.advantage_clip, cast(Any, args.advantage_scale)
        )

    marked_PM, everyone_PM = group.stored["marked"], torch.ones_like(scored_PM)
    advantage_PM = scaled(bound_PM, scored_PM)
    if args.combine_with_reward:
        reward_PM = group.stored["rewards"].to(bound_PM.dtype)
        rl_PM = scaled(leave_one_out_advantage(reward_PM), ~reward_PM.isnan())
        advantage_PM = torch.where(group.stored["by_bound"][:, None], advantage_PM, rl_PM)
    format_PM = format_advantage(marked_PM, args.format_penalty).to(bound_PM.dtype)
    return advantage_PM + scaled(format_PM, everyone_PM)


def _kl(args: JEPOConfig, group: Group, thought_PMT: Tensor) -> Tensor:
    """`(P,)`: mean over a prompt's thoughts of a loss with the gradient of their KL."""
    (P, M, T), mask_PMT = thought_PMT.shape, thought_PMT.to(group.logp_PMT.dtype)
    tokens = (group.logp_PMT, group.old_logp_PMT, group.ref_logp_PMT, mask_PMT)
    loss_BT = KL_LOSSES[args.kl_gradient](*(x.reshape(P * M, T) for x in tokens))
    return (loss_BT.view(P, M, T) * mask_PMT).sum(-1).mean(1)


def _logged(told_PM: Tensor, scored_PM: Tensor, group: Group) -> Metrics:
    """Share of completions with a marker, and the bounds of prompts whose thoughts all have one."""
    marked_PM, M = group.stored["marked"], told_PM.size(1)
    metrics = {"marked": (marked_PM.to(told_PM.dtype), torch.ones_like(told_PM))}
    whole_P = scored_PM.all(1)
    for n in [2**k for k in range(int(math.log2(M)) + 1)]:
        bound_P = torch.zeros_like(told_PM[:, 0])
        if whole_P.any():
            bound_P[whole_P] = bound_estimate(told_PM[whole_P], n)
        metrics[f"bound/L{n}"] = (bound_P, whole_P.to(told_PM.dtype))
    return metrics
