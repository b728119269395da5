"""Attention as model classes of transformers; importing this package registers both types."""

from trl_ext.models.stickbreaking import (
    StickBreakingConfig,
    StickBreakingForCausalLM,
    StickBreakingForSequenceClassification,
    StickBreakingModel,
)
from trl_ext.models.tapa import (
    TapaConfig,
    TapaForCausalLM,
    TapaForSequenceClassification,
    TapaModel,
)

__all__ = [
    "StickBreakingConfig",
    "StickBreakingForCausalLM",
    "StickBreakingForSequenceClassification",
    "StickBreakingModel",
    "TapaConfig",
    "TapaForCausalLM",
    "TapaForSequenceClassification",
    "TapaModel",
]
