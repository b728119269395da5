"""A completion in its three forms: messages, text, and the tokens that a policy would sample."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]
Completion = str | Sequence[Message]


def completion_texts(completions: Sequence[Completion]) -> list[str]:
    """Gives the text of each completion: a string itself, or its last assistant message.

    Args:
        completions: `B` strings, or `B` lists of messages. A message without a role counts
            as the assistant's; content in parts is joined. No assistant text: the empty string.

    Returns:
        `B` strings.

    Raises:
        ValueError: if a completion is neither a string nor a list of messages.
    """
    return [_text(completion) for completion in completions]


def tokenize_prompt(
    tokenizer: "PreTrainedTokenizerBase",
    prompt: str | Sequence[Message],
    chat_template_kwargs: dict[str, Any] | None = None,
) -> list[int]:
    """Gives the token ids of a prompt, rendered as TRL's trainers render it.

    Raises:
        ValueError: the prompt has no tokens.
    """
    if isinstance(prompt, str):
        encoded: Any = tokenizer(text=prompt)
    else:
        messages: Any = prompt
        encoded = tokenizer.apply_chat_template(
            messages,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            **(chat_template_kwargs or {}),
        )
    if not encoded["input_ids"]:
        raise ValueError(
            f"prompt={prompt!r} has no tokens: nothing predicts the first token of its completion. "
            "Give it a text, or the tokenizer a beginning-of-sequence token."
        )
    return encoded["input_ids"]


def completion_token_ids(
    tokenizer: "PreTrainedTokenizerBase",
    prompt: str | Sequence[Message],
    completion: Completion,
    prompt_ids: Sequence[int],
    chat_template_kwargs: dict[str, Any] | None = None,
) -> list[int]:
    """Tokenises a given completion as if the policy had sampled it, up to its end of sequence.

    A text is tokenised without special tokens and ended with EOS. Messages are what the chat
    template writes behind the rendered prompt, without the white space that some templates put
    after the last EOS: a sampled completion stops there.

    Args:
        tokenizer: with an end-of-sequence token.
        prompt: a string, or messages.
        completion: as the prompt; behind messages a string counts as the assistant's message.
        prompt_ids: tokens of the prompt, rendered with `add_generation_prompt=True`.
        chat_template_kwargs: further arguments of `apply_chat_template`, as for the prompt.

    Returns:
        At least one token id; `[EOS]` for the empty string.

    Raises:
        ValueError: a completion of another form than its prompt, no EOS, or a chat template that
            renders prompt and completion to something that does not start with the prompt's tokens:
            the policy would have been asked another question.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "tokenizer has eos_token=None: a completion would have no end. Set tokenizer.eos_token."
        )
    if isinstance(prompt, str):
        return _tokens_of_text(tokenizer, prompt, completion)
    if isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    conversation: Any = [*prompt, *completion]
    rendered: Any = tokenizer.apply_chat_template(
        conversation, tokenize=True, return_dict=True, **(chat_template_kwargs or {})
    )
    ids, start = list(rendered["input_ids"]), len(prompt_ids)
    if ids[:start] != list(prompt_ids) or len(ids) == start:
        raise ValueError(
            f"completion={_short(completion)} to prompt={_short(prompt)}: the chat template does "
            "not render prompt and completion as the prompt's own tokens followed by the "
            "completion's, so that no policy could have sampled it. Use a template whose "
            "generation prompt is a prefix of its answers, or give plain text."
        )
    return _until_last_end(tokenizer, ids[start:])


def _tokens_of_text(
    tokenizer: "PreTrainedTokenizerBase", prompt: str, completion: Completion
) -> list[int]:
    if not isinstance(completion, str):
        raise ValueError(
            f"completion={_short(completion)} is a list of messages, and its prompt "
            f"{_short(prompt)} is a string. Give both the same form."
        )
    encoded: Any = tokenizer(text=completion, add_special_tokens=False)
    end: Any = tokenizer.eos_token_id
    ids = list(encoded["input_ids"])
    return ids if ids and ids[-1] == end else [*ids, end]


def _until_last_end(tokenizer: "PreTrainedTokenizerBase", ids: list[int]) -> list[int]:
    if tokenizer.eos_token_id not in ids:
        return ids
    end = len(ids) - ids[::-1].index(tokenizer.eos_token_id)
    return ids if str(tokenizer.decode(ids[end:])).strip() else ids[:end]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _text(completion: Completion) -> str:
    if isinstance(completion, str):
        return completion
    if not isinstance(completion, Sequence):
        raise ValueError(
            f"completions holds a {type(completion).__name__}: only a string or a list of messages "
            "can be scored. Pass what TRL passes to `reward_funcs`."
        )
    for message in reversed(completion):
        if message.get("role", "assistant") == "assistant":
            return _content(message.get("content"))
    return ""


def _content(content: str | Sequence[Message] | None) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part.get("text") or "" for part in content)
