"""Learning in a preference game: a pairwise judge, and no reward that would explain it.

| `algorithm`  | what is made of a group of G completions                             | source     |
|--------------|----------------------------------------------------------------------|------------|
| `"nash_md"`  | policy gradient of P(y ≻ y′) − ½ − βρ(y): y the first half, y′ the   | 2312.00886 |
|              | second, sampled from π^(1−c) ref^c token by token                    |            |
| `"spo"`      | the same in self-play: y′ the other samples of π                     | 2401.04056 |
| `"nash_mp"`  | the same with y′ from a half-step policy, and a second pull to where | 2505.19731 |
|              | the step began                                                       |            |
| `"inpo"`     | (h − 1/(2η))² of the best and the worst, h against ref and π_t       | 2407.00617 |
| `"dno"`      | cross-entropy of σ(η · differences of log π/π_t) to σ(differences of | 2404.03715 |
|              | win rates)                                                           |            |
| `"dno_prct"` | −log σ(η(log π/π_t(y_w) − log π/π_t(y_l))), the best and the worst   | 2404.03715 |

ρ = log π/ref. π_t is the policy that sampled the round: an iteration of INPO or DNO is a round,
`steps_per_generation / gradient_accumulation_steps` mini-batches long. Policy gradients carry the
sequence importance ratio to that policy, unclipped, and stay exact over a whole round: against the
opponent that sampled it, in self-play π_t. DNO's win rates are those of the group, in which the two
of a pair are among each other's opponents: in small groups their differences are overstated, by
G/(G − 1) for transitive preferences.
"""

import textwrap
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from trl_ext.objectives.nash import (
    dno_loss,
    mixed_reference,
    nash_md_advantage,
    nash_mp_advantage,
)
from trl_ext.objectives.pair_rules import best_worst, soft, win_rates
from trl_ext.objectives.pairs import ipo_loss, labelled, sigmoid_loss
from trl_ext.objectives.sequence_policy import importance_weighted_loss
from trl_ext.rollouts import Opponent
from trl_ext.trainers._seam import GroupTrainer
from trl_ext.trainers.base import refuse_ignored, refuse_truncated_sampling, refuse_unknown
from trl_ext.trainers.group import GroupConfig
from trl_ext.trainers.group_rows import Group, Metrics, Selection
from trl_ext.trainers.pair_sources import selection_of

MUNOS_2023 = {
    "title": "Nash Learning from Human Feedback",
    "id": "2312.00886",
    "citation": textwrap.dedent("""\
        @article{munos2023nash,
            title  = {{Nash Learning from Human Feedback}},
            author = {R{\\'e}mi Munos and Michal Valko and Daniele Calandriello and others},
            year   = 2023,
            eprint = {arXiv:2312.00886},
        }"""),
}
AGAINST_OPPONENT = ("nash_md", "nash_mp")
OF_PAIRS = ("inpo", "dno_prct")
# The papers' values; where a paper gives none, a neighbour's.
PAPER_VALUES: dict[str, dict[str, float]] = {
    "nash_md": {"beta": 0.008, "mixture_coefficient": 0.125},
    "spo": {"beta": 0.0},
    "nash_mp": {"beta": 0.008, "eta": 0.016},
    "inpo": {"beta": 0.005 / 3, "eta": 0.005},
    "dno": {"beta": 0.0, "eta": 0.1},
    "dno_prct": {"beta": 0.0, "eta": 0.1},
}


@dataclass
class NashConfig(GroupConfig):
    """Configuration of [`NashTrainer`].

    Args:
        algorithm: see `trl_ext.trainers.nash`.
        beta: weight of the KL to the reference, the papers' τ; by default the paper's value.
        eta: step size of 'nash_mp', inverse temperature of 'inpo' and 'dno'.
        mixture_coefficient: c, the reference's share in the opponent of 'nash_md'.
        proximal_steps: optimizer steps of each half step of 'nash_mp'.
    """

    algorithm: str = field(
        default="nash_md",
        metadata={
            "help": "'nash_md' (arXiv:2312.00886), 'spo' (arXiv:2401.04056), 'nash_mp' "
            "(arXiv:2505.19731), 'inpo' (arXiv:2407.00617), 'dno' or 'dno_prct' "
            "(arXiv:2404.03715)."
        },
    )
    num_generations: int | None = field(
        default=2,
        metadata={
            "help": "Completions per prompt; with an opponent half of them are its own "
            "(arXiv:2312.00886, section 7)."
        },
    )
    beta: float | None = field(  # type: ignore[assignment]
        default=None,
        metadata={
            "help": "Weight of the KL to the reference, τ; None: the paper's value "
            "(arXiv:2312.00886, section 7; arXiv:2407.00617, section 5)."
        },
    )
    eta: float | None = field(
        default=None,
        metadata={
            "help": "η of 'nash_mp', 'inpo' and 'dno'; None: the paper's value "
            "(arXiv:2505.19731, Eq. 4; arXiv:2407.00617, section 5)."
        },
    )
    mixture_coefficient: float | None = field(
        default=None,
        metadata={
            "help": "c of 'nash_md': 0 is self-play, 1 the best response to the reference; None: "
            "0.125 (arXiv:2312.00886, section 7)."
        },
    )
    proximal_steps: int | None = field(
        default=None,
        metadata={
            "help": "Optimizer steps of each half step of 'nash_mp', a multiple of the steps per "
            "round (arXiv:2505.19731, Eq. 4)."
        },
    )

    def __post_init__(self) -> None:
        refuse_unknown(self, {"algorithm": tuple(PAPER_VALUES)})
        values, what = PAPER_VALUES[self.algorithm], f"algorithm={self.algorithm!r} has none"
        for name in ("beta", "eta", "mixture_coefficient"):
            if name not in values:
                refuse_ignored(self, [name], what)
            elif getattr(self, name) is None:
                setattr(self, name, values[name])
        super().__post_init__()
        if self.judge is None:
            raise ValueError(
                "judge=None: a preference game needs a pairwise judge. Pass a callable, "
                "'module:function', or 'bradley_terry' for the reward functions."
            )
        refuse_ignored(self, ["epsilon"], "importance ratios are not clipped")
        refuse_ignored(self, ["loss_type"], "`algorithm` says which loss")
        self._check_values()
        self._check_half_steps(what)
        if self.algorithm not in ("inpo", "dno", "dno_prct"):
            refuse_truncated_sampling(self, f"algorithm={self.algorithm!r}")
        self.refuse_tempered(f"algorithm={self.algorithm!r}")

    def _check_values(self) -> None:
        assert self.beta is not None
        if self.beta < 0 or (self.eta is not None and self.eta <= 0):
            raise ValueError(f"beta={self.beta} must be ≥ 0 and eta={self.eta} positive.")
        if self.algorithm == "inpo" and not 0 < self.beta <= (self.eta or 0):
            raise ValueError(
                f"beta={self.beta} must lie in (0, eta={self.eta}] with algorithm='inpo': it is "
                "the share τ/η that the reference has in the mixed reference."
            )
        if self.algorithm == "nash_md" and not 0 <= (self.mixture_coefficient or 0) <= 1:
            raise ValueError(f"mixture_coefficient={self.mixture_coefficient} must lie in [0, 1].")
        if self.algorithm in ("dno", "dno_prct") and self.beta != 0:
            raise ValueError(
                f"beta={self.beta} is not applied: algorithm={self.algorithm!r} compares with the "
                "policy that sampled the round, not with the reference. Leave it at 0."
            )
        if self.algorithm == "nash_md" and self.mixture_coefficient and self.beta == 0:
            raise ValueError(
                "beta=0 with algorithm='nash_md': without a reference there is no mixture to play "
                "against. Set beta > 0, or mixture_coefficient=0 for self-play."
            )
        odd = (self.num_generations or 0) % 2
        if self.algorithm in AGAINST_OPPONENT and (odd or self.use_vllm):
            raise ValueError(
                f"num_generations={self.num_generations} with use_vllm={self.use_vllm}: the "
                f"opponent of {self.algorithm!r} answers in the second half of each group, which "
                "only model.generate can do. Set an even num_generations and use_vllm=False."
            )

    @property
    def other_writer(self) -> str | None:
        against = self.algorithm in AGAINST_OPPONENT
        return f"algorithm={self.algorithm!r}" if against else None

    def _check_half_steps(self, what: str) -> None:
        if self.algorithm != "nash_mp":
            refuse_ignored(self, ["proximal_steps"], what)
        elif not self.proximal_steps or self.proximal_steps % self.steps_per_round:
            raise ValueError(
                f"proximal_steps={self.proximal_steps} must be a positive multiple of the "
                f"{self.steps_per_round} optimizer steps of a round with algorithm='nash_mp': "
                "the opponent changes between rounds."
            )


class NashTrainer(GroupTrainer):
    """Looks for the policy that no other beats. See this module's table."""

    config_class = NashConfig
    _tag_names = ["trl", "trl_ext", "nash"]
    _name = "Nash learning"
    _paper = MUNOS_2023

    @property
    def uses_old_logp(self) -> bool:
        return True

    @property
    def opponent(self) -> Opponent | None:
        if self.args.algorithm not in AGAINST_OPPONENT:
            return None
        share = 1.0 if self.args.algorithm == "nash_mp" else self.args.mixture_coefficient
        return Opponent(share, self.group_size)

    @property
    def opponent_model(self) -> Any:
        return self.snapshots.get("opponent") or super().opponent_model

    def begin_round(self) -> None:
        steps = self.args.proximal_steps
        if steps and self.state.global_step % steps == 0:
            self.take_snapshot("opponent")
            if self.state.global_step // steps % 2 == 0:
                self.take_snapshot("target")

    def also_scored(self) -> dict[str, nn.Module]:
        return {"target_logp": self.snapshots["target"]} if "target" in self.snapshots else {}

    def select(self, rewards_PG, preferences_PGG, rows) -> Selection:
        return select(self.args.algorithm, preferences_PGG)

    def group_loss(self, group: Group) -> tuple[Tensor, Metrics]:
        if self.args.algorithm in OF_PAIRS:
            return pair_loss(self.args, group)
        return game_loss(self.args, group)


def select(algorithm: str, preferences_PGG: Any) -> Selection:
    """Win rates of the completions that are trained on, or the best and the worst of them."""
    P, G, _ = preferences_PGG.shape
    index_PG = torch.arange(G, device=preferences_PGG.device).expand(P, G)
    if algorithm in AGAINST_OPPONENT:
        half = G // 2
        win_PM = preferences_PGG[:, :half, half:].nanmean(2)
        role_PG = torch.cat([win_PM - 0.5, torch.zeros_like(win_PM)], dim=1).nan_to_num()
        return Selection(index_PG[:, :half], {"win": win_PM}, role_PG)
    win_PG = win_rates(preferences_PGG)
    if algorithm in OF_PAIRS:
        pairs = best_worst(win_PG)
        if algorithm == "inpo":
            pairs = soft(pairs, preferences_PGG)
        return selection_of(pairs, G, everyone=False)
    return Selection(index_PG, {"win": win_PG}, (win_PG - 0.5).nan_to_num())


def game_loss(args: NashConfig, group: Group) -> tuple[Tensor, Metrics]:
    """`(P,)`: policy gradient against the opponent, or DNO's regression on win rates."""
    win_PM = group.stored["win"].to(group.logp_PM.dtype)
    judged_PM = 1.0 - win_PM.isnan().to(win_PM.dtype)
    metrics = {"win_rate": (win_PM.nan_to_num(), judged_PM)}
    if args.algorithm == "dno":
        assert args.eta is not None
        return dno_loss(win_PM, group.logp_PM - group.old_logp_PM, args.eta), metrics
    advantage_PM = _advantage(args, group, win_PM)
    loss_PM = importance_weighted_loss(group.logp_PM, group.old_logp_PM, advantage_PM)
    return loss_PM.mean(1), metrics


def _advantage(args: NashConfig, group: Group, win_PM: Tensor) -> Tensor:
    assert args.beta is not None
    rho_PM = (group.logp_PM - group.ref_logp_PM).detach()
    if args.algorithm != "nash_mp":
        return nash_md_advantage(win_PM, rho_PM, args.beta)
    assert args.eta is not None
    moved_PM = (group.logp_PM - group.stored["target_logp"]).detach()
    return nash_mp_advantage(win_PM, rho_PM, moved_PM, args.beta, args.eta)


def pair_loss(args: NashConfig, group: Group) -> tuple[Tensor, Metrics]:
    """`(P,)`: INPO's regression, or DNO's contrastive step, on one pair per prompt."""
    assert args.beta is not None and args.eta is not None
    eta, anchor_PM = args.eta, group.old_logp_PM
    if args.algorithm == "inpo":
        anchor_PM = mixed_reference(group.ref_logp_PM, group.old_logp_PM, args.beta, eta)
    # `selection_of` puts the chosen completion first.
    delta_P1 = (group.logp_PM - anchor_PM).diff(dim=1).neg()
    label_P1 = group.stored["label"].to(delta_P1.dtype)
    weight_P1 = group.stored["weight"].to(delta_P1.dtype)
    if args.algorithm == "inpo":
        loss_P1 = labelled(lambda d: ipo_loss(d, eta), delta_P1, label_P1)
    else:
        loss_P1 = sigmoid_loss(eta * delta_P1)
    loss_P1 = torch.where(weight_P1 > 0, weight_P1 * loss_P1, 0.0)
    decided_P1 = (weight_P1 > 0).to(weight_P1.dtype)
    metrics = {
        "rewards/margins": (eta * delta_P1, decided_P1),
        "rewards/accuracies": ((delta_P1.sign() + 1) / 2, decided_P1),
        "frac_ties": (1 - decided_P1, torch.ones_like(decided_P1)),
    }
    return loss_P1.sum(1), metrics
