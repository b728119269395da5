"""Liger's kernels in these models, for `use_liger_kernel=True` of a trainer."""

from types import MethodType, ModuleType
from typing import Any

from transformers import PreTrainedModel


def apply_liger_kernel(
    liger: ModuleType,
    *,
    model: PreTrainedModel | None = None,
    rms_norm: bool = True,
    swiglu: bool = True,
    cross_entropy: bool = False,
    fused_linear_cross_entropy: bool = True,
) -> None:
    """Puts Liger's forward passes in the place of the modules' own; the weights stay.

    The attention stays too, and so does the norm of each head that stick-breaking has on request.

    Args:
        liger: `liger_kernel.transformers.monkey_patch`.
        model: one of `trl_ext.models`, as a trainer hands it over.
        rms_norm: the norms of the layers and the last one.
        swiglu: the gated MLPs.
        cross_entropy: not supported.
        fused_linear_cross_entropy: the head and the loss at once, in training and with labels.

    Raises:
        ValueError: there is no model yet, or an option has no meaning for it.
    """
    if model is None:
        raise ValueError(
            "model=None asks Liger to patch classes before a model is built, and these models are "
            "patched one by one: build the model, and pass `use_liger_kernel=True` to its trainer."
        )
    if cross_entropy:
        raise ValueError(
            "cross_entropy=True would replace torch's own for the whole process: leave it False, "
            "and use fused_linear_cross_entropy."
        )
    _check_activation(model, swiglu)
    decoder: Any = getattr(model, model.base_model_prefix, model)
    if rms_norm:
        liger._patch_rms_norm_module(decoder.norm)
    for layer in decoder.layers:
        if rms_norm:
            liger._patch_rms_norm_module(layer.input_layernorm)
            liger._patch_rms_norm_module(layer.post_attention_layernorm)
        if swiglu:
            liger._patch_swiglu_module(layer.mlp, liger.LigerSwiGLUMLP)
    if fused_linear_cross_entropy and hasattr(model, "lm_head"):
        # SmolLM3's is the one of Liger that asks nothing of the configuration.
        model.forward = MethodType(liger.smollm3_lce_forward, model)


def _check_activation(model: PreTrainedModel, swiglu: bool) -> None:
    activation = model.config.hidden_act
    if swiglu and activation not in ("silu", "swish"):
        raise ValueError(
            f"swiglu=True computes with SiLU, and the model has hidden_act={activation!r}: pass "
            "liger_kernel_config={'swiglu': False}."
        )
