"""TAPA models (arXiv:2509.12635), model type `tapa`; importing this registers them."""

from os import PathLike
from typing import Any

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from trl_ext.models._convert import convert
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


def from_llama(model: PreTrainedModel | str | PathLike, **fields: Any) -> TapaForCausalLM:
    """Starts a TAPA model from the weights of a Llama-type checkpoint.

    Embeddings, projections, MLPs, norms and head are copied, tied or not, with their dtype and
    device; RoPE is dropped. This is a start for continued pretraining and no model yet: q and k
    were trained for rotated inner products, and TAPA makes an amplitude and a phase of them, so the
    result predicts badly until it is trained. The paper pretrains from scratch; whether converted
    weights save anything over that, it does not say.

    Args:
        model: a model, which stays as it is, or the name or path of a checkpoint; of type `llama`,
            `mistral` without a window, or `qwen2`, whose output projection gets a bias of 0.
        **fields: of `TapaConfig`, in the place of those of the checkpoint.

    Raises:
        ValueError: the model is not of Llama's form, or a field does not exist.
    """
    return convert(TapaForCausalLM, TapaConfig, model, fields)


__all__ = [
    "TapaConfig",
    "TapaForCausalLM",
    "TapaForSequenceClassification",
    "TapaModel",
    "from_llama",
]
