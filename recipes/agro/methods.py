"""What is compared: each method as a trainer, and everything but the method the same.

| method     | completions    | what it makes of them                                          |
|------------|----------------|----------------------------------------------------------------|
| `agro`     | the fixed data | `AGROTrainer(data_source="offline")`                           |
| `grpo`     | the fixed data | TRL's GRPO as if they were its own: no ratio, KL in the loss   |
| `grpo_old` | the fixed data | the same, with the clipped ratio to the policy that wrote them |
| `dpo`      | the fixed data | DPO: of one prompt each right story against each wrong one     |
| `topr`     | the fixed data | TOPR: right is +1; wrong is −1, and fades; no KL               |
| `agro_on`  | samples        | `AGROTrainer`                                                  |
| `grpo_on`  | samples        | TRL's GRPO, KL in the loss                                     |
| `rloo_on`  | samples        | TRL's RLOO, KL in the reward                                   |

GRPO is without the group's deviation and without a length normaliser ("Dr. GRPO"): what is left is
the policy gradient of the reward. Without a ratio its KL term has the gradient of k2.
"""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import trl
from datasets import Dataset
from world import MOST_TOKENS, World, load_policy, right

from trl_ext import AGROConfig, AGROTrainer, OnlineDPOConfig, OnlineDPOTrainer
from trl_ext.completions import completion_token_ids
from trl_ext.studies import cpu_arguments

OFFLINE = ("agro", "grpo", "grpo_old", "dpo", "topr")
ONLINE = ("agro_on", "grpo_on", "rloo_on")
BETA = 0.1


def make_trainer(
    world: World, method: str, rate: float, *, seed: int, folder: Path, steps: int
) -> Any:
    """The trainer of a method: the same policy, batch, steps and schedule for all."""
    G, P = world.size.completions, world.size.prompts
    passes = max(1, steps * P // len(world.scored))
    common: dict[str, Any] = {
        **cpu_arguments(folder, seed),
        "max_steps": steps,
        "learning_rate": rate,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": P * G,
        "num_generations": G,
        "max_completion_length": MOST_TOKENS,
        "beta": BETA,
    }
    return BUILDERS[method](world, common, passes)


def agro(world: World, common: dict[str, Any], passes: int) -> Any:
    return AGROTrainer(
        model=load_policy(world),
        reward_funcs=None,
        args=AGROConfig(**common, data_source="offline"),
        train_dataset=world.scored,
        processing_class=world.tokenizer,
    )


def topr(world: World, common: dict[str, Any], passes: int) -> Any:
    signed = [[2 * score - 1 for score in row] for row in world.scored["scores"]]
    data = world.scored.remove_columns("scores").add_column("scores", signed)
    return AGROTrainer(
        model=load_policy(world),
        reward_funcs=None,
        args=AGROConfig(**common | {"beta": 0.0}, data_source="offline", loss_type="topr"),
        train_dataset=data,
        processing_class=world.tokenizer,
    )


def grpo(world: World, common: dict[str, Any], passes: int, **own: Any) -> Any:
    return trl.GRPOTrainer(
        model=load_policy(world),
        reward_funcs=right,
        args=trl.GRPOConfig(**common, loss_type="dr_grpo", scale_rewards="none", **own),
        train_dataset=world.scored,
        processing_class=world.tokenizer,
        rollout_func=fixed_completions(world),
    )


def grpo_old(world: World, common: dict[str, Any], passes: int) -> Any:
    """One round holds all of the data: its old policy is the one of step 0, which wrote them."""
    steps = common["max_steps"] // passes
    return grpo(world, common, passes, steps_per_generation=steps, num_iterations=passes)


def fixed_completions(world: World) -> Callable[[list[str], Any], dict[str, Any]]:
    """A `rollout_func` that hands out a prompt's recorded completions in their order."""
    texts = dict(zip(world.scored["prompt"], world.scored["responses"], strict=True))

    def rollout(prompts: list[str], trainer: Any) -> dict[str, Any]:
        G, tokenizer = trainer.num_generations, world.tokenizer
        prompt_ids: list[list[int]] = tokenizer(list(prompts)).input_ids
        completion_ids = [
            completion_token_ids(tokenizer, prompt, texts[prompt][row % G], ids)
            for row, (prompt, ids) in enumerate(zip(prompts, prompt_ids, strict=True))
        ]
        return {"prompt_ids": prompt_ids, "completion_ids": completion_ids, "logprobs": None}

    return rollout


def dpo(world: World, common: dict[str, Any], passes: int) -> Any:
    """As many completions per step as for the others; prompts without a pair give none."""
    pairs, wanted = pairs_of(world.scored), common["per_device_train_batch_size"] // 2
    if len(pairs) < wanted:
        raise ValueError(
            f"scored={len(world.scored)} prompts give {len(pairs)} pairs of a right and a wrong "
            f"story, fewer than the {wanted} of one step: score more prompts or lengthen SFT."
        )
    return OnlineDPOTrainer(
        model=load_policy(world),
        reward_funcs=None,
        args=OnlineDPOConfig(**common | {"num_generations": 2}, pair_source="offline"),
        train_dataset=pairs,
        processing_class=world.tokenizer,
    )


def pairs_of(scored: Dataset) -> Dataset:
    """Each right story against each wrong one of the same prompt."""
    rows = []
    for row in scored:
        judged = list(zip(row["responses"], row["scores"], strict=True))
        for chosen, rejected in itertools.product(judged, repeat=2):
            if chosen[1] > rejected[1]:
                rows.append((row["prompt"], chosen[0], rejected[0]))
    names = ("prompt", "chosen", "rejected")
    return Dataset.from_list([dict(zip(names, row, strict=True)) for row in rows])


def on_policy(world: World, common: dict[str, Any], trainer: type, config: type, **own) -> Any:
    return trainer(
        model=load_policy(world),
        reward_funcs=right,
        args=config(**common, **own),
        train_dataset=world.prompts["train"],
        processing_class=world.tokenizer,
    )


BUILDERS: dict[str, Callable[[World, dict[str, Any], int], Any]] = {
    "agro": agro,
    "grpo": grpo,
    "grpo_old": grpo_old,
    "dpo": dpo,
    "topr": topr,
    "agro_on": lambda w, c, _: on_policy(w, c, AGROTrainer, AGROConfig),
    "grpo_on": lambda w, c, _: on_policy(
        w, c, trl.GRPOTrainer, trl.GRPOConfig, loss_type="dr_grpo", scale_rewards="none"
    ),
    "rloo_on": lambda w, c, _: on_policy(w, c, trl.RLOOTrainer, trl.RLOOConfig),
}
