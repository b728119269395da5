"""Where the steps of a completion begin, in tokens, and which of them several rows have in common.

A step begins at a token, so that the prefix in front of it is a slice of the sampled ids: text that
is tokenised again need not give the tokens that the policy was in the middle of. And whether a step
begins at a token is settled by the tokens before it. A baseline that depends on such a start would
otherwise depend on the action it is a baseline of; that is why short steps and too many steps are
merged looking back, and why the splitters here decide nothing from the text behind a boundary.
"""

import re
from bisect import bisect_right
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from transformers import PreTrainedTokenizerBase

# Text to the positions of characters at which a step may begin.
Splitter = Callable[[str], Sequence[int]]

UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # how bytes look that are not a whole character yet

# A sentence has ended only when white space follows: 3.14 has not. Chinese and Japanese need none.
_MARKS = re.compile(
    r"(?P<escaped>\\[\\$])"
    r"|(?P<math>\$\$|\$(?=\S)|\\\[|\\\(|\\begin\{[^{}\n]*\})"
    r"|(?P<end>[.!?][\"'”’)\]]*\s|[。！？]|\n)"
)
_BLANK_LINE = r"\n[^\S\n]*\n"
_CLOSERS = {
    "$": r"(?<=[^\s\\])\$(?!\d)|\n",  # so that $5 and $6 are prices
    "$$": rf"\$\$|{_BLANK_LINE}",
    "\\(": r"\\\)|\n",
    "\\[": rf"\\\]|{_BLANK_LINE}",
}


def split_lines(text: str) -> list[int]:
    """Ends each line that is not blank, as VinePPO splits GSM8K.

    Args:
        text: a completion, or its beginning.

    Returns:
        Positions behind line breaks, ascending; those of a beginning are a beginning of those of
        the whole.
    """
    return _with_content(text, [match.end() for match in re.finditer("\n", text)])


def split_sentences(text: str) -> list[int]:
    """Ends lines and sentences, but nothing inside of LaTeX, as VinePPO splits MATH.

    Protected are $…$ and \\(…\\) to the end of a line at most, and $$…$$, \\[…\\] and
    environments up to a blank line.

    Args:
        text: a completion, or its beginning.

    Returns:
        Positions behind the white space that ends a sentence, as in `split_lines`. A tokenizer
        joins that space to the next word, which then still belongs to the sentence: only from it
        can one tell that the full stop was none of 3.14.
    """
    ends, position = [], 0
    while match := _MARKS.search(text, position):
        position = match.end()
        if match["math"]:
            position = _end_of_math(text, match["math"], position)
        elif match["end"]:
            ends.append(position)
    return _with_content(text, ends)


def step_starts(
    tokenizer: PreTrainedTokenizerBase,
    completion_ids: Sequence[int],
    splitter: Splitter = split_lines,
    *,
    min_tokens: int = 1,
    most_steps: int | None = None,
    ended: bool = False,
) -> list[int]:
    """First token of each step of a completion.

    A boundary in the text starts a step at the first token that begins at or behind it, at a whole
    character; whether that token has a text is not asked, for it is the action.

    Args:
        tokenizer: only decodes.
        completion_ids: `T` tokens as they were sampled.
        splitter: `split_lines`, `split_sentences`, or a function from the decoded text to
            positions in it. Unless it decides on each from the text before it alone, advantages of
            steps are biased.
        min_tokens: a boundary that comes before a step has so many tokens is passed over.
        most_steps: boundaries behind that many steps are passed over; None: no limit.
        ended: one more token follows, whatever its text: the end of sequence.

    Returns:
        Ascending positions in [0, T), with `ended` in [0, T], the first of them 0; empty if there
        is no token at all.

    Raises:
        ValueError: an option below 1, or what the splitter returns is no position in the text.
    """
    for name, value in (("min_tokens", min_tokens), ("most_steps", most_steps)):
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} leaves no step. Give at least 1.")
    text, offsets = _offsets(tokenizer, completion_ids)
    cuts = _checked(splitter(text), text)
    tokens = len(completion_ids) + ended
    starts: list[int] = [0] if tokens else []
    seen = 0
    for token, offset in enumerate(offsets[:tokens]):
        passed = bisect_right(cuts, offset, lo=seen)
        long_enough = passed > seen and token - starts[-1] >= min_tokens
        seen = passed
        if long_enough and (most_steps is None or len(starts) < most_steps):
            starts.append(token)
    return starts


def token_steps(starts: Sequence[int], length: int) -> list[int]:
    """Step of each token, numbered from 0.

    Args:
        starts: from `step_starts`.
        length: T, tokens of the completion.

    Returns:
        `T` numbers, those of a step one after another.
    """
    return [bisect_right(starts, token) - 1 for token in range(length)]


@dataclass(frozen=True)
class Prefix:
    """Beginning of a completion: `completion_ids[row][:length]`, behind the row's prompt."""

    row: int
    length: int


def shared_prefixes(
    groups: Sequence[Hashable],
    completion_ids: Sequence[Sequence[int]],
    starts: Sequence[Sequence[int]],
) -> tuple[list[Prefix], list[list[int]]]:
    """Lists each prefix in front of a step once, however many rows begin with it.

    Args:
        groups: `B` labels; rows of one label have prompt and reference answer in common, and only
            these share prefixes.
        completion_ids: `B` completions.
        starts: `B` lists of first tokens.

    Returns:
        The distinct prefixes, each with the first row that has it, and for each row and step the
        index of its prefix among them. The empty prefix of a group is shared by all its rows.
    """
    index: dict[tuple[Hashable, tuple[int, ...]], int] = {}
    prefixes: list[Prefix] = []
    table: list[list[int]] = []
    for row, (group, ids, of_row) in enumerate(zip(groups, completion_ids, starts, strict=True)):
        table.append([])
        for start in of_row:
            found = index.setdefault((group, tuple(ids[:start])), len(prefixes))
            if found == len(prefixes):
                prefixes.append(Prefix(row, start))
            table[-1].append(found)
    return prefixes, table


def _with_content(text: str, ends: list[int]) -> list[int]:
    """Passes over the end of a piece without anything but white space, which joins the next."""
    kept = [0]
    for end in ends:
        if text[kept[-1] : end].strip():
            kept.append(end)
    return kept[1:]


def _end_of_math(text: str, opener: str, position: int) -> int:
    """Where to read on behind a formula; a line break that cut it off is read again."""
    closer = _CLOSERS.get(opener)
    if closer is None:
        closer = re.escape(opener.replace("begin", "end", 1)) + f"|{_BLANK_LINE}"
    match = re.compile(closer).search(text, position)
    if match is None:
        return len(text)
    return match.end() - match[0].endswith("\n")


def _offsets(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> tuple[str, list[int]]:
    """Decoded text, and how much of it the tokens before each token, and all of them, make.

    What they leave unfinished does not count, so that no boundary is met inside of a character.
    Each token is decoded behind the one before it: alone, some decoders would drop its space.
    """

    def decode(begin: int, end: int) -> str:
        text: Any = tokenizer.decode(
            list(ids[begin:end]), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text

    text, offsets = "", []
    before = whole = 0  # tokens before `whole` make whole characters
    shown = behind = ""
    for token in range(len(ids)):
        offsets.append(len(text))
        behind = decode(before, token + 1)[len(shown) :]
        if behind.endswith(UNFINISHED):
            continue
        if behind:
            before = whole
        text, behind, whole = text + behind, "", token + 1
        shown = decode(before, whole)
    return text + behind, [*offsets, len(text)]


def _checked(cuts: Any, text: str) -> list[int]:
    wanted = "Return positions of characters, from 0 to len(text)."
    if not isinstance(cuts, Iterable):
        raise ValueError(f"splitter: it returned {cuts!r}. {wanted}")
    found = set(cuts)
    for cut in found:
        if not isinstance(cut, Integral) or not 0 <= int(cut) <= len(text):
            raise ValueError(
                f"splitter: position {cut!r} lies outside a text of {len(text)} characters. "
                f"{wanted}"
            )
    return sorted(found)
