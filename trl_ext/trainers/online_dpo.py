"""Online DPO and its relatives: preference losses on pairs that the policy sampled itself.

| `loss_type`          | loss of a pair, Δ = ρ(y_w) − ρ(y_l), ρ = log π/ref         | source     |
|----------------------|------------------------------------------------------------|------------|
| `"sigmoid"`          | −log σ(βΔ); with `f_divergence` β(f′(u_w) − f′(u_l))       | 2402.04792 |
| `"ipo"`              | (Δ − 1/(2β))², summed log-probabilities                    | 2310.12036 |
| `"ipo_normalised"`   | (βΔ − 1/2)², β² times the same                             | 2405.08448 |
| `"hinge"`            | max(0, 1 − βΔ)                                             | 2402.04792 |
| `"robust"`           | −log σ freed of labels flipped with rate `label_smoothing` | 2403.00409 |
| `"rpo"`              | −log σ(βΔ) − ηβ log π(y_w), summed                         | 2405.16436 |
| `"xpo"`              | −log σ(βΔ) + α log π(ỹ), ỹ from the reference              | 2405.21046 |
| `"best_of_k_sft"`    | −log π(y_w)                                                | 2410.18252 |
| `"rloo"`             | −A log π(y), A leave-one-out of r − βρ, all K completions  | 2402.14740 |
| `"proximal_rloo"`    | −min(wA, clip(w, 1 ± ε)A), w per completion                | 2410.18252 |

The loss is the mean over prompts, those with a tie included at exactly 0: it does not depend on how
the batch is factored, and nothing is learned from a tie. `"rloo"` is meant for fresh samples: with
`num_iterations > 1` or `schedule="one_step"` it is not corrected, `"proximal_rloo"` is. Where the
pairs come from is `pair_source`: the loss and the code are the same for all of them.
"""

import textwrap
from typing import Any, cast

import torch
from torch import Tensor

from trl_ext.objectives.f_divergence import divergence_score
from trl_ext.objectives.kl import leave_one_out_kl_loss
from trl_ext.objectives.pair_rules import (
    all_pairs,
    best_worst,
    first_two,
    missing_eos,
    soft,
    win_rates,
)
from trl_ext.objectives.pairs import (
    best_of_k_sft_loss,
    exploration_bonus,
    hinge_loss,
    ipo_loss,
    labelled,
    robust_loss,
    rpo_loss,
    sigmoid_loss,
)
from trl_ext.objectives.sequence_policy import (
    leave_one_out_advantage,
    proximal_loss,
    reinforce_loss,
)
from trl_ext.rollouts import Opponent
from trl_ext.trainers._seam import GroupTrainer
from trl_ext.trainers.group_rows import Group, Metrics, Selection
from trl_ext.trainers.online_dpo_config import POLICY_GRADIENTS, OnlineDPOConfig
from trl_ext.trainers.pair_sources import (
    given_completions,
    given_scores,
    recorded_selection,
    selection_of,
)

GUO_2024 = {
    "title": "Direct Language Model Alignment from Online AI Feedback",
    "id": "2402.04792",
    "citation": textwrap.dedent("""\
        @article{guo2024direct,
            title  = {{Direct Language Model Alignment from Online AI Feedback}},
            author = {Shangmin Guo and Biao Zhang and Tianlin Liu and others},
            year   = 2024,
            eprint = {arXiv:2402.04792},
        }"""),
}
PAIR_RULES = {"best_worst": best_worst, "first_two": first_two, "all_pairs": all_pairs}


class OnlineDPOTrainer(GroupTrainer):
    """Trains on preferences between the policy's own completions. See this module's table."""

    config_class = OnlineDPOConfig
    _tag_names = ["trl", "trl_ext", "online-dpo"]
    _name = "Online DPO"
    _paper = GUO_2024

    @property
    def uses_old_logp(self) -> bool:
        return self.args.loss_type == "proximal_rloo"

    @property
    def opponent(self) -> Opponent | None:
        return Opponent(1.0, self.group_size) if self.args.loss_type == "xpo" else None

    @property
    def judged_places(self) -> list[tuple[int, int]]:
        return [(0, 1)] if self.args.pair_rule == "first_two" else super().judged_places

    def given_completions(self, inputs, prompt_ids):
        source, template = self.args.pair_source, self.chat_template_kwargs
        known = (inputs, prompt_ids, self.group_size, self.processing_class)
        return given_completions(source, *known, template)

    def given_scores(self, inputs, completion_ids):
        return given_scores(self.args.pair_source, inputs, self.group_size)

    def shaped_rewards(self, rewards_PG, truncated_PG):
        value = self.args.missing_eos_value or 0.0
        return missing_eos(rewards_PG, truncated_PG, self.args.missing_eos, value)

    def select(self, rewards_PG, preferences_PGG, rows) -> Selection:
        return select_pairs(self.args, rewards_PG, preferences_PGG, rows)

    def group_loss(self, group: Group) -> tuple[Tensor, Metrics]:
        loss = policy_gradient if self.args.loss_type in POLICY_GRADIENTS else pair_loss
        return loss(self.args, group)


def select_pairs(
    args: OnlineDPOConfig, rewards_PG: Tensor, preferences_PGG: Tensor | None, rows: list
) -> Selection:
    """The completions and pairs that `args` asks for."""
    (P, G), source = rewards_PG.shape, args.pair_source
    if source == "replay":
        return recorded_selection(rows, rewards_PG)
    if args.loss_type in POLICY_GRADIENTS:
        index_PG = torch.arange(G, device=rewards_PG.device).expand(P, G)
        return Selection(index_PG, {}, leave_one_out_advantage(rewards_PG))
    in_place = source != "online" or args.loss_type == "xpo"
    rule = first_two if in_place else PAIR_RULES[args.pair_rule]
    if preferences_PGG is None:
        pairs = rule(rewards_PG)
    else:
        scores_PG = win_rates(preferences_PGG)
        pairs = rule(scores_PG, preferences_PGG=preferences_PGG)
        if args.soft_labels:
            pairs = soft(pairs, preferences_PGG)
    return selection_of(pairs, G, everyone=in_place or args.pair_rule == "all_pairs")


def pair_loss(args: OnlineDPOConfig, group: Group) -> tuple[Tensor, Metrics]:
    """`(P,)`: the loss of each prompt's pairs, 0 where all are ties; and what is logged of them."""
    chosen_PN, rejected_PN = group.stored["chosen"], group.stored["rejected"]
    weight_PN = group.stored["weight"].to(group.logp_PM.dtype)
    score_PM = divergence_score(_log_ratio(args, group), cast(Any, args.f_divergence), args.f_alpha)
    score_w, score_l = score_PM.gather(1, chosen_PN), score_PM.gather(1, rejected_PN)
    logp_w, logp_l = group.logp_PM.gather(1, chosen_PN), group.logp_PM.gather(1, rejected_PN)
    delta_PN, label_PN = score_w - score_l, torch.ones_like(score_w)
    if args.soft_labels:
        label_PN = group.stored["label"].to(score_w.dtype)
    loss_PN = _loss_of_pairs(args, delta_PN, label_PN, logp_w)
    loss_PN = torch.where(weight_PN > 0, weight_PN * loss_PN, 0.0)
    decided_PN, beta = (weight_PN > 0).to(weight_PN.dtype), args.beta
    metrics = {
        "rewards/chosen": (beta * score_w, decided_PN),
        "rewards/rejected": (beta * score_l, decided_PN),
        "rewards/margins": (beta * delta_PN, decided_PN),
        "rewards/accuracies": ((delta_PN.sign() + 1) / 2, decided_PN),
        "logps/chosen": (logp_w, decided_PN),
        "logps/rejected": (logp_l, decided_PN),
        "frac_ties": (1 - decided_PN, torch.ones_like(decided_PN)),
    }
    loss_P = loss_PN.sum(1)
    if args.loss_type == "xpo":  # of the pair, the second was sampled from the reference
        loss_P = loss_P + exploration_bonus(group.logp_PM[:, 1], args.xpo_alpha)
    if args.pair_source == "hybrid":  # what follows the dataset's pair was sampled
        samples = (group.logp_PM[:, 2:], group.ref_logp_PM[:, 2:])
        loss_P = loss_P + cast(float, args.kl_coef) * leave_one_out_kl_loss(*samples)
    return loss_P, metrics


def _log_ratio(args: OnlineDPOConfig, group: Group) -> Tensor:
    rho_PM = group.logp_PM - group.ref_logp_PM
    return rho_PM / group.lengths_PM.clamp(min=1) if args.length_normalised else rho_PM


def _loss_of_pairs(
    args: OnlineDPOConfig, delta: Tensor, label: Tensor, chosen_logp: Tensor
) -> Tensor:
    margin, beta = args.beta * delta, args.beta
    if args.loss_type == "best_of_k_sft":
        return best_of_k_sft_loss(chosen_logp)
    if args.loss_type == "rpo":
        return rpo_loss(margin, chosen_logp, beta, args.rpo_eta)
    if args.loss_type == "robust":
        return robust_loss(margin, args.label_smoothing)
    if args.loss_type in ("ipo", "ipo_normalised"):
        normalised = args.loss_type == "ipo_normalised"
        return labelled(lambda d: ipo_loss(d, beta, normalised), delta, label)
    loss = hinge_loss if args.loss_type == "hinge" else sigmoid_loss
    return labelled(loss, margin, label)


def policy_gradient(args: OnlineDPOConfig, group: Group) -> tuple[Tensor, Metrics]:
    """`(P,)`: the mean loss of each prompt's completions; unscorable ones have no part in it."""
    penalty_PM = args.beta * (group.logp_PM - group.ref_logp_PM).detach()
    return_PM = group.stored["rewards"].to(penalty_PM.dtype) - penalty_PM
    advantage_PM = leave_one_out_advantage(return_PM)
    if args.loss_type == "rloo":
        loss_PM = reinforce_loss(group.logp_PM, advantage_PM)
    else:
        loss_PM = proximal_loss(group.logp_PM, group.old_logp_PM, advantage_PM, args.epsilon)
    scored_PM = 1.0 - return_PM.isnan().to(penalty_PM.dtype)
    return loss_PM.mean(1), {"return": (return_PM.nan_to_num(), scored_PM)}
