"""TAPA models (arXiv:2509.12635), model type `tapa`; importing this registers them."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)

from trl_ext.models.tapa.configuration_tapa import TapaConfig
from trl_ext.models.tapa.modeling_tapa import (
    TapaForCausalLM,
    TapaForSequenceClassification,
    TapaModel,
)

AutoConfig.register("tapa", TapaConfig, exist_ok=True)
AutoModel.register(TapaConfig, TapaModel, exist_ok=True)
AutoModelForCausalLM.register(TapaConfig, TapaForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(
    TapaConfig, TapaForSequenceClassification, exist_ok=True
)

__all__ = ["TapaConfig", "TapaForCausalLM", "TapaForSequenceClassification", "TapaModel"]
