"""Attention from q, k and v alone: what a score is, and how to compute it in linear memory."""

from trl_ext.ops.stickbreaking import stickbreaking_attention
from trl_ext.ops.tapa import tapa_attention

__all__ = ["stickbreaking_attention", "tapa_attention"]
