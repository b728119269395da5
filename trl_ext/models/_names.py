"""The names by which transformers selects an attention, and the refusal of all others.

A foreign attention would run on these models' q and k and compute something else without an error:
`sdpa`, flash and flex, the paged softmax of continuous batching, vLLM's Transformers backend. So
each model has names of its own, and checks at construction and at every call that one of them is
set. The host needs two entries per name: a function, or it does not accept the name, and a mask
function, or `create_causal_mask` drops padding without a word.
"""

from typing import Any, NoReturn

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

IMPLEMENTATIONS = ("naive", "chunked", "triton")


def own_names(model_type: str) -> dict[str, str | None]:
    """`attn_implementation` to `implementation` of `trl_ext.ops`; "eager" takes the best one."""
    return {"eager": None, **{f"{model_type}_{name}": name for name in IMPLEMENTATIONS}}


def implementation(config: PreTrainedConfig) -> str | None:
    """The `implementation` that the configuration asks for; None: the best one for the device.

    Raises:
        ValueError: it names an attention of another model, or the host's table does not hold ours.
    """
    # Not called here, but DeepSpeed puts its own behind every name, and then splits the rows.
    entry = ALL_ATTENTION_FUNCTIONS.get(f"{config.model_type}_naive")
    if getattr(entry, "refuses_for", None) != config.model_type:
        raise ValueError(
            f"the attentions of {config.model_type!r} were replaced in transformers' table, as by "
            "DeepSpeed's sequence parallelism: each process would attend to its own part of a row "
            "alone. Set sp_size=1."
        )
    return check_name(config.model_type, config._attn_implementation or "eager")


def check_name(model_type: str, name: str) -> str | None:
    """As `implementation`, for a name that is not set yet."""
    names = own_names(model_type)
    if name not in names:
        raise ValueError(
            f"attn_implementation={name!r} would compute another attention than that of "
            f"{model_type!r}: choose one of {tuple(names)}. Continuous batching and vLLM's "
            "Transformers backend bring a softmax of their own and cannot run this model: use "
            "`generate`."
        )
    return names[name]


def register(model_type: str) -> None:
    """Tells transformers the names of this model."""

    def refuse(module: nn.Module, *_: Any, **__: Any) -> NoReturn:
        raise ValueError(
            f"{type(module).__name__} cannot take its attention from {model_type!r}: it changes q "
            "and k before the call, and the result would be neither. Convert the model with "
            f"`trl_ext.models.{model_type}.from_llama`."
        )

    refuse.refuses_for = model_type  # pyright: ignore[reportFunctionMemberAccess]

    def padding_only(*, attention_mask: Tensor | None = None, **_: Any) -> Tensor | None:
        return attention_mask

    for name in own_names(model_type):
        if name != "eager":
            AttentionInterface.register(name, refuse)
            AttentionMaskInterface.register(name, padding_only)
