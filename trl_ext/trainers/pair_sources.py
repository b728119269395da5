"""Where completions come from, if not from sampling: a dataset, or the record of a run."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from trl_ext.completions import completion_token_ids
from trl_ext.objectives.pair_rules import Pairs
from trl_ext.trainers.group_rows import Selection

Rows = Sequence[dict[str, Any]]  # rows of the dataset, one per completion, groups in a row


def given_completions(
    source: str, rows: Rows, prompt_ids: list, G: int, tokenizer: Any, template: dict[str, Any]
) -> list[list[int] | None] | None:
    """Token ids of the completions that the dataset holds, None where one is to be sampled.

    Args:
        source: `pair_source`.
        rows: of the dataset, one per completion.
        prompt_ids: their prompts' token ids.
        G: completions per prompt; the first two are the dataset's `chosen` and `rejected`.
        tokenizer: of the policy.
        template: further arguments of the chat template.

    Raises:
        ValueError: the dataset lacks a column, or is a record with other groups.
    """
    if source == "online":
        return None
    if source == "replay":
        return recorded_pairs(rows, G)
    given: list[list[int] | None] = []
    for i, (row, ids) in enumerate(zip(rows, prompt_ids, strict=True)):
        column = {0: "chosen", 1: "rejected"}.get(i % G)
        if column is None:
            given.append(None)
            continue
        if column not in row:
            raise ValueError(
                f"train_dataset has no column {column!r}: pair_source={source!r} needs prompt, "
                f"chosen and rejected, got {sorted(row)}."
            )
        given.append(completion_token_ids(tokenizer, row["prompt"], row[column], ids, template))
    return given


def recorded_pairs(rows: Rows, G: int) -> list[list[int] | None]:
    """Token ids that a run recorded, if it compared pairs.

    Raises:
        ValueError: it is no record, one without pairs, or one with other groups.
    """
    if "completion_ids" in rows[0] and "selected_chosen" not in rows[0]:
        raise ValueError(
            "train_dataset is the record of a run without pairs, as of a policy gradient: it says "
            "not who was chosen. Record a run whose loss compares pairs."
        )
    return recorded_completions(rows, G)


def recorded_completions(rows: Rows, G: int) -> list[list[int] | None]:
    """Token ids that a run recorded.

    Raises:
        ValueError: it is no record, or one with other groups.
    """
    if "completion_ids" not in rows[0]:
        raise ValueError(
            "train_dataset is no record: 'replay' reads what a run with record_path wrote, see "
            f"trl_ext.data.load_record; got columns {sorted(rows[0])}."
        )
    recorded = len(rows[0]["completion_ids"])
    if recorded != G:
        raise ValueError(
            f"num_generations={G}: the record holds {recorded} completions per prompt, those that "
            f"were trained on. Set num_generations={recorded} and scale the batch size likewise."
        )
    return [list(row["completion_ids"][i % G]) for i, row in enumerate(rows)]


def listed_completions(
    rows: Rows,
    prompt_ids: list,
    G: int,
    tokenizer: Any,
    template: dict[str, Any],
    *,
    everyone: bool,
) -> list[list[int] | None]:
    """Token ids of the column `responses`, None where the list has ended and one is sampled.

    Args:
        rows, prompt_ids, G, tokenizer, template: as in `given_completions`.
        everyone: the list must fill the group.

    Raises:
        ValueError: there is no such column, or a list is too long, or too short for `everyone`.
    """
    given: list[list[int] | None] = []
    for i, (row, ids) in enumerate(zip(rows, prompt_ids, strict=True)):
        listed, place = _listed(row, "responses", G, everyone=everyone), i % G
        completion = listed[place] if place < len(listed) else None
        given.append(
            None
            if completion is None
            else completion_token_ids(tokenizer, row["prompt"], completion, ids, template)
        )
    return given


def listed_scores(rows: Rows, G: int) -> list[float | None]:
    """The column `scores`, one number per completion; None or NaN where there is none.

    Raises:
        ValueError: there is no such column, or its lists do not fill the groups.
    """
    return [_listed(row, "scores", G, everyone=True)[i % G] for i, row in enumerate(rows)]


def listed_logps(rows: Rows, G: int) -> Tensor:
    """The column `logps`: each completion's log π under the policy that wrote it, `(P, G)`, nats.

    Raises:
        ValueError: there is no such column, its lists do not fill the groups, or a value is none.
    """
    logps = [_listed(row, "logps", G, everyone=True)[i % G] for i, row in enumerate(rows)]
    for logp, row in zip(logps, rows, strict=True):
        if logp is None or not logp <= 0:
            raise ValueError(
                f"'logps' holds {logp} for the prompt {str(row['prompt'])[:60]!r}: give log π of "
                "each whole completion in nats, at most 0, under the policy that wrote it."
            )
    return torch.tensor(logps).view(-1, G)


def _listed(row: dict[str, Any], column: str, G: int, *, everyone: bool) -> list:
    if column not in row:
        raise ValueError(
            f"train_dataset has no column {column!r}, a list per prompt: got {sorted(row)}."
        )
    n = len(row[column])
    if n > G or (everyone and n < G):
        raise ValueError(
            f"{column!r} lists {n} for the prompt {str(row['prompt'])[:60]!r} with num_generations="
            f"{G}: list {G} per prompt" + ("." if everyone else " at most; the rest is sampled.")
        )
    return row[column]


def given_scores(source: str, rows: Rows, G: int) -> list[float | None]:
    """1 for `chosen`, 0 for all others; the recorded rewards; empty where samples are scored."""
    if source == "online":
        return []
    if source == "replay":
        return [row["rewards"][i % G] for i, row in enumerate(rows)]
    return [float(i % G == 0) for i in range(len(rows))]


def recorded_selection(rows: Rows, rewards_PG: Tensor) -> Selection:
    """The pairs that the recorded run made, as they stood in its batches."""
    (P, G), device = rewards_PG.shape, rewards_PG.device
    groups, prefix = rows[::G], "selected_"
    stored = {
        key.removeprefix(prefix): torch.tensor([row[key] for row in groups], device=device)
        for key in groups[0]
        if key.startswith(prefix)
    }
    index_PG = torch.arange(G, device=device).expand(P, G)
    return Selection(index_PG, stored, torch.zeros_like(rewards_PG))


def selection_of(pairs: Pairs, G: int, *, everyone: bool) -> Selection:
    """Keeps the completions of a group's pair, or `everyone` where pairs share completions."""
    stored = {
        "chosen": pairs.chosen_PN,
        "rejected": pairs.rejected_PN,
        "weight": pairs.weight_PN,
        "label": pairs.label_PN,
    }
    index_PM = torch.arange(G, device=pairs.chosen_PN.device).expand(pairs.chosen_PN.size(0), G)
    role_PG = torch.zeros(index_PM.shape, device=index_PM.device, dtype=pairs.weight_PN.dtype)
    role_PG = role_PG.scatter_add(1, pairs.chosen_PN, pairs.weight_PN)
    role_PG = role_PG.scatter_add(1, pairs.rejected_PN, -pairs.weight_PN)
    if not everyone:
        index_PM = torch.cat([pairs.chosen_PN, pairs.rejected_PN], dim=1)
        stored["chosen"] = torch.zeros_like(pairs.chosen_PN)
        stored["rejected"] = torch.ones_like(pairs.rejected_PN)
    return Selection(index_PM, stored, role_PG)
