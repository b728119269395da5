"""TAPA models: Llama's decoder with token-aware phase attention in place of RoPE and softmax."""

from torch import Tensor

from trl_ext.models._decoder import (
    DecoderAttention,
    DecoderForCausalLM,
    DecoderForSequenceClassification,
    DecoderModel,
    identity_values,
)
from trl_ext.models._names import register
from trl_ext.models._visible import Visible
from trl_ext.models.tapa.configuration_tapa import TapaConfig
from trl_ext.ops.tapa import tapa_attention

register(TapaConfig.model_type)


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


class TapaModel(DecoderModel):
    """TAPA without a head: tokens `(B, T)` to hidden states `(B, T, hidden_size)`."""

    config_class = TapaConfig
    attention_class = TapaAttention


class TapaForCausalLM(DecoderForCausalLM):
    """TAPA with a language-modelling head.

    The paper trains with a peak learning rate of 2e-5 where its RoPE model takes 1e-4, and without
    weight decay.
    """

    config_class = TapaConfig
    model_class = TapaModel


class TapaForSequenceClassification(DecoderForSequenceClassification):
    """TAPA with a score per class on the last token, for reward models."""

    config_class = TapaConfig
