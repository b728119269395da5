"""Sampling from a geometric mixture of two policies, inside one `generate` call."""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from trl_ext.adapters import as_reference
from trl_ext.rollouts._inputs import accepted, positions


def mixed_logps(logits: Tensor, opponent_logits: Tensor, coefficient: Tensor | float) -> Tensor:
    """Log-probabilities of the geometric mixture of two next-token laws.

    log p(a|s) = (1 − c) log π(a|s) + c log μ(a|s) − log Z(s)

    Args:
        logits, opponent_logits: `(..., V)` of π and μ, up to a constant per law; −∞ in π is 0 in p.
        coefficient: c in [0, 1], a number or one that broadcasts.

    Returns:
        `(..., V)`, nats, normalised.
    """
    mixed = (1.0 - coefficient) * logits + coefficient * opponent_logits
    mixed = mixed.masked_fill(logits.isneginf(), -torch.inf)  # 0 · −∞ is NaN
    return mixed.log_softmax(-1)


class GeometricMixture(LogitsProcessor):
    """Turns the policy's scores into those of the mixture, row by row; see `mixed_logps`.

    transformers applies it before the temperature: rows are drawn from p^(1/τ), normalised. Rows
    with c = 0 keep their scores to the bit. A token that the policy's other processors forbid stays
    forbidden. The opponent keeps a cache of its own, for the rows with c > 0 only.

    Args:
        model: the policy π that `generate` is called on.
        coefficient_B: `(B,)`, c of each row, in [0, 1].
        prompt_mask: `(B, S)`, the attention mask of the left-padded prompts.
        opponent_model: μ; None is π with its adapter turned off, or with the copy of the adapter
            that TRL keeps as reference.
        use_cache: False runs the whole text through the opponent for each token.

    Raises:
        ValueError: if there is no opponent, or one with another vocabulary.

    Source: Munos et al., arXiv:2312.00886 (Nash-MD-PG).
    """

    def __init__(
        self,
        model: Any,
        coefficient_B: Tensor,
        prompt_mask: Tensor,
        *,
        opponent_model: Any = None,
        use_cache: bool = True,
    ) -> None:
        assert coefficient_B.shape == prompt_mask.shape[:1], (coefficient_B.shape, prompt_mask)
        if opponent_model is None and not hasattr(model, "disable_adapter"):
            raise ValueError(
                f"opponent_model=None with a policy of type {type(model).__name__}: only a PEFT "
                "model holds its reference itself. Give the model that is to answer."
            )
        self._opponent = model if opponent_model is None else opponent_model
        self._shares_weights = opponent_model is None
        self._rows = coefficient_B.nonzero().squeeze(1)
        self._coefficient = coefficient_B[self._rows].unsqueeze(1)
        self._prompt_mask = prompt_mask[self._rows]
        self._use_cache = use_cache
        self._cache: Any = None
        self._seen = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        if self._rows.numel() == 0:
            return scores
        if input_ids.size(1) != self._seen + 1:
            self._cache, self._seen = None, 0  # another `generate`, or one that stepped back
        opponent = self._opponent_logits(input_ids[self._rows])
        if opponent.size(-1) != scores.size(-1):
            raise ValueError(
                f"opponent_model gives {opponent.size(-1)} scores where the policy gives "
                f"{scores.size(-1)}: the two must share one vocabulary."
            )
        mixed = mixed_logps(scores[self._rows], opponent, self._coefficient)
        return scores.index_copy(0, self._rows, mixed.to(scores.dtype))

    @torch.no_grad()
    def _opponent_logits(self, input_ids: Tensor) -> Tensor:
        """Scores of the next token, in float32, of the rows with an opponent."""
        mask = torch.ones_like(input_ids)
        mask[:, : self._prompt_mask.size(1)] = self._prompt_mask
        text = {"position_ids": positions(mask)[:, self._seen :], "logits_to_keep": 1}
        with as_reference(self._opponent) if self._shares_weights else nullcontext():
            out = self._opponent(
                input_ids=input_ids[:, self._seen :],
                attention_mask=mask,
                cache=self._cache,
                use_cache=self._use_cache,
                **accepted(self._opponent, **text),
            )
        self._cache = getattr(out, "cache", None) if self._use_cache else None
        self._seen = 0 if self._cache is None else input_ids.size(1)
        return out.logits[:, -1].float()
