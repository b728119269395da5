"""What the configurations of both models share: Llama's fields, without those of RoPE."""

import importlib
import os
from typing import Any

import transformers

# The package does not install beside an older host, but the code in a checkpoint may meet one.
TOO_OLD = (
    f"this model needs transformers 5.24 or later, and here is {transformers.__version__}: "
    "`pip install -U transformers`."
)
try:
    from huggingface_hub.dataclasses import strict
    from transformers import PreTrainedConfig
except ImportError as error:
    raise ImportError(TOO_OLD) from error

TENSOR_PARALLEL_PLAN = {
    "layers.*.self_attn.q_proj": "colwise",
    "layers.*.self_attn.k_proj": "colwise",
    "layers.*.self_attn.v_proj": "colwise",
    "layers.*.self_attn.o_proj": "rowwise",
    "layers.*.mlp.gate_proj": "colwise",
    "layers.*.mlp.up_proj": "colwise",
    "layers.*.mlp.down_proj": "rowwise",
}


# At least 1, each of them.
SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "head_dim"),
)
# Fields of other decoders that would promise what this one does not do.
FOREIGN = ("rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor")
FOREIGN += ("sliding_window",)


@strict
class DecoderConfig(PreTrainedConfig):
    """A Llama-family decoder whose attention brings its own sense of position.

    Raises:
        ValueError: sizes are not positive or do not fit together, a dropout of attention weights is
            asked for, which neither paper defines, or a field of RoPE or of a window is set.
    """

    keys_to_ignore_at_inference = ["cache"]
    base_model_tp_plan = TENSOR_PARALLEL_PLAN
    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int | None = None
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    attention_dropout: int | float | None = 0.0
    mlp_bias: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        self._check_sizes()
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self._check_width()
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.intermediate_size is None:
            # Llama's rule: 8/3 of the width, rounded up to whole tiles of the matrix units.
            self.intermediate_size = 64 * -(-8 * self.hidden_size // (3 * 64))
        self._check_heads()
        if self.attention_dropout:
            raise ValueError(
                f"attention_dropout={self.attention_dropout} is not defined for the attention of "
                f"{self.model_type!r}: neither paper drops weights. Set it to 0."
            )
        for name in FOREIGN:
            if kwargs.get(name) is not None:
                raise ValueError(
                    f"{name}={kwargs[name]!r} has no effect on {self.model_type!r}: nothing is "
                    "rotated and every earlier token is seen. Leave it out."
                )
        super().__post_init__(**kwargs)

    @property
    def heads(self) -> tuple[int, int, int]:
        """H, Hkv and D."""
        assert self.num_key_value_heads and self.head_dim
        return self.num_attention_heads, self.num_key_value_heads, self.head_dim

    def save_pretrained(
        self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """As the host's, with the model's code beside the file; see `trl_ext.models._hub`."""
        # The host itself carries on the code of classes that it loaded from a folder.
        if type(self).__module__.startswith("trl_ext."):
            os.makedirs(save_directory, exist_ok=True)
            # Not by a statement, which would make the module travel too.
            hub = importlib.import_module("trl_ext.models._hub")
            self.auto_map = hub.write_code(type(self), save_directory)
        super().save_pretrained(save_directory, **kwargs)
        if push_to_hub:  # the host uploads what it wrote itself
            repository = kwargs.pop("repo_id", os.path.basename(os.path.abspath(save_directory)))
            self.push_to_hub(repository, **kwargs)

    def _check_sizes(self) -> None:
        for name in SIZES:
            size = getattr(self, name)
            if size is not None and size < 1:
                raise ValueError(f"{name}={size} is no size: use a whole number from 1 on.")

    def _check_width(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} does not divide hidden_size="
                f"{self.hidden_size}: choose a divisor, or set head_dim."
            )

    def _check_heads(self) -> None:
        heads = self.num_key_value_heads
        if heads is None or self.num_attention_heads % heads:
            raise ValueError(
                f"num_key_value_heads={heads} does not divide num_attention_heads="
                f"{self.num_attention_heads}: choose a divisor, so that each key head serves the "
                "same number of query heads."
            )
