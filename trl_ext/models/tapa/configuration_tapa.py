"""The configuration of TAPA models."""

import math
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict

from trl_ext.models._configuration import DecoderConfig


@strict
class TapaConfig(DecoderConfig):
    """Llama's fields without those of RoPE, and the paper's symbols.

    Args:
        amplitude_fraction: θ, share of each head's coordinates that make the amplitude; the others
            make the phase. θ·head_dim must be a whole number; a multiple of 16 on either side
            suits the matrix units of a GPU.
        phase_alpha: α > 0, exponent of the distance in the phase.
        phase: `"quadratic"`, or `"linear"`, the paper's ablation (eq. 16).

    Raises:
        ValueError: θ does not split the head, α is not positive, or the phase has no such form.

    Source: arXiv:2509.12635, eq. 11-13; defaults of section 4.1.
    """

    model_type = "tapa"
    sees_itself: ClassVar[bool] = True

    amplitude_fraction: float | int = 0.5
    phase_alpha: float | int = 0.1
    phase: str = "quadratic"

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        width = self.heads[2]
        amplitude = self.amplitude_fraction * width
        if not (0 < amplitude < width and math.isclose(amplitude, round(amplitude))):
            raise ValueError(
                f"amplitude_fraction={self.amplitude_fraction} of head_dim={width} does not"
                " split it into two parts: choose it so that their product is a whole number from "
                f"1 to {width - 1}, as 0.5 does for an even width."
            )
        if not 0 < self.phase_alpha < math.inf:
            raise ValueError(
                f"phase_alpha={self.phase_alpha} is no exponent of a distance that grows: use a "
                "positive number, 0.1 as in the paper."
            )
        if self.phase not in ("quadratic", "linear"):
            raise ValueError(
                f"phase={self.phase!r} is not a phase of the paper: use 'quadratic', or 'linear' "
                "for its ablation."
            )
