"""Checks that stop a run before it harms itself."""

import torch
from transformers import TrainerCallback


class NonFiniteGuard(TrainerCallback):
    """Stops on a NaN or infinite gradient while the parameters are still finite.

    The host steps on it, and its log filter hides the loss that caused it. Under float16 the
    gradient scaler skips such steps by itself, so the guard stands back.
    """

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if args.fp16 or model is None:
            return
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        if not gradients or all(torch.isfinite(torch.stack(torch._foreach_norm(gradients)))):
            return
        name = next(
            n
            for n, p in model.named_parameters()
            if p.grad is not None and not p.grad.isfinite().all()
        )
        raise FloatingPointError(
            f"gradient of {name!r} is not finite in optimizer step {state.global_step + 1}; the "
            "parameters were left as they are. Look at the rewards and log-probabilities of this "
            "step's batch (log_completions=True), lower learning_rate, or resume from the last "
            "checkpoint."
        )
