"""Rewards with TRL's contract, `(completions, **columns) -> list[float | None]`; None: skip."""

from trl_ext.rewards.answers import boxed_answer_reward, exact_match_reward
from trl_ext.rewards.extract import last_boxed, last_number
from trl_ext.rewards.format import format_reward
from trl_ext.rewards.length import length_reward
from trl_ext.rewards.math import math_reward
from trl_ext.rewards.options import with_options

__all__ = [
    "boxed_answer_reward",
    "exact_match_reward",
    "format_reward",
    "last_boxed",
    "last_number",
    "length_reward",
    "math_reward",
    "with_options",
]
