"""TRL's GRPO with the KL that its name promises.

| `kl_gradient`      | gradient in expectation                                        | exact |
|--------------------|----------------------------------------------------------------|-------|
| `"sequence"`       | ∇KL(π‖ref) of whole sequences, by reward-to-go                 | yes   |
| `"sequence_total"` | the same, the whole log-ratio on every token; more variance    | yes   |
| `"sequence_vocab"` | the same, from full next-token laws; least variance            | yes   |
| `"token"`          | Σₜ E ∇KLₜ with the prefix held fixed: how today's token moves  | no    |
|                    | tomorrow's KL is missing. TRL's default                        |       |
| `"forward_token"`  | Σₜ E ∇KL(ref‖π)ₜ with the prefix held fixed: the other         | no    |
|                    | direction. TRL's k3 without correction                         |       |

"Exact" needs a `loss_type` that sums over tokens (`dr_grpo`, `luspo`; `dapo` up to the number of
tokens in the batch). Off policy the exact forms carry the prefix importance ratio, against vLLM's
own log-probabilities where it samples, untruncated. The value logged
as `kl` is k3 in every case, the mean over sampled tokens: an estimate of the KL per token, never
negative, and not what is differentiated. Source: arXiv:2506.09477, sections 3 and 4.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trl_ext.objectives.kl import (
    kl_baseline_loss,
    sequence_kl_loss,
    sequence_total_kl_loss,
    sequence_vocab_kl_loss,
    vocab_kl,
)
from trl_ext.trainers._seam import CreditTrainer, Tokens
from trl_ext.trainers.base import BaseConfig, refuse_truncated_sampling, refuse_unknown

KL_GRADIENTS = ("sequence", "sequence_total", "sequence_vocab", "token", "forward_token")
KL_BASELINES = ("none", "leave_one_out")

# From the others' KL-to-go to what it must be compared with: all of it, or without the own token's.
BASELINE_OF = {
    "sequence": lambda to_go_BT: to_go_BT,
    "sequence_total": lambda to_go_BT: to_go_BT[:, :1].expand_as(to_go_BT),
    "sequence_vocab": lambda to_go_BT: nn.functional.pad(to_go_BT[:, 1:], (0, 1)),
}


@dataclass
class GRPOConfig(BaseConfig):
    """TRL's `GRPOConfig` plus the schedule of rounds and the choice of the KL gradient.

    Args:
        kl_gradient: which gradient the term `beta` · KL has; see `trl_ext.trainers.grpo`.
        kl_baseline: what is subtracted from the KL-to-go.
    """

    kl_gradient: str = field(
        default="sequence",
        metadata={
            "help": "Gradient of the KL term, if beta > 0: 'sequence', 'sequence_total' and "
            "'sequence_vocab' are the exact reverse sequence KL, 'token' is TRL's default and "
            "'forward_token' TRL's without bias correction (arXiv:2506.09477, sections 3-4)."
        },
    )
    kl_baseline: str = field(
        default="none",
        metadata={
            "help": "Baseline of the KL-to-go in the exact forms: 'none', or 'leave_one_out' over "
            "the group, which pays only where the squared mean of the sequence log-ratio exceeds "
            "its variance / (num_generations - 1) (arXiv:2506.09477, section 4)."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_kl()

    def _check_kl(self) -> None:
        refuse_unknown(self, {"kl_gradient": KL_GRADIENTS, "kl_baseline": KL_BASELINES})
        if self.kl_gradient == "forward_token":
            self.use_bias_correction_kl = False
        elif self.beta and not self.use_bias_correction_kl:
            raise ValueError(
                f"use_bias_correction_kl=False is not applied with kl_gradient="
                f"{self.kl_gradient!r}. TRL's k3 without correction is kl_gradient='forward_token'."
            )
        if self.beta and self.owns_kl:
            refuse_truncated_sampling(self, f"kl_gradient={self.kl_gradient!r}")
        elif self.kl_baseline != "none":
            raise ValueError(
                f"kl_baseline={self.kl_baseline!r} is not applied with beta={self.beta} and "
                f"kl_gradient={self.kl_gradient!r}: only the exact forms have a KL-to-go. Leave it "
                "at 'none', or set beta > 0 and kl_gradient='sequence'."
            )

    @property
    def owns_kl(self) -> bool:
        return self.kl_gradient.startswith("sequence")

    @property
    def scores_text_again(self) -> bool:
        again = self.kl_gradient == "sequence_vocab" or self.kl_baseline != "none"
        return bool(self.beta) and self.owns_kl and again


class GRPOTrainer(CreditTrainer):
    """TRL's `GRPOTrainer`, argument for argument, with an exact KL. See this module's table."""

    config_class = GRPOConfig
    _tag_names = ["trl", "trl_ext", "grpo"]

    @property
    def owns_kl(self) -> bool:
        return self.args.owns_kl

    def kl_loss(self, tokens: Tokens) -> Tensor:
        form, sampled = self.args.kl_gradient, (tokens.logp_BT, tokens.old_logp_BT)
        if form == "sequence_vocab":
            # One row at a time and recomputed in the backward pass: only the logits stay in memory.
            kl_BT = torch.stack(
                [
                    checkpoint(vocab_kl, *row, use_reentrant=False)
                    for row in zip(*tokens.logits(), strict=True)
                ]
            )
            loss_BT = sequence_vocab_kl_loss(kl_BT, *sampled, tokens.mask_BT)
        else:
            exact = sequence_total_kl_loss if form == "sequence_total" else sequence_kl_loss
            loss_BT = exact(*sampled, tokens.ref_logp_BT, tokens.mask_BT)
        if tokens.baseline_BT is not None:
            baseline_BT = BASELINE_OF[form](tokens.baseline_BT)
            loss_BT = loss_BT + kl_baseline_loss(baseline_BT, *sampled, tokens.mask_BT)
        return loss_BT
