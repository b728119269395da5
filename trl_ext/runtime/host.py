"""Whether the installed host is one that the seam was read against."""

import os
from importlib import metadata

from packaging.requirements import Requirement

OVERRIDE = "TRL_EXT_ALLOW_UNTESTED_HOST"
HOSTS = ("trl", "transformers")


def check_host() -> None:
    """Compares the host's versions with the pins of this package.

    Raises:
        ImportError: a version is outside its pin and `TRL_EXT_ALLOW_UNTESTED_HOST=1` is not set.
    """
    if os.environ.get(OVERRIDE) == "1":
        return
    pins = [Requirement(line) for line in metadata.requires("trl-ext") or ()]
    for pin in pins:
        installed = metadata.version(pin.name) if pin.name in HOSTS and not pin.marker else None
        if installed and not pin.specifier.contains(installed, prereleases=True):
            raise ImportError(
                f"trl_ext rests on private parts of {pin.name} and is tested with {pin.specifier}; "
                f"installed is {installed}. Run `pip install '{pin}'`, or set {OVERRIDE}=1 to try."
            )
