"""Every variant of both attentions as a tiny model with weights of order one."""

import math
from typing import Any

import torch
from torch import Tensor

from trl_ext.models import (
    StickBreakingConfig,
    StickBreakingForCausalLM,
    StickBreakingForSequenceClassification,
    TapaConfig,
    TapaForCausalLM,
    TapaForSequenceClassification,
)

VOCABULARY = 40
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# One row per variant. Grouped heads, tied heads and biases are spread over them.
VARIANTS: dict[str, tuple[type, dict[str, Any]]] = {
    "tapa": (TapaConfig, {}),
    "tapa_linear": (
        TapaConfig,
        {"phase": "linear", "amplitude_fraction": 0.25, "tie_word_embeddings": True},
    ),
    "stickbreaking": (StickBreakingConfig, {}),
    "stickbreaking_value": (
        StickBreakingConfig,
        {"remainder": "value", "tie_word_embeddings": True},
    ),
    "stickbreaking_none": (
        StickBreakingConfig,
        {"remainder": "none", "num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True},
    ),
    "stickbreaking_current": (StickBreakingConfig, {"attend_current": True, "head_norm": True}),
}
BOTH = ["tapa", "stickbreaking"]
CAUSAL = {TapaConfig: TapaForCausalLM, StickBreakingConfig: StickBreakingForCausalLM}
CLASSIFIER = {
    TapaConfig: TapaForSequenceClassification,
    StickBreakingConfig: StickBreakingForSequenceClassification,
}


def config_of(variant: str, **fields: Any) -> Any:
    config, own = VARIANTS[variant]
    return config(**{**SIZES, **own, **fields})


def tiny(variant: str, seed: int = 0, classes: dict = CAUSAL, **fields: Any) -> Any:
    """A model in which every parameter matters: a fresh one is nearly linear, its remainder bias 0.

    The global random state is left as it was found.
    """
    config = config_of(variant, **fields)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = classes[type(config)](config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                drawn = torch.randn_like(parameter)
                if "norm" in name:
                    parameter.copy_(1 + 0.1 * drawn)
                elif name.endswith("proj.weight") or "embed" in name or "head.weight" in name:
                    parameter.copy_(0.7 * drawn / math.sqrt(parameter.size(-1)))
                else:
                    parameter.copy_(drawn)
    return model.eval()


def tokens(*shape: int, seed: int = 0) -> Tensor:
    """Random tokens, none of them special."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, shape, generator=draw)


def gradients(model: Any, loss: Tensor) -> Tensor:
    found = torch.autograd.grad(loss, list(model.parameters()))
    return torch.cat([g.flatten() for g in found])


def largest(x: Tensor, y: Tensor) -> float:
    """Largest absolute difference."""
    return (x - y).abs().max().item()
