"""A reference answer in the place of the one that was sampled, in token space.

The thought's tokens are those that were sampled, never its text tokenised anew: the policy would be
scored on tokens it did not choose. The thought ends with the first token that completes the marker,
which makes it a sample of the policy that stops there.
"""

import bisect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def thought_length(token_ids: Sequence[int], tokenizer: Any, marker: str) -> int | None:
    """Number of tokens up to and with the one that completes the marker; None without one.

    Args:
        token_ids: a sampled completion without padding.
        tokenizer: of the policy.
        marker: text; the empty one ends the thought before its first token.
    """

    def complete(n: int) -> bool:
        return marker in tokenizer.decode(token_ids[:n], clean_up_tokenization_spaces=False)

    if not complete(len(token_ids)):
        return None
    return bisect.bisect_left(range(len(token_ids) + 1), True, key=complete)


def answer_token_ids(tokenizer: Any, row: dict[str, Any], prefix: str, eos: bool) -> list[int]:
    """Tokens of the reference answer of a row of the dataset.

    Args:
        tokenizer: of the policy.
        row: with the answer as a text in its column `answer`.
        prefix: text between marker and answer, tokenised with the answer.
        eos: whether the end of sequence belongs to the answer.

    Raises:
        ValueError: the row has no text in its column `answer`.
    """
    if not isinstance(row.get("answer"), str):
        raise ValueError(
            f"the dataset's column 'answer' holds {row.get('answer')!r}, columns {sorted(row)}: "
            "the reference answer is needed as a text."
        )
    ids = tokenizer(prefix + row["answer"], add_special_tokens=False)["input_ids"]
    return [*ids, tokenizer.eos_token_id] if eos else ids


def with_answers(
    completion_ids_BT: Tensor,
    completion_mask_BT: Tensor,
    lengths: Sequence[int | None],
    answers: Sequence[Sequence[int]],
    pad_token_id: int,
) -> dict[str, Tensor]:
    """Thoughts with the reference answers behind them.

    Args:
        completion_ids_BT, completion_mask_BT: `(B, T)`, as they were sampled, right-padded.
        lengths: of each row's thought; None leaves the row as it was sampled, without an answer.
        answers: token ids of each row's reference answer.
        pad_token_id: for the room that is left.

    Returns:
        `completion_ids`, `completion_mask` and `answer_mask`, `(B, T')`; the last is 1 on the
        reference answer's tokens.
    """
    rows, marks = [], []
    for ids, mask, length, answer in zip(
        completion_ids_BT, completion_mask_BT, lengths, answers, strict=True
    ):
        thought = ids[mask.bool()] if length is None else ids[:length]
        behind = [] if length is None else list(answer)
        rows.append(torch.cat([thought, ids.new_tensor(behind)]))
        marks.append(ids.new_tensor([0] * len(thought) + [1] * len(behind)))
    widths = torch.tensor([len(row) for row in rows], device=completion_ids_BT.device)
    columns = torch.arange(int(widths.max()), device=completion_ids_BT.device)
    pad = torch.nn.utils.rnn.pad_sequence
    return {
        "completion_ids": pad(rows, batch_first=True, padding_value=pad_token_id),
        "completion_mask": (columns < widths[:, None]).to(completion_mask_BT.dtype),
        "answer_mask": pad(marks, batch_first=True).to(completion_mask_BT.dtype),
    }


def cut(values_BT: Tensor, lengths: Sequence[int | None], width: int) -> Tensor:
    """What is known of each sampled token, for the tokens that stayed; 0 on the answers, `(B, T')`.

    Args:
        values_BT: `(B, T)`.
        lengths: as in `with_answers`.
        width: T'.
    """
    kept = values_BT.new_zeros(values_BT.size(0), width)
    for row, (values, length) in enumerate(zip(values_BT, lengths, strict=True)):
        n = min(values.numel(), width) if length is None else length
        kept[row, :n] = values[:n]
    return kept
