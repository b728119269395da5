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
the batch is factored, and nothing is learned from a tie. Where the pairs come from is
`pair_source`: the loss and the code are the same for all of them.
"""

from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from trl_ext.objectives.f_divergence import divergence_score
from trl_ext.objectives.kl import leave_one_out_kl_loss
from trl_ext.objectives.pair_rules import all_pairs, best_worst, first_two, missing_eos
from trl_ext.objectives.pairs import (
    best_of_k_sft_loss,
    hinge_loss,
    ipo_loss,
    labelled,
    robust_loss,
    rpo_loss,
    sigmoid_loss,
    xpo_loss,
)
from trl_ext.objectives.scorable import credit_of_scorable
from trl_ext.objectives.sequence_policy import (
    leave_one_out_advantage,
    proximal_loss,
    reinforce_loss,
)
from trl_ext.rollouts import Opponent
from trl_ext.trainers._seam import GroupTrainer
from trl_ext.trainers.base import refuse_ignored, refuse_truncated_sampling, refuse_unknown
from trl_ext.trainers.group import GroupConfig
from trl_ext.trainers.group_rows import Group, Metrics, Selection
from trl_ext.trainers.pair_sources import (
    dataset_completions,
    recorded_completions,
    recorded_selection,
    selection_of,
)

PAIR_RULES = {"best_worst": best_worst, "first_two": first_two, "all_pairs": all_pairs}
POLICY_GRADIENTS = ("rloo", "proximal_rloo")
WITHOUT_REFERENCE = (*POLICY_GRADIENTS, "best_of_k_sft")
CHOICES = {
    "loss_type": (
        *("sigmoid", "ipo", "ipo_normalised", "hinge", "robust", "rpo", "xpo"),
        *("best_of_k_sft", *POLICY_GRADIENTS),
    ),
    "pair_rule": tuple(PAIR_RULES),
    "pair_source": ("online", "offline", "replay", "hybrid"),
    "missing_eos": ("none", "subtract", "replace"),
    "f_divergence": ("reverse_kl", "forward_kl", "js", "alpha"),
}
# Option -> the loss types that read it; elsewhere it must have its default.
ONLY_FOR = {
    "f_divergence": ("sigmoid",),
    "label_smoothing": ("robust",),
    "rpo_eta": ("rpo",),
    "xpo_alpha": ("xpo",),
    "epsilon": ("proximal_rloo",),
    "soft_labels": ("sigmoid", "ipo", "ipo_normalised", "hinge"),
    "length_normalised": ("sigmoid", "ipo", "ipo_normalised", "hinge", "robust"),
}


@dataclass
class OnlineDPOConfig(GroupConfig):
    """Configuration of [`OnlineDPOTrainer`].

    Args:
        beta: strength of the pull towards the reference; the coefficient of the KL in the reward of
            the policy gradients.
        loss_type: see `trl_ext.trainers.online_dpo`.
        num_generations: K completions per prompt.
        pair_rule: which completions of a group form a pair.
        pair_source: who wrote the completions.
        missing_eos: what a completion without end of sequence is worth.
    """

    beta: float = field(
        default=0.1,
        metadata={"help": "β, the pull towards the reference (arXiv:2402.04792, Eq. 1)."},
    )
    loss_type: str = field(
        default="sigmoid",
        metadata={
            "help": "'sigmoid', 'ipo', 'ipo_normalised', 'hinge', 'robust', 'rpo', 'xpo', "
            "'best_of_k_sft', 'rloo' or 'proximal_rloo' (arXiv:2402.04792, section 3; "
            "arXiv:2410.18252, section 4)."
        },
    )
    num_generations: int | None = field(
        default=2,
        metadata={"help": "K completions per prompt, at least 2 (arXiv:2410.18252, section 4.2)."},
    )
    pair_rule: str = field(
        default="best_worst",
        metadata={
            "help": "'best_worst' of the K completions, the 'first_two', or 'all_pairs' with equal "
            "weights (arXiv:2410.18252, section 4.2)."
        },
    )
    pair_source: str = field(
        default="online",
        metadata={
            "help": "'online' samples; 'offline' takes the columns chosen and rejected; 'replay' "
            "takes the record of an earlier run; 'hybrid' takes the pair of the dataset for the "
            "loss and num_generations − 2 samples for the KL (arXiv:2405.08448, section 4; "
            "arXiv:2406.01462)."
        },
    )
    missing_eos: str = field(
        default="none",
        metadata={
            "help": "Reward of a completion without end of sequence: 'none' leaves it, 'subtract' "
            "lowers it by missing_eos_value, 'replace' puts that in its place "
            "(arXiv:2410.18252, appendix A)."
        },
    )
    missing_eos_value: float | None = field(
        default=None,
        metadata={"help": "Value for missing_eos, e.g. -1 (arXiv:2410.18252, appendix A)."},
    )
    soft_labels: bool = field(
        default=False,
        metadata={
            "help": "Weigh both directions of a pair with the judge's probability instead of "
            "taking its winner (arXiv:2407.00617, Eq. 8)."
        },
    )
    length_normalised: bool = field(
        default=False,
        metadata={
            "help": "Divide log-probabilities by the completion's length, as TRL's offline IPO "
            "does (arXiv:2310.12036, section 5)."
        },
    )
    f_divergence: str = field(
        default="reverse_kl",
        metadata={
            "help": "Divergence that holds the policy: 'reverse_kl', 'forward_kl', 'js' or "
            "'alpha' (arXiv:2309.16240, table 1)."
        },
    )
    f_alpha: float = field(
        default=0.5,
        metadata={
            "help": "α of f_divergence='alpha', 1 − TRL's f_alpha_divergence_coef "
            "(arXiv:2309.16240, table 1)."
        },
    )
    label_smoothing: float = field(
        default=0.0,
        metadata={
            "help": "Rate of flipped labels that 'robust' undoes (arXiv:2403.00409, section 3)."
        },
    )
    rpo_eta: float = field(
        default=0.005,
        metadata={"help": "η of 'rpo' (arXiv:2405.16436, section 5)."},
    )
    xpo_alpha: float = field(
        default=1e-5,
        metadata={"help": "α of 'xpo', the exploration bonus (arXiv:2405.21046, algorithm 1)."},
    )
    kl_coef: float | None = field(
        default=None,
        metadata={
            "help": "λ of pair_source='hybrid', the weight of the KL on samples "
            "(arXiv:2406.01462, section 4)."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_unknown(self, CHOICES)
        for option, losses in ONLY_FOR.items():
            if self.loss_type not in losses:
                refuse_ignored(self, [option], f"loss_type={self.loss_type!r} does not read it")
        if self.f_divergence != "alpha":
            refuse_ignored(self, ["f_alpha"], f"f_divergence={self.f_divergence!r} has no α")
        if self.beta <= 0 and not (self.beta == 0 and self.loss_type in WITHOUT_REFERENCE):
            raise ValueError(
                f"beta={self.beta} must be positive with loss_type={self.loss_type!r}: the loss "
                "compares the policy with the reference."
            )
        if not (0 <= self.label_smoothing < 0.5 and 0 < self.f_alpha < 1):
            raise ValueError(
                f"label_smoothing={self.label_smoothing} must lie in [0, 0.5) and "
                f"f_alpha={self.f_alpha} in (0, 1)."
            )
        self._check_rewards()
        self._check_source()
        self._check_sampling()

    def _check_rewards(self) -> None:
        if (self.missing_eos == "none") != (self.missing_eos_value is None):
            raise ValueError(
                f"missing_eos={self.missing_eos!r} with missing_eos_value="
                f"{self.missing_eos_value}: 'subtract' and 'replace' need one, 'none' reads none."
            )
        if self.judge is not None and (
            self.missing_eos != "none" or self.loss_type in POLICY_GRADIENTS
        ):
            raise ValueError(
                f"judge={self.judge!r} is not supported with missing_eos={self.missing_eos!r} and "
                f"loss_type={self.loss_type!r}: a judge gives no rewards. Use reward functions, or "
                "missing_eos='none' and a loss of pairs; policy gradients on preferences are "
                "trl_ext.NashTrainer's."
            )
        if self.soft_labels and self.judge is None:
            raise ValueError(
                "soft_labels=True needs the probabilities of a judge: pass judge, e.g. "
                "'bradley_terry' for the reward functions."
            )

    def _check_source(self) -> None:
        source, K = self.pair_source, self.num_generations or 0
        if source == "online":
            refuse_ignored(self, ["kl_coef"], "only pair_source='hybrid' has a KL on samples")
            return
        names = ["judge", "missing_eos", "pair_rule"]
        refuse_ignored(self, names, f"pair_source={source!r} has its pairs already")
        if self.loss_type in (*POLICY_GRADIENTS, "xpo"):
            raise ValueError(
                f"loss_type={self.loss_type!r} is not supported with pair_source={source!r}: it "
                "needs samples of the policy. Use pair_source='online'."
            )
        if source in ("offline", "replay") and self.schedule != "sync":
            raise ValueError(
                f"schedule={self.schedule!r} is not applied with pair_source={source!r}: nothing "
                "is sampled. Leave it at 'sync'."
            )
        if (source == "offline" and K != 2) or (source == "hybrid" and K < 4):
            raise ValueError(
                f"num_generations={K} does not fit pair_source={source!r}: 'offline' has the two "
                "completions of the dataset, 'hybrid' these and at least two samples for the KL."
            )
        if source == "hybrid" and (self.kl_coef is None or self.kl_coef < 0):
            raise ValueError(
                f"kl_coef={self.kl_coef}: pair_source='hybrid' needs λ ≥ 0, the weight of the KL."
            )

    def _check_sampling(self) -> None:
        what = f"loss_type={self.loss_type!r}"
        if self.loss_type in POLICY_GRADIENTS or self.pair_source == "hybrid":
            refuse_truncated_sampling(self, what)
            self.refuse_tempered(what)
        if self.loss_type == "xpo" and (self.num_generations != 2 or self.use_vllm):
            raise ValueError(
                f"num_generations={self.num_generations} with use_vllm={self.use_vllm}: {what} "
                "needs one sample of the policy and one of the reference, which only "
                "model.generate can give. Set num_generations=2 and use_vllm=False."
            )

    @property
    def score_name(self) -> str | None:
        return super().score_name if self.pair_source == "online" else "recorded"


class OnlineDPOTrainer(GroupTrainer):
    """Trains on preferences between the policy's own completions. See this module's table."""

    config_class = OnlineDPOConfig
    _tag_names = ["trl", "trl_ext", "online-dpo"]
    _name = "Online DPO"
    _paper = {
        "title": "Direct Language Model Alignment from Online AI Feedback",
        "id": "2402.04792",
        "citation": "@article{guo2024direct,\n"
        "    title  = {{Direct Language Model Alignment from Online AI Feedback}},\n"
        "    author = {Shangmin Guo and Biao Zhang and Tianlin Liu and others},\n"
        "    year   = 2024,\n"
        "    eprint = {arXiv:2402.04792},\n"
        "}",
    }

    @property
    def uses_old_logp(self) -> bool:
        return self.args.loss_type == "proximal_rloo"

    @property
    def opponent(self) -> Opponent | None:
        return Opponent(1.0, self.group_size) if self.args.loss_type == "xpo" else None

    @property
    def judged_places(self) -> list[tuple[int, int]]:
        first_two = self.args.pair_rule == "first_two" or self.args.loss_type == "xpo"
        return [(0, 1)] if first_two else super().judged_places

    def given_completions(self, inputs, prompt_ids):
        source, G = self.args.pair_source, self.group_size
        if source == "online":
            return None
        if source == "replay":
            return recorded_completions(inputs, G)
        tokenizer = self.processing_class
        return dataset_completions(inputs, prompt_ids, G, tokenizer, self.chat_template_kwargs)

    def given_scores(self, inputs):
        source, G = self.args.pair_source, self.group_size
        if source == "replay":
            return [row["rewards"][i % G] for i, row in enumerate(inputs)]
        return [] if source == "online" else [float(i % G == 0) for i in range(len(inputs))]

    def shaped_rewards(self, rewards_PG, truncated_PG):
        value = self.args.missing_eos_value or 0.0
        return missing_eos(rewards_PG, truncated_PG, self.args.missing_eos, value)

    def select(self, rewards_PG, preferences_PGG, rows) -> Selection:
        return select_pairs(self.args, rewards_PG, preferences_PGG, rows)

    def group_loss(self, group: Group) -> tuple[Tensor, Metrics]:
        if self.args.loss_type in POLICY_GRADIENTS:
            return policy_gradient(self.args, group)
        loss_P, metrics = pair_loss(self.args, group)
        if self.args.pair_source == "hybrid":
            samples = (group.logp_PM[:, 2:], group.ref_logp_PM[:, 2:])
            loss_P = loss_P + self.args.kl_coef * leave_one_out_kl_loss(*samples)
        return loss_P, metrics


def select_pairs(
    args: OnlineDPOConfig, rewards_PG: Tensor, preferences_PGG: Tensor | None, rows: list
) -> Selection:
    """The completions and pairs that `args` asks for."""
    (P, G), source = rewards_PG.shape, args.pair_source
    if source == "replay":
        return recorded_selection(rows, rewards_PG)
    if args.loss_type in POLICY_GRADIENTS:
        index_PG = torch.arange(G, device=rewards_PG.device).expand(P, G)
        advantage_PG = credit_of_scorable(leave_one_out_advantage, rewards_PG, min_samples=2)
        return Selection(index_PG, {}, advantage_PG)
    in_place = source != "online" or args.loss_type == "xpo"
    rule = first_two if in_place else PAIR_RULES[args.pair_rule]
    if preferences_PGG is None:
        pairs = rule(rewards_PG)
    else:
        pairs = rule(rewards_PG, preferences_PGG=preferences_PGG)
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
    loss_PN = _loss_of_pairs(args, delta_PN, label_PN, logp_w, group.logp_PM[:, 1:2])
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
    return loss_PN.sum(1), metrics


def _log_ratio(args: OnlineDPOConfig, group: Group) -> Tensor:
    rho_PM = group.logp_PM - group.ref_logp_PM
    return rho_PM / group.lengths_PM.clamp(min=1) if args.length_normalised else rho_PM


def _loss_of_pairs(
    args: OnlineDPOConfig, delta: Tensor, label: Tensor, chosen_logp: Tensor, second_logp: Tensor
) -> Tensor:
    margin, beta = args.beta * delta, args.beta
    if args.loss_type == "best_of_k_sft":
        return best_of_k_sft_loss(chosen_logp)
    if args.loss_type == "rpo":
        return rpo_loss(margin, chosen_logp, beta, args.rpo_eta)
    if args.loss_type == "xpo":
        return xpo_loss(margin, second_logp, args.xpo_alpha)
    if args.loss_type == "robust":
        return robust_loss(margin, args.label_smoothing)
    if args.loss_type in ("ipo", "ipo_normalised"):
        normalised = args.loss_type == "ipo_normalised"
        return labelled(lambda d: ipo_loss(d, beta, normalised), delta, label)
    loss = {"sigmoid": sigmoid_loss, "hinge": hinge_loss}[args.loss_type]
    return labelled(loss, margin, label)


def policy_gradient(args: OnlineDPOConfig, group: Group) -> tuple[Tensor, Metrics]:
    """`(P,)`: the mean loss of each prompt's completions; unscorable ones have no part in it."""
    penalty_PM = args.beta * (group.logp_PM - group.ref_logp_PM).detach()
    return_PM = group.stored["rewards"].to(penalty_PM.dtype) - penalty_PM
    advantage_PM = credit_of_scorable(leave_one_out_advantage, return_PM, min_samples=2)
    if args.loss_type == "rloo":
        loss_PM = reinforce_loss(group.logp_PM, advantage_PM)
    else:
        loss_PM = proximal_loss(group.logp_PM, group.old_logp_PM, advantage_PM, args.epsilon)
    scored_PM = 1.0 - return_PM.isnan().to(penalty_PM.dtype)
    return loss_PM.mean(1), {"return": (return_PM.nan_to_num(), scored_PM)}
