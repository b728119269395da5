"""The options of Online DPO, and which of them go together."""

from dataclasses import dataclass, field

from trl_ext.trainers.base import refuse_ignored, refuse_truncated_sampling, refuse_unknown
from trl_ext.trainers.group import GroupConfig

POLICY_GRADIENTS = ("rloo", "proximal_rloo")
WITHOUT_REFERENCE = (*POLICY_GRADIENTS, "best_of_k_sft")
CHOICES = {
    "loss_type": (
        *("sigmoid", "ipo", "ipo_normalised", "hinge", "robust", "rpo", "xpo"),
        *("best_of_k_sft", *POLICY_GRADIENTS),
    ),
    "pair_rule": ("best_worst", "first_two", "all_pairs"),
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
        if self.soft_labels and self.judge is None and self.pair_source != "replay":
            raise ValueError(
                "soft_labels=True needs the probabilities of a judge: pass judge, e.g. "
                "'bradley_terry' for the reward functions, or replay a record that holds them."
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

    @property
    def other_writer(self) -> str | None:
        if self.pair_source != "online":
            return f"pair_source={self.pair_source!r}"
        return "loss_type='xpo'" if self.loss_type == "xpo" else None
