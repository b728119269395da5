"""Strict options: what TRL's parser would silently ignore or take as it is, is refused here."""

import difflib
import sys
from argparse import ArgumentTypeError
from collections.abc import Iterable
from itertools import chain
from typing import Any

from trl import TrlParser


class StrictParser(TrlParser):
    """TRL's parser, except that an option it does not know, or of another type, is an error.

    Example:

    ```python
    options, config = StrictParser([Options, PassAtKConfig]).parse_args_and_config()
    ```
    """

    def __init__(self, dataclass_types: Iterable[Any], **kwargs: Any):
        super().__init__(dataclass_types, allow_abbrev=False, **kwargs)

    def parse_args_and_config(
        self, args: Iterable[str] | None = None, *options: bool, **named: bool
    ) -> tuple[Any, ...]:
        words = list(sys.argv[1:] if args is None else args)
        pieces = [w.split("=", 1) if w.startswith("--config=") else [w] for w in words]
        return super().parse_args_and_config(list(chain.from_iterable(pieces)), *options, **named)

    def set_defaults_with_config(self, **kwargs: Any) -> list[str]:
        # The first option of a name holds its type; `--no_...` comes after it.
        options = {action.dest: action for action in reversed(self._actions)}
        del options["help"]
        refuse_unknown(kwargs, options, "in the configuration file")
        typed = {name: self._typed(options[name], value) for name, value in kwargs.items()}
        return super().set_defaults_with_config(**typed)

    def parse_known_args(  # pyright: ignore[reportIncompatibleMethodOverride]: argparse overloads
        self, args: Any = None, namespace: Any = None
    ) -> Any:
        found, rest = super().parse_known_args(args, namespace)
        options = [name for name in self._option_string_actions if name.startswith("--")]
        flags = [word.split("=")[0] for word in rest if word.startswith("-")]
        refuse_unknown(flags or rest, options, "on the command line")
        return found, rest

    def _typed(self, option: Any, value: Any) -> Any:
        """argparse converts and checks defaults only if they are strings, and choices never."""
        if isinstance(value, list):
            return [self._typed(option, item) for item in value]
        try:
            if isinstance(value, bool | int | float | str) and option.type is not str:
                value = option.type(str(value))
            if option.choices and value is not None and value not in option.choices:
                raise ValueError(f"choose from {', '.join(map(str, option.choices))}")
        except (ValueError, ArgumentTypeError) as error:
            where = f"{option.dest}={value!r} in the configuration file"
            raise ValueError(f"{where}: {error}.") from error
        return value


def refuse_unknown(names: Iterable[str], known: Iterable[str], where: str) -> None:
    """Raises a ValueError that names each unknown option and the known one it resembles."""
    known, complaints = list(known), []
    for name in names:
        if name not in known:
            similar = difflib.get_close_matches(name, known, n=1)
            complaints.append(f"{name!r}" + (f" (did you mean {similar[0]!r}?)" if similar else ""))
    if complaints:
        raise ValueError(f"unknown {where}: {', '.join(complaints)}. Remove or correct it.")
