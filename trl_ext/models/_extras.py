"""What PEFT and Liger look up by model type. Neither is imported here: both are heavy."""

from functools import partial
from types import ModuleType

from trl_ext.models._late import when_imported
from trl_ext.models._liger import apply_liger_kernel


def register_with_extras(model_type: str) -> None:
    """Enters the model in their tables as soon as they are imported."""
    when_imported("peft.utils.constants", partial(_adapt_as_llama, model_type))
    when_imported("liger_kernel.transformers.monkey_patch", partial(_patch_by_us, model_type))


def _adapt_as_llama(model_type: str, constants: ModuleType) -> None:
    """Modules have Llama's names, so each method of PEFT adapts by default what it does there."""
    for table in vars(constants).values():
        if isinstance(table, dict) and "llama" in table:
            table.setdefault(model_type, table["llama"])


def _patch_by_us(model_type: str, monkey_patch: ModuleType) -> None:
    apply = partial(apply_liger_kernel, monkey_patch)
    monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN.setdefault(model_type, apply)
