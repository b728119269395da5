"""The configuration of stick-breaking models."""

from typing import Any

from huggingface_hub.dataclasses import strict

from trl_ext.models._configuration import TENSOR_PARALLEL_PLAN, DecoderConfig

# Parameters with a row per head; each process has those of its own heads.
PLAN_OF_BIAS = {
    "layers.*.self_attn.remainder_bias": "colwise",
    "layers.*.self_attn": "local_params",
}
PLAN_OF_NORM = {
    "layers.*.self_attn.head_norm.weight": "colwise",
    "layers.*.self_attn.head_norm": "local_params",
}


@strict
class StickBreakingConfig(DecoderConfig):
    """Llama's fields without those of RoPE, and what becomes of the stick's remainder.

    Args:
        remainder: what a head adds for the part of the stick that no key took, remᵢ:
            `"none"`; `"value"`, remᵢ·vᵢ, the paper's first version; `"bias"`, remᵢ·r with a
            learned r per head that starts at 0, its later ones.
        attend_current: let a query see its own key. The paper's does not.
        head_norm: an RMSNorm over each head's output with a weight per head, in the place of the
            authors' GroupNorm, which subtracts the mean as well.

    Raises:
        ValueError: there is no such remainder.

    Source: arXiv:2410.17980; the remainder bias is in its appendix C.
    """

    model_type = "stickbreaking"
    remainder: str = "bias"
    attend_current: bool = False
    head_norm: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.remainder not in ("none", "value", "bias"):
            raise ValueError(
                f"remainder={self.remainder!r} is not defined: use 'bias' as in the paper's last "
                "version, 'value' as in its first, or 'none'."
            )
        # The host warns of rules for parameters that are not there.
        self.base_model_tp_plan = {  # pyright: ignore[reportAttributeAccessIssue]
            **TENSOR_PARALLEL_PLAN,
            **(PLAN_OF_BIAS if self.remainder == "bias" else {}),
            **(PLAN_OF_NORM if self.head_norm else {}),
        }

    @property
    def sees_itself(self) -> bool:
        """Whether a query attends to its own key."""
        return self.attend_current
