"""Samples one completion per prompt, token for token as TRL does without a server."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList

from trl_ext.rollouts._inputs import device_of, pad_left
from trl_ext.rollouts.mixture import GeometricMixture

# They change the policy's scores before these meet the opponent's, or reorder the rows.
NEUTRAL = {
    "repetition_penalty": (None, 1.0),
    "guidance_scale": (None, 1),
    "sequence_bias": (None,),
    "exponential_decay_length_penalty": (None,),
    "watermarking_config": (None,),
    "num_beams": (None, 1),
    "num_return_sequences": (None, 1),
}


@dataclass(frozen=True)
class Opponent:
    """A second policy that takes part in sampling: in which rows, and how much of it.

    Args:
        coefficient: c of the law ∝ π^(1−c) · μ^c, in [0, 1]; 1 is the opponent μ alone.
        group_size: it answers in the second half of each group of so many rows, an even number;
            the rows of a group stand one after another. None: it takes part in every row.
    """

    coefficient: float
    group_size: int | None

    def __post_init__(self) -> None:
        if not 0.0 <= self.coefficient <= 1.0:
            raise ValueError(
                f"coefficient={self.coefficient} is no weight of a mixture. Give a number from 0 "
                "(the policy) to 1 (the opponent)."
            )
        if self.group_size is not None and (self.group_size < 2 or self.group_size % 2):
            raise ValueError(
                f"group_size={self.group_size} has no second half. Give an even number, at least "
                "2, or None for every row."
            )

    @property
    def in_every_row(self) -> bool:
        return self.group_size is None

    def coefficients(self, rows: int) -> Tensor:
        """`(B,)`, c, and 0 in the first half of each group."""
        if self.group_size is None:
            return torch.full((rows,), self.coefficient)
        if rows % self.group_size:
            raise ValueError(
                f"prompt_ids has {rows} rows, which is not a multiple of "
                f"group_size={self.group_size}: a group would be cut. Give whole groups."
            )
        second_half = torch.arange(rows) % self.group_size >= self.group_size // 2
        return second_half * self.coefficient


def sample(
    model: Any,
    prompt_ids: list[list[int]],
    generation_config: GenerationConfig,
    *,
    eos_token_ids: Sequence[int],
    pad_to_multiple_of: int | None = None,
    opponent_model: Any = None,
    opponent: Opponent | None = None,
) -> list[list[int]]:
    """Samples one completion per prompt, up to and including its first end of sequence.

    Args:
        model: the policy, bare of wrappers, in the mode (training or not) it shall sample in.
        prompt_ids: `B` prompts as token ids.
        generation_config: as TRL builds it, with `pad_token_id`.
        eos_token_ids: each of them ends a completion.
        pad_to_multiple_of: the prompts' common width is rounded up to it.
        opponent_model: μ; None is the reference that a PEFT policy holds itself.
        opponent: which rows μ takes part in; None: none.

    Returns:
        `B` lists of token ids, drawn from the global random state of the model's device.

    Raises:
        ValueError: with an opponent, for a group that is cut or a generation option that would act
            on the policy alone.
    """
    device = device_of(model)
    input_ids, mask = pad_left(prompt_ids, generation_config.pad_token_id, pad_to_multiple_of)
    inputs: dict[str, Any] = {"input_ids": input_ids.to(device), "attention_mask": mask.to(device)}
    if opponent is not None and opponent.coefficient > 0.0:
        reason = "with an opponent: it would act on the policy's scores and not on the opponent's"
        refuse_options(generation_config, NEUTRAL, reason)
        coefficient_B = opponent.coefficients(len(prompt_ids)).to(device)
        mixture = GeometricMixture(
            model, coefficient_B, inputs["attention_mask"], opponent_model=opponent_model
        )
        inputs["logits_processor"] = LogitsProcessorList([mixture])
    with torch.no_grad():
        sequences = model.generate(**inputs, generation_config=generation_config)
    ends = set(eos_token_ids)
    return [until_end(row, ends) for row in sequences[:, input_ids.size(1) :].tolist()]


def until_end(row: list[int], ends: set[int]) -> list[int]:
    """The tokens up to and including the first that ends a completion."""
    for position, token in enumerate(row):
        if token in ends:
            return row[: position + 1]
    return row


def refuse_options(config: GenerationConfig, neutral: Mapping[str, tuple], reason: str) -> None:
    """Each generation option named must have one of its values that do nothing.

    Raises:
        ValueError: one has another; "not supported" and the reason are said of it.
    """
    for name, values in neutral.items():
        value = getattr(config, name, None)
        if value not in values:
            raise ValueError(
                f"{name}={value!r} is not supported {reason}. Leave it at {values[-1]!r}."
            )
