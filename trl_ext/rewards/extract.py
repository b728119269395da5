"""Finds the answer in a text. Also fit for `MajorityVoteConfig.answer_extractor`."""

import re

# An escaped character is one token, so that `\{` and `\}` are never taken for braces.
_TOKEN = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)
_NUMBER = re.compile(r"(?:(?<![\w)])-)?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?")


def last_boxed(text: str) -> str | None:
    r"""Gives the content of the last `\boxed{…}`, stripped; of closed boxes, the one opened last.

    Braces balance as in LaTeX; a box that never closes is no box. Time is linear in the length.

    Returns:
        The content, which may be empty, or None without a box.
    """
    starts: list[int | None] = []  # of each open brace: where a box's content starts, else None
    last: tuple[int, int] | None = None
    for token in _TOKEN.finditer(text):
        if token[0].endswith("{") and token[0] != r"\{":
            starts.append(token.end() if token[0] != "{" else None)
        elif token[0] == "}" and starts:
            start = starts.pop()
            if start is not None and (last is None or start > last[0]):
                last = (start, token.start())
    return text[slice(*last)].strip() if last else None


def last_number(text: str) -> str | None:
    """Gives the last decimal number, without thousands separators, or None."""
    numbers = _NUMBER.findall(text)
    return numbers[-1].replace(",", "") if numbers else None
