"""Batches whose rows are whole groups: from TRL's rows of completions, and back for a forward pass.

A batch of groups holds tensors `(P, M, ...)`, one row per prompt with M of its completions, and
tensors `(P, ...)` of what a loss must know of their scores.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Metrics = dict[str, tuple[Tensor, Tensor]]  # name -> values, and weights of the same shape

PROMPT = ("prompt_ids", "prompt_mask")
# Right-padded, one value per completion token.
TOKENS = (
    *("completion_ids", "completion_mask", "tool_mask", "answer_mask"),
    *("ref_logp", "old_logp", "sampled_logp"),
)
PER_COMPLETION = (*PROMPT, *TOKENS, "version")


@dataclass(frozen=True)
class Selection:
    """What is kept of scored groups.

    Args:
        index_PM: places of the M completions of each group that are trained on.
        stored: what the loss must know of the scores; tensors `(P, ...)`, kept with their group.
        role_PG: what the completions table shows as each completion's advantage.
    """

    index_PM: Tensor
    stored: dict[str, Tensor]
    role_PG: Tensor


@dataclass(frozen=True)
class Group:
    """A micro-batch of whole groups, as a loss sees it.

    Log-probabilities of completions `(P, M)` are sums over their tokens `(P, M, T)`, in nats.
    `logp` carries the gradient; `old_logp` is that of the policy that sampled, `ref_logp` of the
    reference. `mask_PMT` is 1 on the tokens that count. `stored` is what `select` kept of the
    scores, and `rewards`, `(P, M)`. `logits` returns those of policy and reference, `(P·M, T, V)`,
    divided by the temperature; it costs one more forward pass of each.
    """

    logp_PMT: Tensor
    ref_logp_PMT: Tensor
    old_logp_PMT: Tensor
    mask_PMT: Tensor
    stored: dict[str, Tensor]
    logits: Callable[[], tuple[Tensor, Tensor]]

    @functools.cached_property
    def logp_PM(self) -> Tensor:
        return (self.logp_PMT * self.mask_PMT).sum(-1)

    @functools.cached_property
    def ref_logp_PM(self) -> Tensor:
        return (self.ref_logp_PMT * self.mask_PMT).sum(-1)

    @functools.cached_property
    def old_logp_PM(self) -> Tensor:
        return (self.old_logp_PMT * self.mask_PMT).sum(-1)

    @functools.cached_property
    def lengths_PM(self) -> Tensor:
        return self.mask_PMT.sum(-1).to(self.logp_PMT.dtype)


def grouped(
    output: dict, rewards_PG: Tensor, kept: Selection, inputs: list, *, named: bool
) -> dict[str, Any]:
    """TRL's batch of completions as a batch of groups, selected completions only.

    Args:
        output: TRL's batch, `(B, ...)`, groups in a row.
        rewards_PG: rewards as they were compared.
        kept: what the method selected.
        inputs: rows of the dataset, one per completion.
        named: keep the prompts, for a record.
    """
    G = rewards_PG.size(1)
    batch: dict[str, Any] = {
        key: _taken(output[key].view(-1, G, *output[key].shape[1:]), kept.index_PM)
        for key in PER_COMPLETION
        if output.get(key) is not None
    }
    batch |= kept.stored | {"rewards": _taken(rewards_PG, kept.index_PM)}
    if named:
        batch["prompt"] = [row["prompt"] for row in inputs[::G]]
    return batch


def _taken(values_PG: Tensor, index_PM: Tensor) -> Tensor:
    """Completions `(P, M, ...)` at the places `(P, M)` of `(P, G, ...)`."""
    P = torch.arange(index_PM.size(0), device=index_PM.device).unsqueeze(1)
    return values_PG[P, index_PM]


def trimmed(batch: dict) -> dict:
    """Without the columns that are padding in every row of this batch."""
    longest = int(batch["completion_mask"].sum(-1).max())
    prompt = int(batch["prompt_mask"].sum(-1).max())
    cut = {key: batch[key][..., :longest] for key in TOKENS if key in batch}
    cut |= {key: batch[key][..., batch[key].size(-1) - prompt :] for key in PROMPT}
    return {**batch, **cut}


def flattened(batch: dict) -> dict[str, Tensor]:
    """The completions of all groups as rows `(P·M, ...)` of one forward pass."""
    return {key: batch[key].flatten(0, 1) for key in PER_COMPLETION if key in batch}


def without_eos(output: dict, eos_token_ids: list[int]) -> Tensor:
    """`(B,)`: completions that were cut before they ended."""
    mask_BT = output["completion_mask"]
    last_B1 = (mask_BT.sum(1, keepdim=True) - 1).clamp(min=0)
    last_B = output["completion_ids"].gather(1, last_B1).squeeze(1)
    return ~torch.isin(last_B, torch.tensor(eos_token_ids, device=last_B.device))


def recorded_tool_mask(rows: list[dict[str, Any]], mask_BT: Tensor, G: int) -> Tensor:
    """`(B, T)`: 0 on tokens that a tool wrote in the recorded run, 1 on the policy's."""
    tool_BT = torch.ones_like(mask_BT)
    for i, row in enumerate(rows):
        told = row["tool_mask"][i % G]
        tool_BT[i, : len(told)] = torch.tensor(told, device=mask_BT.device)
    return tool_BT


def record_rows(batch: dict) -> Iterator[dict[str, Any]]:
    """One JSON-able row per group, in the order of training: what a replay needs."""
    selected = [
        key for key in batch if key not in (*PER_COMPLETION, "prompt", "rewards", "ref_logp")
    ]
    for p, prompt in enumerate(batch["prompt"]):
        width = batch["prompt_mask"][p, 0].bool()
        row = {
            "prompt": prompt,
            "prompt_ids": batch["prompt_ids"][p, 0][width].tolist(),
            "version": batch["version"][p].tolist(),
            "rewards": batch["rewards"][p].tolist(),
        }
        lengths = batch["completion_mask"][p].sum(-1).tolist()
        for key in ("completion_ids", "tool_mask", "old_logp"):
            if key in batch:
                row[key] = [batch[key][p, m, :n].tolist() for m, n in enumerate(lengths)]
        yield row | {f"selected_{key}": batch[key][p].tolist() for key in selected}
