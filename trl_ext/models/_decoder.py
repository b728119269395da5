"""A Llama-family decoder without rotary embeddings; the attention is the subclass's."""

import dataclasses
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_layers import (
    GenericForSequenceClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from transformers.utils.deprecation import deprecate_kwarg
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from trl_ext.models._configuration import TOO_OLD, DecoderConfig
from trl_ext.models._names import check_name, implementation
from trl_ext.models._visible import Visible, visible_keys


class DecoderAttention(nn.Module):
    """Projections and cache around an attention of `trl_ext.ops`."""

    def __init__(self, config: DecoderConfig, layer_idx: int) -> None:
        super().__init__()
        heads, key_heads, self.head_dim = config.heads
        self.config, self.layer_idx = config, layer_idx
        inner, keys = heads * self.head_dim, key_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, inner, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=config.attention_bias)
        self.o_proj = nn.Linear(inner, config.hidden_size, bias=config.attention_bias)

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
        """The output of each head, `(B, H, T, D)`.

        Args:
            q: `(B, H, T, D)`.
            k, v: `(B, Hkv, Tk, D)`, cached ones first.
            own_values: `(B, Hkv, T, D)`, those of the queries' own tokens.
            implementation, visible: for `trl_ext.ops`.
        """
        raise NotImplementedError

    def weights(self, q: Tensor, k: Tensor, *, visible: Visible) -> Tensor:
        """What each query takes of each key, `(B, H, T, Tk)`; for looking at, in O(T²) memory."""
        raise NotImplementedError

    def forward(
        self,
        hidden_states: Tensor,
        visible: Visible,
        cache: Cache | None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        # Under tensor parallelism each process has some of the heads: their number is not config's.
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (p(hidden_states).view(shape).transpose(1, 2) for p in projections)
        own_values, chosen = v, implementation(self.config)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        output = self.attend(q, k, v, own_values=own_values, implementation=chosen, visible=visible)
        weights = self.weights(q, k, visible=visible) if output_attentions else None
        return self.o_proj(output.transpose(1, 2).flatten(2)), weights


def identity_values(k: Tensor) -> Tensor:
    """Values of which an attention's output is its weights, `(B, Hkv, Tk, Tk)`."""
    return torch.eye(k.size(2), dtype=k.dtype, device=k.device).expand(*k.shape[:2], -1, -1)


class DecoderLayer(GradientCheckpointingLayer):
    """Pre-norm residual block: attention, then the gated MLP."""

    def __init__(self, config: DecoderConfig, attention: DecoderAttention) -> None:
        super().__init__()
        self.self_attn = attention
        self.mlp = LlamaMLP(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        hidden_states = (
            hidden_states + self.self_attn(self.input_layernorm(hidden_states), **kwargs)[0]
        )
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


def _check_host() -> None:
    if "cache" not in {field.name for field in dataclasses.fields(BaseModelOutputWithPast)}:
        raise ImportError(TOO_OLD)


class DecoderPreTrainedModel(PreTrainedModel):
    """What transformers asks of both models' classes."""

    config: DecoderConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DecoderLayer"]
    _skip_keys_device_placement = ["cache"]
    _can_compile_fullgraph = True
    _can_record_outputs = {
        "hidden_states": DecoderLayer,
        "attentions": DecoderAttention,
    }
    # `_supports_sdpa` and its like stay false, and above all `_supports_attention_backend`, which
    # serving engines read as leave to put their own softmax in.

    def __init__(self, config: DecoderConfig, *args: Any, **kwargs: Any) -> None:
        _check_host()
        implementation(config)
        super().__init__(config, *args, **kwargs)

    def set_attn_implementation(
        self, attn_implementation: str | dict, allow_all_kernels: bool = False
    ) -> None:
        """Switches among the model's own attentions, which differ in speed and memory only."""
        name = attn_implementation
        name = name.get("", "eager") if isinstance(name, dict) else name
        check_name(self.config.model_type, name)
        super().set_attn_implementation(attn_implementation, allow_all_kernels)

    @staticmethod
    def create_masks_for_generate(*, attention_mask: Tensor | None, **_: Any) -> Tensor | None:
        """`generate` would build an additive mask for a static cache; the padding mask says all."""
        return attention_mask


class DecoderModel(DecoderPreTrainedModel):
    """Embeddings, blocks and the last norm."""

    attention_class: ClassVar[type[DecoderAttention]]

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(
            DecoderLayer(config, self.attention_class(config, layer_idx=i))
            for i in range(config.num_hidden_layers)
        )
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Tokens to hidden states, as `LlamaModel`; `position_ids` only tell packed documents."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds.")
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        visible = visible_keys(
            hidden,
            attention_mask,
            position_ids,
            cache,
            # A stage of a pipeline keeps its own layers, and fills the cache of no other.
            layer_idx=next((i for i, x in enumerate(self.layers) if hasattr(x, "self_attn")), 0),
            sees_itself=self.config.sees_itself,
            cu_seq_lens_q=kwargs.get("cu_seq_lens_q"),
        )
        attentions = kwargs.get("output_attentions", self.config.output_attentions)
        # The host drafts with fewer layers by lowering their number for a while.
        for layer in self.layers[: self.config.num_hidden_layers]:
            # Gradient checkpointing wants the hidden states by position.
            hidden = layer(
                hidden,
                visible=visible,
                cache=cache,
                output_attentions=bool(attentions),
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden), cache=cache)


class DecoderForCausalLM(DecoderPreTrainedModel, GenerationMixin):
    """The decoder with a language-modelling head."""

    model_class: ClassVar[type[DecoderModel]]
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan: Any = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config)
        self.model = self.model_class(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Tokens to logits, as `LlamaForCausalLM`.

        Args:
            logits_to_keep: the last so many positions, 0 for all; or positions `(n,)`, the same
                in each row, or `(B, n)`; or booleans `(B, T)`, which flatten the result.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        logits = self.lm_head(_kept(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            cache=outputs.cache,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


def _kept(hidden_BTD: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    if isinstance(logits_to_keep, int):
        return hidden_BTD[:, -logits_to_keep:]  # -0 keeps all
    if logits_to_keep.dim() == 1:
        return hidden_BTD[:, logits_to_keep]
    if logits_to_keep.dtype == torch.bool:
        return hidden_BTD[logits_to_keep]
    return hidden_BTD.take_along_dim(logits_to_keep[..., None], dim=1)


class DecoderForSequenceClassification(GenericForSequenceClassification, DecoderPreTrainedModel):
    """The decoder with a score per class on the last token, as reward models have it."""

    model_class: ClassVar[type[DecoderModel]]

    def __init__(self, config: DecoderConfig) -> None:
        # The host's own asks AutoModel, which does not know a class that came with a checkpoint.
        DecoderPreTrainedModel.__init__(self, config)
        assert config.num_labels
        self.num_labels = config.num_labels
        self.model = self.model_class(config)
        self.score = nn.Linear(config.hidden_size, self.num_labels, bias=False)
        self.post_init()
