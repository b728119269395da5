"""Stick-breaking models (arXiv:2410.17980), type `stickbreaking`; importing this registers them."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)

from trl_ext.models.stickbreaking.configuration_stickbreaking import StickBreakingConfig
from trl_ext.models.stickbreaking.modeling_stickbreaking import (
    StickBreakingForCausalLM,
    StickBreakingForSequenceClassification,
    StickBreakingModel,
)

AutoConfig.register("stickbreaking", StickBreakingConfig, exist_ok=True)
AutoModel.register(StickBreakingConfig, StickBreakingModel, exist_ok=True)
AutoModelForCausalLM.register(StickBreakingConfig, StickBreakingForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(
    StickBreakingConfig, StickBreakingForSequenceClassification, exist_ok=True
)

__all__ = [
    "StickBreakingConfig",
    "StickBreakingForCausalLM",
    "StickBreakingForSequenceClassification",
    "StickBreakingModel",
]
