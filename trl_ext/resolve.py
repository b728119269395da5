"""`module:function` names, the form in which a callable can stand in a YAML file."""

import importlib
from collections.abc import Callable
from typing import Any


def resolve(function: str | Callable[..., Any], argument: str) -> Callable[..., Any]:
    """The callable that a `module:function` string names; a callable is returned as it is.

    Args:
        function: a callable, or `"package.module:function"` of an installed module or one in the
            working directory.
        argument: what the user calls it, for the error.

    Raises:
        ValueError: the string has another form, or nothing callable has that name.
    """
    if callable(function):
        return function
    module, _, name = function.partition(":")
    try:
        found = importlib.import_module(module) if name else None
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{argument}={function!r} names no function ({error}). Write "
            "'package.module:function', of an installed module or one in the working directory."
        ) from error
    if not callable(found):
        raise ValueError(f"{argument}={function!r} is no function: {found!r} cannot be called.")
    return found


def name_of(function: str | Callable[..., Any]) -> str:
    """The `module:function` name of a callable, for files."""
    if isinstance(function, str):
        return function
    return f"{function.__module__}:{getattr(function, '__qualname__', type(function).__qualname__)}"
