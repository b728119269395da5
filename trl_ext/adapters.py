"""The reference that a PEFT policy holds in itself."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

REFERENCE_ADAPTER = "ref"  # TRL's name for its frozen copy of an adapter that was trained before


@contextmanager
def as_reference(model: Any) -> Iterator[None]:
    """Within it a PEFT model answers as its reference: under TRL's copy of the adapter where there
    is one, else without any adapter."""
    if REFERENCE_ADAPTER not in model.peft_config:
        with model.disable_adapter():
            yield
        return
    active = model.active_adapter
    model.set_adapter(REFERENCE_ADAPTER)
    try:
        yield
    finally:
        model.set_adapter(active)
