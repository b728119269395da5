"""Which modules a quantization leaves alone."""

import copy
from collections.abc import Sequence
from typing import Any

from transformers.quantizers import AutoQuantizationConfig

FIELDS = ("llm_int8_skip_modules", "modules_to_not_convert", "skip_modules")
HEADS = ("lm_head", "score")  # what transformers leaves alone if no list is given


def leave_exact(quantization: Any, modules: Sequence[str]) -> Any:
    """A copy of a quantization's configuration whose list of exceptions has these modules too.

    Args:
        quantization: an object as `BitsAndBytesConfig`, or the dictionary of one.
        modules: last parts of the modules' names.

    Returns:
        The object. Where there was no list, which means the host's default, the heads join it too:
        a list replaces the default. A configuration that knows no list comes back as it is: it is
        of a method that reads quantized weights and makes none.
    """
    if isinstance(quantization, dict):
        quantization = AutoQuantizationConfig.from_dict(quantization)
    quantization = copy.deepcopy(quantization)
    for field in FIELDS:
        if hasattr(quantization, field):
            given = getattr(quantization, field)
            setattr(quantization, field, [*(HEADS if given is None else given), *modules])
    return quantization
