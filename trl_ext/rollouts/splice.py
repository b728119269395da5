"""A reference answer in the place of the one that was sampled, in token space.

The thought's tokens are those that were sampled, never its text tokenised anew: the policy would be
scored on tokens it did not choose. The thought ends with the first token that completes the marker,
which makes it a sample of the policy that stops there.
"""

import bisect
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor


def thought_length(token_ids: Sequence[int], tokenizer: Any, marker: str) -> int | None:
    """Number of tokens up to and with the one that completes the marker; None without one.

    A token that runs on into letters or digits does not complete it: a thought that ends so would
    hold the beginning of the sampled answer, or of another word, as in "is" and "isn't".

    Args:
        token_ids: a sampled completion without padding.
        tokenizer: of the policy.
        marker: text; the empty one ends the thought before its first token.
    """
    if not marker:
        return 0

    def markers(n: int) -> int:
        return _decoded(tokenizer, token_ids[:n]).count(marker)

    for k in range(1, markers(len(token_ids)) + 1):
        n = bisect.bisect_left(range(len(token_ids) + 1), k, key=markers)
        behind = _decoded(tokenizer, token_ids[:n]).rpartition(marker)[2]
        if not any(map(str.isalnum, behind)):
            return n
    return None


def check_marker(tokenizer: Any, marker: str, prefix: str) -> None:
    """Refuses a marker that no completion can have, and a prefix that would be written twice.

    Args:
        tokenizer: of the policy.
        marker: text behind which the answer stands; empty for no thought.
        prefix: text between marker and answer.

    Raises:
        ValueError: the tokenizer does not give the marker back, joins it with what follows, or adds
            a space of its own.
    """
    if not isinstance(marker, str):
        raise ValueError(
            f"marker={marker!r} is no text. Give the text that announces the answer, or '' for "
            "answers without a thought."
        )
    if not marker:
        return
    ids = _tokens(tokenizer, marker)
    if thought_length(ids, tokenizer, marker) is None:
        raise ValueError(
            f"marker={marker!r} is {_decoded(tokenizer, ids)!r} once tokenised and decoded: no "
            "completion could ever have it. Choose a marker that the tokenizer gives back."
        )
    for answer in ("x", "1"):
        _check_joint(tokenizer, marker, prefix, answer)


def _check_joint(tokenizer: Any, marker: str, prefix: str, answer: str) -> None:
    """Marker, prefix and answer, written in one go and in two."""
    whole = _tokens(tokenizer, marker + prefix + answer)
    known = marker in _decoded(tokenizer, whole)  # one token per word may not know these
    if known and thought_length(whole, tokenizer, marker) is None:
        raise ValueError(
            f"marker={marker!r} with answer_prefix={prefix!r}: the tokenizer joins the marker's "
            f"end with the answer {answer!r}, so that no thought could end between them. Let the "
            "marker end without white space, and the prefix begin with it."
        )
    halves = _tokens(tokenizer, marker) + _tokens(tokenizer, prefix + answer)
    written = _decoded(tokenizer, halves).partition(marker)[2]
    if prefix and _leading_spaces(written) > _leading_spaces(prefix):
        raise ValueError(
            f"answer_prefix={prefix!r}: the tokenizer adds a space of its own, so that "
            f"{marker + written!r} would stand where {marker + prefix + answer!r} should. Set "
            "answer_prefix=''."
        )


def check_context(lengths: Iterable[int], model: Any, what: str) -> None:
    """Refuses rows longer than the model's context, of which it could say nothing.

    Args:
        lengths: tokens of each row, prompt included.
        model: the policy; one without a limit takes any length.
        what: what a row consists of.

    Raises:
        ValueError: a row is too long.
    """
    room = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(lengths, default=0)
    if room is not None and longest > room:
        raise ValueError(
            f"{what} of one row have {longest} tokens together, and the model's "
            f"max_position_embeddings={room}. Leave such rows out of the dataset, or shorten them."
        )


def end_of_answer(tokenizer: Any, prompt: Any) -> int:
    """The token with which a policy ends: in a conversation that of its chat template's turns.

    Gemma's turns, for one, end in `<end_of_turn>` and not in the tokenizer's `eos_token`.

    Args:
        tokenizer: of the policy.
        prompt: a text, or a list of messages.
    """
    if not isinstance(prompt, str):
        said = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "42"}]
        written = tokenizer.apply_chat_template(said, tokenize=False)
        behind = _tokens(tokenizer, written.rpartition("42")[2])[:1]
        specials = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        if behind and behind[0] in specials:
            return behind[0]
    return tokenizer.eos_token_id


def answer_token_ids(
    tokenizer: Any, row: dict[str, Any], prefix: str, end: int | None
) -> list[int]:
    """Tokens of the reference answer of a row of the dataset, at least one.

    Args:
        tokenizer: of the policy.
        row: with the answer as a text in its column `answer`.
        prefix: text between marker and answer, tokenised with the answer.
        end: token that belongs to the answer as its last; None for no such token.

    Raises:
        ValueError: the row has no text in its column `answer`, or nothing but white space.
    """
    text = row.get("answer")
    if not isinstance(text, str) or not text.strip():
        raise ValueError(
            f"the dataset's column 'answer' holds {text!r}, columns {sorted(row)}: the reference "
            "answer is needed as a text that is not empty. Fill it in, or leave the row out."
        )
    ids = _tokens(tokenizer, prefix + text)
    return ids if end is None else [*ids, end]


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
    """What is known of each sampled token, for those that stayed; NaN on the answers, `(B, T')`.

    Args:
        values_BT: `(B, T)`.
        lengths: as in `with_answers`.
        width: T'.
    """
    kept = values_BT.new_full((values_BT.size(0), width), math.nan)
    for row, (values, length) in enumerate(zip(values_BT, lengths, strict=True)):
        n = min(values.numel(), width) if length is None else length
        kept[row, :n] = values[:n]
    return kept


def _tokens(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _decoded(tokenizer: Any, token_ids: Sequence[int]) -> str:
    return tokenizer.decode(token_ids, clean_up_tokenization_spaces=False)


def _leading_spaces(text: str) -> int:
    return len(text) - len(text.lstrip())
