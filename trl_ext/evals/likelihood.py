"""What a model says of given completions; each row is cut out, so that no pad enters a number."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trl_ext.adapters import as_reference
from trl_ext.evals.shares import whole_model
from trl_ext.modes import evaluation_mode

# Prompt and completion, token ids.
Row = tuple[list[int], list[int]]

# Logits that exist at once per model: 256 MiB in float32.
LOGITS_AT_ONCE = 2**26


def in_batches(model: PreTrainedModel, rows: list[Row], batch_size: int) -> Iterator[list[Row]]:
    """Consecutive rows, as many as `batch_size` and `LOGITS_AT_ONCE` allow, at least one."""
    vocabulary = model.config.get_text_config().vocab_size
    batch: list[Row] = []
    for row in rows:
        wider = [*batch, row]
        logits = len(wider) * _width_of_logits(wider) * vocabulary
        if batch and (len(batch) == batch_size or logits > LOGITS_AT_ONCE):
            yield batch
            wider = [row]
        batch = wider
    if batch:
        yield batch


def completion_logits(model: PreTrainedModel, rows: list[Row]) -> list[Tensor]:
    """Logits of the next-token law before each token of each completion.

    Args:
        model: in evaluation mode.
        rows: a prompt of at least one token, and its completion.

    Returns:
        One `(T, V)` tensor per row, T its own number of completion tokens, without gradient.
    """
    # Padding on the right: causal attention does not see it, and it shifts no position.
    width = max(len(prompt) + len(completion) for prompt, completion in rows)
    lengths = torch.tensor([len(prompt) + len(completion) for prompt, completion in rows])
    ids = torch.tensor([[*p, *c, *[p[0]] * (width - len(p) - len(c))] for p, c in rows])
    device, kept = next(model.parameters()).device, _width_of_logits(rows)
    with torch.no_grad():
        logits_BTV = model(
            input_ids=ids.to(device),
            attention_mask=(torch.arange(width) < lengths[:, None]).long().to(device),
            logits_to_keep=kept,
            use_cache=False,
        ).logits
    first = width - kept
    return [
        logits_BTV[row, len(prompt) - 1 - first :][: len(completion)]
        for row, (prompt, completion) in enumerate(rows)
    ]


def _width_of_logits(rows: list[Row]) -> int:
    """Positions from the end of the shortest prompt to the end of the longest row."""
    longest = max(len(prompt) + len(completion) for prompt, completion in rows)
    return longest - min(len(prompt) for prompt, _ in rows) + 1


def token_logps(logits_TV: Tensor, token_ids: list[int]) -> Tensor:
    """`(T,)` log-probabilities of a completion's tokens, nats."""
    ids_T1 = torch.tensor(token_ids, dtype=torch.long, device=logits_TV.device).unsqueeze(1)
    return logits_TV.log_softmax(-1).gather(1, ids_T1).squeeze(1)


def completion_logps(model: PreTrainedModel, rows: list[Row]) -> list[float]:
    """Log-probability of each completion, nats, summed over its tokens."""
    logits = completion_logits(model, rows)
    return [
        token_logps(at_least_float32(logits_TV), ids).double().sum().item()
        for logits_TV, (_, ids) in zip(logits, rows, strict=True)
    ]


def at_least_float32(logits: Tensor) -> Tensor:
    """bfloat16 has three digits: too few for a logarithm of probabilities."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


@contextlib.contextmanager
def reference_policy(
    model: PreTrainedModel, reference: PreTrainedModel | None
) -> Iterator[PreTrainedModel]:
    """The reference in evaluation mode: a model of its own, or the policy without its adapter.

    Gradient flags, which PEFT sets anew with every switch, are given back.
    """
    if reference is not None:
        reference = whole_model(reference)
        with evaluation_mode(reference):
            yield reference
        return
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with as_reference(model):
            yield model
    finally:
        for parameter, flag in flags:
            parameter.requires_grad = flag


def reference_of_trainer(trainer: Any, reference: PreTrainedModel | None) -> PreTrainedModel | None:
    """The given reference, the trainer's own, or None for a policy whose adapter gives way."""
    reference = getattr(trainer, "ref_model", None) if reference is None else reference
    if reference is None and not hasattr(whole_model(trainer.model), "disable_adapter"):
        raise ValueError(
            "trainer has no reference policy (beta=0.0 builds none) and no PEFT adapter to switch "
            "off: there is nothing to compare the policy with. Set beta above 0 or pass "
            "reference=<the model it started from>."
        )
    return None if reference is None else whole_model(reference)


def check_reference(model: PreTrainedModel, reference: PreTrainedModel | None) -> PreTrainedModel:
    """The policy; refuses one that has no reference to be compared with."""
    if reference is None and not hasattr(model, "disable_adapter"):
        raise ValueError(
            f"reference=None and model is a {type(model).__name__} without an adapter: there is "
            "nothing to compare the policy with. Pass reference=<the model it started from>."
        )
    return model
