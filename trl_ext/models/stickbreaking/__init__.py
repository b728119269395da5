"""Stick-breaking models (arXiv:2410.17980), type `stickbreaking`; importing this registers them."""

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


def from_llama(model: PreTrainedModel | str | PathLike, **fields: Any) -> StickBreakingForCausalLM:
    """Starts a stick-breaking model from the weights of a Llama-type checkpoint.

    Embeddings, projections, MLPs, norms and head are copied, tied or not, with their dtype and
    device; RoPE is dropped, a remainder bias starts at 0. This is a start for continued pretraining
    and no model yet: q and k were trained for a softmax of rotated inner products, and here they
    break a stick, so the result predicts badly until it is trained. The paper pretrains from
    scratch; whether converted weights save anything over that, it does not say.

    Args:
        model: a model, which stays as it is, or the name or path of a checkpoint; of type `llama`,
            `mistral` without a window, or `qwen2`, whose output projection gets a bias of 0.
        **fields: of `StickBreakingConfig`, in the place of those of the checkpoint.

    Raises:
        ValueError: the model is not of Llama's form, or a field does not exist.
    """
    return convert(StickBreakingForCausalLM, StickBreakingConfig, model, fields)


__all__ = [
    "StickBreakingConfig",
    "StickBreakingForCausalLM",
    "StickBreakingForSequenceClassification",
    "StickBreakingModel",
    "from_llama",
]
