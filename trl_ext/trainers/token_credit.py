"""What a credit of tokens may look at, and what it says: this process's rows of one round."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from trl_ext.rollouts import refuse_branching_options
from trl_ext.trainers.group_rows import Metrics

Ids = list[list[int]]
# Names in `generation_kwargs`: of transformers and vLLM; of vLLM alone, for transformers' own are
# refused where a cache is branched.
LENGTHS = ("max_new_tokens", "max_tokens")
OF_NEW_TOKENS = ("min_tokens", "presence_penalty", "frequency_penalty", "structured_outputs")


@dataclass(frozen=True)
class Round:
    """The completions of a round, scored, before they are shuffled.

    `continued(prefix_ids, max_new_tokens, K)` samples K continuations of each prefix, lists of
    token ids, as the completions were sampled and with the weights of now. `rewarded(places,
    completion_ids)` is what the reward functions say, `(n,)`, of other completions to the prompts
    of the rows at these places; NaN where unscorable.

    Args:
        rows: `B` rows of the dataset.
        labels: `B`; rows of one label are alike but for what was sampled.
        prompt_ids: `B` prompts.
        completion_ids: `B` completions; empty where the loss does not look at one.
        rewards_B: NaN where unscorable.
        mask_BT: nonzero on the tokens of the loss.
    """

    rows: list[dict[str, Any]]
    labels: list[Hashable]
    prompt_ids: Ids
    completion_ids: Ids
    rewards_B: Tensor
    mask_BT: Tensor
    continued: Callable[[Ids, list[int], int], list[Ids]]
    rewarded: Callable[[list[int], Ids], Tensor]


@dataclass(frozen=True)
class TokenCredit:
    """Credit of each token, and what is told of it.

    Args:
        credit_BT: takes the place of the advantages.
        metrics: name to values and their weights.
        columns: of the completions table, `B` entries each, JSON-able.
    """

    credit_BT: Tensor
    metrics: Metrics
    columns: dict[str, list]


def refuse_what_branching_lacks(trainer: Any, *, sees_images: bool) -> None:
    """A continuation is token ids behind token ids, and its process samples it alone."""
    refused = {
        "tools": (trainer.tools, "a tool would have to be as it was in the middle of an answer"),
        "environment_factory": (
            trainer.environment_factories,
            "an environment cannot be put back to where a step began",
        ),
        "a vision-language model": (sees_images, "prefixes are token ids only"),
        "use_transformers_continuous_batching=True": (
            trainer.use_transformers_continuous_batching,
            "its cache cannot be branched. Set it to False",
        ),
        "FSDP or DeepSpeed without vLLM": (
            trainer.sharded and not trainer.use_vllm,
            "processes have different numbers of prefixes, and none holds all weights. Set "
            "use_vllm=True, or use DDP",
        ),
        "use_vllm=True with schedule='one_step'": (
            trainer.use_vllm and trainer.args.schedule == "one_step",
            "the server samples the next round with older weights. Use schedule='sync'",
        ),
    }
    for what, (given, reason) in refused.items():
        if given:
            raise ValueError(f"{type(trainer).__name__} does not support {what}: {reason}.")
    _refuse_own_options(trainer)
    if not trainer.use_vllm:
        policy = trainer.accelerator.unwrap_model(trainer.model)
        refuse_branching_options(trainer.generation_config, policy)


def _refuse_own_options(trainer: Any) -> None:
    """Options in `generation_kwargs` that mean one thing at a prompt and another at a prefix."""
    refused = dict.fromkeys(LENGTHS, "a rollout has what max_completion_length leaves. Set that")
    if trainer.use_vllm:
        refused |= dict.fromkeys(
            OF_NEW_TOKENS, "it would begin anew at each step of a completion. Leave it out"
        )
    for name, value in (trainer.args.generation_kwargs or {}).items():
        if name in refused and value:
            raise ValueError(
                f"{type(trainer).__name__} does not support {name}={value!r} in "
                f"generation_kwargs: {refused[name]}."
            )
