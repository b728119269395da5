"""Checks that stop a run before it harms itself."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback


class NonFiniteGuard(TrainerCallback):
    """Stops on a NaN or infinite gradient while the parameters are still finite.

    The host steps on it, and its log filter hides the loss that caused it. Under float16 the
    gradient scaler skips such steps by itself, so the guard stands back.
    """

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if args.fp16 or model is None:
            return
        gradients = dict(_gradients(model))
        for name in _with_overflowing_norm(gradients):
            if gradients[name].isfinite().all():
                continue  # a norm can overflow where no gradient does
            raise FloatingPointError(
                f"gradient of {name!r} is not finite in optimizer step {state.global_step + 1}; "
                "the parameters were left as they are. Look at the rewards and log-probabilities "
                "of this step's batch (log_completions=True), lower learning_rate, or resume from "
                "the last checkpoint."
            )


def _gradients(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            gradient = parameter.grad
            yield name, gradient.to_local() if isinstance(gradient, DTensor) else gradient


def _with_overflowing_norm(gradients: dict[str, Tensor]) -> list[str]:
    """One number per parameter and one synchronisation for all of them."""
    if not gradients:
        return []
    norms = torch._foreach_norm(list(gradients.values()))
    finite = torch.stack([norm.float().to(norms[0].device) for norm in norms]).isfinite().tolist()
    return [name for name, ok in zip(gradients, finite, strict=True) if not ok]
