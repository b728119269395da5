"""Two measures of retrieval in real text: passkey, and multi-query associative recall.

Perplexity can stay low beyond the training length while nothing far away is found again, so a
long-context figure without them says little. Both hide facts in a document and ask for them at its
end, and both are read off one forward pass: a model that has every answer as its first choice,
given the tokens before, writes the answers when it decodes greedily.

The facts are symbols, tokens that no text has, so that how hard they are to learn does not depend
on the text or its tokenizer: more symbols are harder, and guesses are rarer.

Passkey: Mohtashami and Jaggi, arXiv:2305.16300. Recall: Arora et al., arXiv:2312.04927.
"""

import random
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

PAIRS = 4  # facts of a recall document
ROUNDS = 6  # how often a document to learn from asks for each of them
IGNORED = -100  # a label that is not learned
Row = dict[str, list[int]]


def add_symbols(tokenizer: PreTrainedTokenizerBase, count: int) -> None:
    """Gives the tokenizer `count` tokens for keys and values.

    Raises:
        ValueError: too few for the pairs of a document, which all differ.
    """
    if count < 2 * PAIRS:
        raise ValueError(
            f"symbols={count} are too few for {PAIRS} pairs that differ: use {2 * PAIRS} or more."
        )
    tokenizer.add_tokens([symbol(index) for index in range(count)], special_tokens=True)


def symbols_of(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of the tokens of `add_symbols`, none if it was not called."""
    vocabulary, found = tokenizer.get_vocab(), []
    while symbol(len(found)) in vocabulary:
        found.append(vocabulary[symbol(len(found))])
    return found


def symbol(index: int) -> str:
    return f"<symbol {index}>"


def passkey(
    haystack: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    symbols: Sequence[int],
    draw: random.Random,
    rounds: int = 1,
) -> Row:
    """A symbol in a sentence, hidden at a uniformly drawn depth, and asked for at the end.

    Args:
        haystack: token ids; as many as the document shall have, of which the last are dropped.
        tokenizer: writes the sentences.
        symbols: from `symbols_of`.
        draw: random state.
        rounds: without effect: one question is enough to learn from.

    Returns:
        `input_ids`, and `labels` that hold the answer alone.
    """

    def written(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    key = draw.choice(symbols)
    needle = [*written("\nThe pass key is "), key, *written(". Remember it.\n")]
    question = written("\nThe pass key is ")
    room = len(haystack) - len(needle) - len(question) - 1
    check_room(room, len(haystack), "a passkey")
    depth = draw.randint(0, room)
    asked = [*haystack[:depth], *needle, *haystack[depth:room], *question]
    return {"input_ids": [*asked, key], "labels": [IGNORED] * len(asked) + [key]}


def recall(
    haystack: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    symbols: Sequence[int],
    draw: random.Random,
    rounds: int = 1,
) -> Row:
    """Pairs of a key and a value, strewn over the text; then the value of every key is asked for.

    Arguments and result as of `passkey`. Keys are symbols of the first half, values of the second;
    each of the `rounds` asks for all keys, in an order of its own.
    """
    room = len(haystack) - 2 * PAIRS * (1 + rounds)
    check_room(room, len(haystack), f"{PAIRS} pairs and {rounds * PAIRS} questions")
    half = len(symbols) // 2
    keys, values = draw.sample(symbols[:half], PAIRS), draw.sample(symbols[half:], PAIRS)
    pairs = list(zip(keys, values, strict=True))
    document: list[int] = []
    start = 0
    for pair, depth in zip(pairs, sorted(draw.choices(range(room + 1), k=PAIRS)), strict=True):
        document += [*haystack[start:depth], *pair]
        start = depth
    document += haystack[start:room]
    labels = [IGNORED] * len(document)
    for _ in range(rounds):
        for key, value in draw.sample(pairs, PAIRS):
            document += [key, value]
            labels += [IGNORED, value]
    return {"input_ids": document, "labels": labels}


def check_room(room: int, length: int, fact: str) -> None:
    if room < 0:
        raise ValueError(
            f"length={length} tokens have no room for {fact}: {-room} more are needed."
        )


TASKS = {"passkey": passkey, "recall": recall}
TAUGHT = {"passkey": 1, "recall": 2}  # parts of what is taught: recall is the harder one


def mixed_in(segments: Any, tokenizer: PreTrainedTokenizerBase, share: float, seed: int = 0) -> Any:
    """Turns a share of the segments into retrieval documents of the same length; adds `labels`.

    Segment by segment it is drawn whether it is turned, and for which task. Of such a document only
    the answers are learned: the facts are noise, and the text is no text any more.

    Raises:
        ValueError: `share` is no share, or the tokenizer has no symbols to hide.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"retrieval_share={share} is no share: use a number from 0 to 1.")
    symbols = symbols_of(tokenizer)
    if share and not symbols:
        raise ValueError(
            f"retrieval_share={share} needs a tokenizer with symbols, and this one has none: start "
            "from a model that was trained by this recipe, or set retrieval_share to 0."
        )

    def turned(row: Row, index: int) -> Row:
        draw = random.Random(f"{seed} {index}")
        if draw.random() >= share:
            return {"input_ids": row["input_ids"], "labels": list(row["input_ids"])}
        (name,) = draw.choices(list(TAUGHT), TAUGHT.values())
        return TASKS[name](row["input_ids"], tokenizer, symbols, draw, ROUNDS)

    return segments.map(turned, with_indices=True)
