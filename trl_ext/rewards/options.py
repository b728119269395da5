"""Gives a reward other settings while it stays what TRL expects: named, picklable, callable."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

Reward = Callable[..., list]


def with_options(reward: Reward, /, *, name: str | None = None, **options: Any) -> Reward:
    """Binds keyword options of a reward.

    For a YAML that names rewards as `module:function`, bind in a module of yours:
    `short_answers = with_options(length_reward, max_length=256, buffer=64)`.

    Args:
        reward: a function of this package.
        name: what TRL logs it as; the reward's own name by default.
        **options: keyword-only arguments of `reward`.

    Returns:
        A callable with the same contract. It can be pickled, to run in another process.

    Raises:
        ValueError: if the reward has no such option, or refuses the value.
    """
    parameters = inspect.signature(reward).parameters.values()
    known = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY} - {"log_metric"}
    if unknown := sorted(options.keys() - known):
        raise ValueError(
            f"{', '.join(unknown)}: not an option of {reward.__name__}, which has "
            f"{', '.join(sorted(known)) or 'none'}. Remove or rename it."
        )
    bound = functools.update_wrapper(functools.partial(reward, **options), reward)
    bound.__name__ = name or reward.__name__
    bound([], answer=[], completion_ids=[])  # an empty batch checks the values before a run starts
    return bound
