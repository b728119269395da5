"""The five ways to know a position, as models of the same size."""

from dataclasses import dataclass, field
from typing import Any

from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from trl_ext import StickBreakingConfig, StickBreakingForCausalLM, TapaConfig, TapaForCausalLM

# PI and YaRN rescale a model that was pretrained with RoPE.
STARTS_FROM = {
    "rope": "rope",
    "pi": "rope",
    "yarn": "rope",
    "tapa": "tapa",
    "stickbreaking": "stickbreaking",
}
SCALING = {"pi": "linear", "yarn": "yarn"}
NAMES = {
    "rope": "RoPE",
    "pi": "RoPE + PI",
    "yarn": "RoPE + YaRN",
    "tapa": "TAPA",
    "stickbreaking": "stick-breaking",
}


@dataclass
class ModelOptions:
    """Size of a model; the same for every method."""

    hidden_size: int = field(default=64, metadata={"help": "width"})
    intermediate_size: int = field(default=128, metadata={"help": "width of the MLP"})
    num_hidden_layers: int = field(default=2, metadata={"help": "layers"})
    num_attention_heads: int = field(default=4, metadata={"help": "query heads"})
    num_key_value_heads: int = field(default=4, metadata={"help": "key and value heads"})
    initializer_range: float = field(
        default=0.05, metadata={"help": "standard deviation of the first weights"}
    )
    tie_word_embeddings: bool = field(default=True, metadata={"help": "one matrix for both ends"})
    rope_theta: float = field(default=10_000.0, metadata={"help": "RoPE's base; of RoPE alone"})


def check_method(method: str) -> None:
    if method not in NAMES:
        raise ValueError(f"method={method!r} does not exist: choose from {', '.join(NAMES)}.")


def new_model(
    method: str, options: ModelOptions, vocab_size: int, length: int, end: int | None
) -> PreTrainedModel:
    """An untrained model for contexts of `length` tokens; `end` is the end of a document."""
    check_method(method)
    if STARTS_FROM[method] != method:
        raise ValueError(
            f"method={method!r} rescales a pretrained RoPE model and pretrains none: pretrain with "
            f"method='rope', then pass its folder as `start` with method={method!r}."
        )
    fields = {name: value for name, value in vars(options).items() if name != "rope_theta"}
    fields |= {
        "vocab_size": vocab_size,
        "max_position_embeddings": length,
        "bos_token_id": None,
        "eos_token_id": end,
        "pad_token_id": end,
    }
    if method == "tapa":
        return TapaForCausalLM(TapaConfig(**fields))
    if method == "stickbreaking":
        return StickBreakingForCausalLM(StickBreakingConfig(**fields))
    rope = {"rope_type": "default", "rope_theta": options.rope_theta}
    return LlamaForCausalLM(LlamaConfig(**fields, rope_parameters=rope))


def extended(start: str, method: str, factor: float, **options: Any) -> PreTrainedModel:
    """The model in the folder `start`, made ready for contexts `factor` times as long.

    PI and YaRN change RoPE's frequencies, by transformers' own `rope_parameters`; the others
    change nothing.

    Raises:
        ValueError: the model in `start` is not one that `method` goes on from.
    """
    check_method(method)
    config = PreTrainedConfig.get_config_dict(start)[0]
    given = {"llama": "rope"}.get(config["model_type"], config["model_type"])
    if given != STARTS_FROM[method]:
        raise ValueError(
            f"start={start!r} is a {given!r} model and method={method!r} goes on from "
            f"{STARTS_FROM[method]!r}: name a model that was pretrained so."
        )
    if method in SCALING:
        length = config["max_position_embeddings"]
        options["rope_parameters"] = {
            "rope_type": SCALING[method],
            "rope_theta": config["rope_parameters"]["rope_theta"],
            "factor": factor,
        }
        if method == "yarn":
            options["rope_parameters"]["original_max_position_embeddings"] = length
        options["max_position_embeddings"] = int(factor * length)
    return AutoModelForCausalLM.from_pretrained(start, **options)
