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
        a list replaces the default. A configuration that knows no list comes back as it is, if it
        is of a method that reads quantized weights and makes none.

    Raises:
        ValueError: the method quantizes by examples (GPTQ), and knows no exceptions.
    """
    if isinstance(quantization, dict):
        quantization = AutoQuantizationConfig.from_dict(quantization)
    if getattr(quantization, "dataset", None) and not _has_list(quantization):
        raise ValueError(
            f"{type(quantization).__name__} would quantize {', '.join(modules)} too, whose errors "
            "TAPA's phase multiplies. Name the other modules in modules_in_block_to_quantize, or "
            "use BitsAndBytesConfig."
        )
    quantization = copy.deepcopy(quantization)
    for field in FIELDS:
        if hasattr(quantization, field):
            given = getattr(quantization, field)
            setattr(quantization, field, [*(HEADS if given is None else given), *modules])
    return quantization


def _has_list(quantization: Any) -> bool:
    names = (*FIELDS, "modules_in_block_to_quantize")
    return any(getattr(quantization, name, None) is not None for name in names)
