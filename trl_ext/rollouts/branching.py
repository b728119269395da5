"""Several continuations of each of many prefixes, with one prefill per prefix.

Prefixes of like length are prefilled together, all but their last token; the cache's rows are then
repeated, and decoding goes on from the last token as if each row had been prefilled on its own.
Rows that have ended are dropped every few tokens, and their cache with them. The law of each row is
that of `model.generate` on its prefix: neighbours, padding and dropped rows do not enter it.

A `DynamicCache` that counts its tokens can be branched, sliding windows and recurrent states too. A
model without one, as Mamba, and one whose cache has rows of its own, as MiniMax, start from the
whole prefix: rightly, not as fast.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import (
    Cache,
    DynamicCache,
    GenerationConfig,
    StoppingCriteria,
    StoppingCriteriaList,
)

from trl_ext.rollouts._inputs import accepted, device_of, pad_left, positions
from trl_ext.rollouts._roomy import take_rows
from trl_ext.rollouts.sampling import refuse_options, until_end

STRIDE = 16  # tokens between two looks at who has ended: each costs a call of `generate`

# They count from where `generate` was called, or make of a row something else than a sample.
NEUTRAL = {
    "min_length": (None, 0),
    "min_new_tokens": (None, 0),
    "begin_suppress_tokens": (None,),
    "encoder_no_repeat_ngram_size": (None, 0),
    "encoder_repetition_penalty": (None, 1.0),
    "exponential_decay_length_penalty": (None,),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "guidance_scale": (None, 1),
    "max_time": (None,),
    "num_beams": (None, 1),
    "num_return_sequences": (None, 1),
    "stop_strings": (None,),
    "token_healing": (None, False),
    "watermarking_config": (None,),
}


@torch.no_grad()
def branch(
    model: Any,
    prefix_ids: Sequence[Sequence[int]],
    generation_config: GenerationConfig,
    *,
    branches: int,
    max_new_tokens: Sequence[int],
    eos_token_ids: Sequence[int],
    rows_per_pass: int,
) -> list[list[list[int]]]:
    """Samples K continuations of each prefix, each up to and including its first end of sequence.

    Args:
        model: a causal language model, bare of wrappers, in the mode (training or not) it shall
            sample in.
        prefix_ids: `N` prompts with the beginnings of their completions, at least one token each.
        generation_config: as TRL builds it, with `pad_token_id`; its `max_new_tokens` is not read.
            What it leaves open is as the model's own `generation_config` says.
        branches: K ≥ 1.
        max_new_tokens: `N` budgets, each at least 1.
        eos_token_ids: each of them ends a continuation, as do those of `generation_config`.
        rows_per_pass: continuations that are decoded at once; K of one prefix at the least.

    Returns:
        `N` lists of K lists of token ids, drawn from the global random state of the model's device.

    Raises:
        ValueError: an empty prefix or budget, or a generation option whose meaning depends on where
            a completion began.
    """
    _check(prefix_ids, max_new_tokens, branches)
    refuse_branching_options(generation_config, model)
    config, ends = _in_strides(generation_config), _ends(generation_config, eos_token_ids)
    found: list[list[list[int]]] = [[] for _ in prefix_ids]
    lengths = list(zip(map(len, prefix_ids), max_new_tokens, strict=True))
    by_length = sorted(range(len(lengths)), key=lengths.__getitem__)
    per_pass = max(1, rows_per_pass // branches)
    for begin in range(0, len(by_length), per_pass):
        chosen = by_length[begin : begin + per_pass]
        budgets = [max_new_tokens[i] for i in chosen for _ in range(branches)]
        with _any_cache(model):
            rows = _continuations(model, [prefix_ids[i] for i in chosen], budgets, config, ends)
        for place, i in enumerate(chosen):
            found[i] = rows[place * branches : (place + 1) * branches]
    return found


def refuse_branching_options(config: GenerationConfig, model: Any = None) -> None:
    """Refuses options under which a continuation would not be the rest of a completion.

    Args:
        config: options of the completions.
        model: whose own `generation_config` says what `config` leaves open.

    Raises:
        ValueError: such an option is set.
    """
    reason = "where completions are continued: it would begin anew there"
    refuse_options(config, NEUTRAL, reason)
    own = getattr(model, "generation_config", None)
    if own is not None:
        both = copy.deepcopy(config)
        both.update(**own.to_dict(), defaults_only=True)
        refuse_options(both, NEUTRAL, f"in the model's generation_config {reason}")


def _check(prefix_ids: Sequence, max_new_tokens: Sequence[int], branches: int) -> None:
    smallest = {
        "branches": branches,
        "max_new_tokens": min(max_new_tokens, default=1),
        "the length of prefix_ids": min(map(len, prefix_ids), default=1),
    }
    for name, value in smallest.items():
        if value < 1:
            raise ValueError(f"{name} is {value}: nothing can be continued. Give at least 1.")


def _in_strides(config: GenerationConfig) -> GenerationConfig:
    config = copy.deepcopy(config)
    config.update(return_dict_in_generate=True, use_cache=True, max_length=None)
    config.cache_implementation = None  # a static cache is as wide as it was built
    return config


def _ends(config: GenerationConfig, eos_token_ids: Sequence[int]) -> set[int]:
    own = config.eos_token_id
    return {*eos_token_ids, *([own] if isinstance(own, int) else own or [])}


@contextmanager
def _any_cache(model: Any) -> Iterator[None]:
    """Else `generate` takes no cache where the model's own options name another kind."""
    own: Any = getattr(model, "generation_config", None)
    kind = getattr(own, "cache_implementation", None)
    if kind is None:
        yield
        return
    own.cache_implementation = None
    try:
        yield
    finally:
        own.cache_implementation = kind


def _continuations(
    model: Any,
    prefixes: Sequence[Sequence[int]],
    budgets: list[int],
    config: GenerationConfig,
    ends: set[int],
) -> list[list[int]]:
    """One continuation per budget; equally many, one after another, of each prefix."""
    padded = pad_left(prefixes, config.pad_token_id)
    ids, mask = (x.to(device_of(model)) for x in padded)
    cache = _prefilled(model, ids[:, :-1], mask[:, :-1])
    places = [i for i in range(len(prefixes)) for _ in range(len(budgets) // len(prefixes))]
    found: list[list[int]] = [[] for _ in budgets]
    growing, left = list(range(len(budgets))), list(budgets)
    while growing:
        ids, mask, cache = _rows(places, ids, mask, cache)
        width = ids.size(1)
        ids, mask, cache = _grown(model, ids, mask, cache, [left[row] for row in growing], config)
        places = []
        for place, (row, tokens) in enumerate(zip(growing, ids[:, width:].tolist(), strict=True)):
            tokens = until_end(tokens[: left[row]], ends)
            found[row] += tokens
            left[row] -= len(tokens)
            if left[row] and tokens[-1] not in ends:
                places.append(place)
        growing = [growing[place] for place in places]
    return found


def _prefilled(model: Any, ids: Tensor, mask: Tensor) -> Cache | None:
    """The cache behind these tokens; None where there are none, or no cache."""
    if ids.size(1) == 0:
        return None
    options = accepted(model, position_ids=positions(mask), logits_to_keep=1)
    told = model(input_ids=ids, attention_mask=mask, use_cache=True, **options)
    return _cache_of(told)


def _cache_of(told: Any) -> Cache | None:
    cache = getattr(told, "cache", None)
    try:
        # A cache of a model's own may keep rows that `take_rows` knows nothing of.
        return cache if type(cache) is DynamicCache and cache.get_seq_length() else None
    except ValueError:  # no layer counts tokens, and `generate` could not take it up
        return None


def _grown(
    model: Any,
    ids: Tensor,
    mask: Tensor,
    cache: Cache | None,
    left: list[int],
    config: GenerationConfig,
) -> tuple[Tensor, Tensor, Cache | None]:
    """Some tokens more on each row, pads behind its end; and how they look to what comes next."""
    assert cache is None or cache.get_seq_length() == ids.size(1) - 1
    width, past = ids.size(1), {} if cache is None else {"cache": cache}
    config.max_new_tokens = min(STRIDE, max(left))
    told = model.generate(
        input_ids=ids,
        attention_mask=mask,
        generation_config=config,
        stopping_criteria=StoppingCriteriaList([_Budgets(width, left, ids.device)]),
        **past,
    )
    ids = told.sequences
    behind = mask.new_ones(len(mask), ids.size(1) - width)  # whoever was padded is dropped
    return ids, torch.cat([mask, behind], dim=1), _cache_of(told)


def _rows(
    index: list[int], ids: Tensor, mask: Tensor, cache: Cache | None
) -> tuple[Tensor, Tensor, Cache | None]:
    """Rows at these places, repeated or left out."""
    chosen = torch.tensor(index, device=ids.device)
    if cache is not None:
        take_rows(cache, chosen, STRIDE)
    return ids[chosen], mask[chosen], cache


class _Budgets(StoppingCriteria):
    """Ends each row at a length of its own."""

    def __init__(self, width: int, left: list[int], device: torch.device) -> None:
        self.ends_R = width + torch.tensor(left, device=device)

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return input_ids.size(1) >= self.ends_R
