"""The weights of a Llama checkpoint in a model whose attention is another."""

import copy
import dataclasses
import os
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from trl_ext.models._configuration import DecoderConfig
from trl_ext.models._decoder import DecoderForCausalLM

Model = TypeVar("Model", bound=DecoderForCausalLM)

LLAMA_SHAPED = ("llama", "mistral", "qwen2")
# The new attention's own parameters, and the bias of the output, which Qwen2 has not: at 0 it
# changes nothing.
FRESH = (".remainder_bias", ".head_norm.weight", ".o_proj.bias")


def convert(
    target: type[Model],
    config_class: type[DecoderConfig],
    source: PreTrainedModel | str | os.PathLike,
    fields: Mapping[str, Any],
) -> Model:
    """Builds the model `target` on the weights of a Llama-type model.

    Args:
        target: a causal language model of `trl_ext.models`.
        config_class: its configuration.
        source: a model, which stays as it is, or the name or path of a checkpoint.
        fields: of the new configuration, in the place of those of the old one.

    Raises:
        ValueError: the source is not of Llama's form, or a field does not exist.
    """
    if not isinstance(source, PreTrainedModel):
        if not isinstance(source, str | os.PathLike):
            raise ValueError(
                f"source is a {type(source).__name__}: pass a transformers model, or the name or "
                "path of a checkpoint. Of a PEFT model pass `model.merge_and_unload()`."
            )
        source = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    _check_form(source.config)
    _check_fields(config_class, fields)
    weights = {name: weight.detach().clone() for name, weight in source.state_dict().items()}
    config = config_class(**{**_shared_fields(source.config, weights), **fields})
    _check_weights(target, config, weights)
    model = target.from_pretrained(None, config=config, state_dict=weights, dtype=source.dtype)
    model.config.name_or_path = source.config.name_or_path
    model.generation_config = copy.deepcopy(source.generation_config)
    nn.Module.to(model, source.device)
    return model.train(source.training)


def _check_form(config: PreTrainedConfig) -> None:
    if config.model_type not in LLAMA_SHAPED:
        raise ValueError(
            f"model_type={config.model_type!r} is not known to compute as Llama does outside its "
            f"attention: pass a model of one of the types {LLAMA_SHAPED}."
        )
    if (window := getattr(config, "sliding_window", None)) is not None:
        raise ValueError(
            f"sliding_window={window}: the model attends to so many tokens, and the converted one "
            "would attend to all. If that is what you want, set it to None in the model's config."
        )


def _check_fields(config_class: type[DecoderConfig], fields: Iterable[str]) -> None:
    known = {field.name for field in dataclasses.fields(config_class)} | {"attn_implementation"}
    if unknown := sorted(set(fields) - known):
        raise ValueError(
            f"{config_class.__name__} has no fields {unknown}: pass the method's own, as listed in "
            "its docstring."
        )
    if "dtype" in fields:
        raise ValueError("dtype is that of the source: convert the result by `.to(dtype)`.")


def _shared_fields(config: PreTrainedConfig, weights: Iterable[str]) -> dict[str, Any]:
    names = [name for name in DecoderConfig.__annotations__ if hasattr(config, name)]
    bias = any(name.endswith(".q_proj.bias") for name in weights)
    return {**{name: getattr(config, name) for name in names}, "attention_bias": bias}


def _check_weights(
    target: type[DecoderForCausalLM], config: DecoderConfig, weights: Mapping[str, Tensor]
) -> None:
    with torch.device("meta"):
        wanted = {name: tuple(w.shape) for name, w in target(config).state_dict().items()}
    given = {name: tuple(w.shape) for name, w in weights.items() if not w.is_meta}
    missing = [name for name in wanted.keys() - given.keys() if not name.endswith(FRESH)]
    other = [name for name in given.keys() & wanted.keys() if given[name] != wanted[name]]
    wrong = {
        "are missing or offloaded": missing,
        "have no place": weights.keys() - wanted.keys(),
        "have another shape": other,
    }
    said = "; ".join(f"{sorted(names)[:3]} {what}" for what, names in wrong.items() if names)
    if said:
        raise ValueError(
            f"the weights are not those of a {config.model_type!r} decoder: {said}. Pass a causal "
            "language model of Llama's form, on its devices, unquantized and without adapters."
        )
