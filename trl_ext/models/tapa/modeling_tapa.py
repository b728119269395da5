"""TAPA models: Llama's decoder with token-aware phase attention in place of RoPE and softmax."""

from typing import Any

from torch import Tensor

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
from trl_ext.models._quantization import leave_exact
from trl_ext.models._visible import Visible
from trl_ext.models.tapa.configuration_tapa import TapaConfig
from trl_ext.ops.tapa import tapa_attention

register(TapaConfig.model_type)
register_with_extras(TapaConfig.model_type)


class TapaAttention(DecoderAttention):
    """Heads whose first θ·head_dim coordinates give the amplitude, the others the phase."""

    config: TapaConfig

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
        return tapa_attention(
            q,
            k,
            v,
            amplitude_fraction=self.config.amplitude_fraction,
            phase_alpha=self.config.phase_alpha,
            phase=self.config.phase,
            implementation=implementation,
            **visible,
        )

    def weights(self, q: Tensor, k: Tensor, *, visible: Visible) -> Tensor:
        values = identity_values(k)
        return self.attend(q, k, values, own_values=values, implementation="naive", visible=visible)


class TapaPreTrainedModel(DecoderPreTrainedModel):
    """What transformers asks of the model's classes."""

    config_class = TapaConfig

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As the host's; a `quantization_config` leaves `q_proj` and `k_proj` as they are.

        The phase multiplies their errors. With random weights of deviation 0.03 and width 1024, NF4
        in all projections moves the attention's output by 52 %, and by 13 % if it spares these two;
        the same in softmax attention, where it spares none, by 17 %.
        """
        if kwargs.get("quantization_config") is not None:
            exact = leave_exact(kwargs["quantization_config"], ("q_proj", "k_proj"))
            kwargs["quantization_config"] = exact
        return super().from_pretrained(*args, **kwargs)


class TapaModel(TapaPreTrainedModel, DecoderModel):
    """TAPA without a head: tokens `(B, T)` to hidden states `(B, T, hidden_size)`."""

    attention_class = TapaAttention


class TapaForCausalLM(TapaPreTrainedModel, DecoderForCausalLM):
    """TAPA with a language-modelling head.

    The paper trains with a peak learning rate of 2e-5 where its RoPE model takes 1e-4, and without
    weight decay.
    """

    model_class = TapaModel


class TapaForSequenceClassification(TapaPreTrainedModel, DecoderForSequenceClassification):
    """TAPA with a score per class on the last token, for reward models."""

    model_class = TapaModel
