"""Samples completions token for token as TRL does, without touching anybody's random state."""

import contextlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from trl_ext.completions import tokenize_prompt

Prompt = str | list[dict[str, Any]]

# Either one completion per row and its end would no longer be known, or two sources would disagree.
RESERVED = {
    "bos_token_id",
    "disable_compile",
    "eos_token_id",
    "max_length",
    "num_return_sequences",
    "pad_token_id",
    "return_dict_in_generate",
}


# Filters that a model may bring in its own generation config, switched off.
UNFILTERED = {"min_p": 0.0, "typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0}


@dataclass(frozen=True)
class Completion:
    """Sampled tokens up to and including the first end of sequence."""

    token_ids: list[int]
    truncated: bool


def tokenize_prompts(
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[Prompt],
    chat_template_kwargs: dict[str, Any] | None,
    *,
    repeat: int = 1,
) -> list[list[int]]:
    """Token ids of each prompt, `repeat` times in a row."""
    ids = [tokenize_prompt(tokenizer, prompt, chat_template_kwargs) for prompt in prompts]
    return [row for row in ids for _ in range(repeat)]


def end_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends a completion: those the model declares and the tokenizer's own."""
    declared: Any = model.generation_config.eos_token_id
    declared = [declared] if isinstance(declared, int) else list(declared or [])
    own: Any = tokenizer.eos_token_id
    return declared if own is None or own in declared else [own, *declared]


def generation_config(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, options: dict[str, Any]
) -> GenerationConfig:
    """Sampling options with the special tokens of model and tokenizer.

    A temperature of 0 means greedy decoding. The options that change a distribution are stated
    even at their neutral value, since `generate` fills open ones from the model's own defaults.
    """
    unknown = sorted(set(options) - (set(GenerationConfig().to_dict()) - RESERVED))
    if unknown:
        raise ValueError(
            f"generation_kwargs contains {unknown}: either transformers.GenerationConfig has no "
            "such field, or the evaluation sets it itself (num_generations, the tokenizer's "
            "special tokens). Remove it."
        )
    ends = end_token_ids(model, tokenizer)
    if not ends:
        raise ValueError(
            "tokenizer has eos_token=None and the model declares no end either: no completion "
            "could end. Set tokenizer.eos_token."
        )
    if options["temperature"] == 0:
        options = {**options, "do_sample": False, "temperature": 1.0}
    pad = tokenizer.pad_token_id
    return GenerationConfig(
        **{"do_sample": True, "num_beams": 1, "repetition_penalty": 1.0, **options},
        pad_token_id=ends[0] if pad is None else pad,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=ends,
        disable_compile=True,
    )


def sample(model: Any, prompt_ids: list[list[int]], config: GenerationConfig) -> list[Completion]:
    """One completion per prompt, in one padded batch, from the global random state."""
    device = next(model.parameters()).device
    input_ids, attention_mask = pad_left(prompt_ids, config.pad_token_id)
    with torch.no_grad():
        sequences = model.generate(
            input_ids=input_ids.to(device),
            attention_mask=attention_mask.to(device),
            generation_config=config,
        )
    ends = set(config.eos_token_id)
    return [_until_end(row, ends) for row in sequences[:, input_ids.size(1) :].tolist()]


def sample_all(
    model: Any, prompt_ids: list[list[int]], config: GenerationConfig, batch_size: int
) -> list[Completion]:
    """One completion per prompt, at most `batch_size` at once."""
    completions = []
    for i in range(0, len(prompt_ids), batch_size):
        completions += sample(model, prompt_ids[i : i + batch_size], config)
    return completions


def as_message(prompt: Prompt, text: str) -> str | list[dict[str, str]]:
    """A completion in the form of its prompt, as TRL's trainers give it to reward functions."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def pad_left(prompt_ids: list[list[int]], pad_token_id: int) -> tuple[Tensor, Tensor]:
    """Token ids and mask, both `(B, longest)`, with the padding before the prompt."""
    width = max(map(len, prompt_ids))
    ids = [[pad_token_id] * (width - len(row)) + row for row in prompt_ids]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in prompt_ids]
    return torch.tensor(ids), torch.tensor(mask)


def _until_end(row: list[int], ends: set[int]) -> Completion:
    for position, token in enumerate(row):
        if token in ends:
            return Completion(row[: position + 1], truncated=False)
    return Completion(row, truncated=True)


@contextlib.contextmanager
def own_random_state(device: torch.device) -> Iterator[None]:
    """Gives Python, numpy and torch their random states back as they were found."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    accelerators = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(accelerators, device_type=device.type):
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


def seed_everything(device: torch.device, *entropy: int) -> None:
    """Seeds the generators that sampling on `device` and reward functions draw from.

    `torch.manual_seed` would also seed accelerators that `own_random_state` did not save.
    """
    seed = int(np.random.SeedSequence(entropy).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        state = torch.Generator(device).manual_seed(seed).get_state()
        torch.get_device_module(device).set_rng_state(state, device)
