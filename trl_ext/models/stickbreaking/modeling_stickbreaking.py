"""Stick-breaking models: Llama's decoder with stick-breaking in place of RoPE and softmax."""

import torch
from torch import Tensor, nn
from transformers import initialization

from trl_ext.models._decoder import (
    DecoderAttention,
    DecoderForCausalLM,
    DecoderForSequenceClassification,
    DecoderModel,
    DecoderPreTrainedModel,
    identity_values,
)
from trl_ext.models._extras import register_with_extras
from trl_ext.models._names import register
from trl_ext.models._visible import Visible
from trl_ext.models.stickbreaking.configuration_stickbreaking import StickBreakingConfig
from trl_ext.ops.stickbreaking import stickbreaking_attention

register(StickBreakingConfig.model_type)
register_with_extras(StickBreakingConfig.model_type)


class HeadRMSNorm(nn.Module):
    """RMSNorm of each head's output by itself, `(B, H, T, D)`, with a weight per head."""

    def __init__(self, heads: int, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(heads, width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        mean_square = x.float().square().mean(-1, keepdim=True)
        return self.weight[:, None] * (x * torch.rsqrt(mean_square + self.eps)).to(x.dtype)


class StickBreakingAttention(DecoderAttention):
    """Heads that share a stick among the keys, the nearest first, and use what is left of it."""

    config: StickBreakingConfig

    def __init__(self, config: StickBreakingConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        H, _, D = config.heads
        # Names with "bias" and "norm" keep Trainer's weight decay away from both, as in the paper.
        bias = torch.zeros(H, D) if config.remainder == "bias" else None
        self.remainder_bias = None if bias is None else nn.Parameter(bias)
        self.head_norm = HeadRMSNorm(H, D, config.rms_norm_eps) if config.head_norm else None

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        own_values: Tensor,
        implementation: str | None,
        visible: Visible,
    ) -> Tensor:
        current = self.config.attend_current
        output, remainder = stickbreaking_attention(
            q, k, v, attend_current=current, implementation=implementation, **visible
        )
        if self.config.remainder == "value":
            own = own_values.repeat_interleave(q.size(1) // k.size(1), dim=1)
            output = output + remainder[..., None] * own
        elif self.remainder_bias is not None:
            output = output + remainder[..., None] * self.remainder_bias[:, None]
        return output if self.head_norm is None else self.head_norm(output)

    def weights(self, q: Tensor, k: Tensor, *, visible: Visible) -> Tensor:
        current, values = self.config.attend_current, identity_values(k)
        return stickbreaking_attention(
            q, k, values, attend_current=current, implementation="naive", **visible
        )[0]


class StickBreakingPreTrainedModel(DecoderPreTrainedModel):
    """What transformers asks of the model's classes."""

    config_class = StickBreakingConfig

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, StickBreakingAttention) and module.remainder_bias is not None:
            initialization.zeros_(module.remainder_bias)


class StickBreakingModel(StickBreakingPreTrainedModel, DecoderModel):
    """Stick-breaking without a head: tokens `(B, T)` to hidden states `(B, T, hidden_size)`."""

    attention_class = StickBreakingAttention


class StickBreakingForCausalLM(StickBreakingPreTrainedModel, DecoderForCausalLM):
    """Stick-breaking with a language-modelling head.

    LoRA leaves the remainder bias as it is; `LoraConfig(target_parameters=["remainder_bias"])`
    adapts it beside PEFT's default targets.
    """

    model_class = StickBreakingModel


class StickBreakingForSequenceClassification(
    StickBreakingPreTrainedModel, DecoderForSequenceClassification
):
    """Stick-breaking with a score per class on the last token, for reward models."""

    model_class = StickBreakingModel
