"""Evaluates a policy by sampling: many completions per prompt, each scored by reward functions.

Prompts are worked off in chunks whose composition and seed depend on nothing but the arguments.
Processes share out whole chunks, so that any number of them draws the same completions.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import extract_model_from_parallel, gather_object, parse_flag_from_env
from datasets import Dataset
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from trl_ext.evals import sampling, scoring
from trl_ext.evals.options import EvaluationOptions
from trl_ext.evals.result import EvaluationResult
from trl_ext.evals.scoring import RewardFunc


def evaluate_generations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    reward_funcs: RewardFunc | Sequence[RewardFunc],
    *,
    trainer_state: Any = None,
    **options: Any,
) -> EvaluationResult:
    """Samples several completions per prompt and scores them.

    The result depends on the arguments alone, `batch_size` included, and not on the number of
    processes. Random states and the model's training mode are left as they were found.

    Args:
        model: causal language model, with or without an adapter or a DDP wrapper.
        tokenizer: its tokenizer; prompts are padded on the left whatever its padding side.
        dataset: a column `prompt` of strings or of message lists, which get the chat template;
            all further columns go to the reward functions.
        reward_funcs: functions by TRL's contract, plain or asynchronous; their weighted sum is the
            reward. A completion for which all return `None` or NaN is unscorable: it counts
            neither as right nor as wrong.
        trainer_state: handed to the reward functions.
        options: fields of [`EvaluationOptions`].

    Returns:
        The scored completions, whose `metrics()` gives the numbers.

    Raises:
        ValueError: an argument out of range, or a model sharded by FSDP or ZeRO-3.
    """
    checked = EvaluationOptions(**options)
    model = whole_model(model)
    funcs = scoring.checked_reward_funcs(reward_funcs)
    chunks = _Chunks(
        model,
        tokenizer,
        sampling.generation_config(model, tokenizer, checked.sampling),
        funcs,
        scoring.checked_weights(checked.reward_weights, funcs),
        checked,
        trainer_state,
    )
    return _assemble(chunks.all_rows(_first_prompts(dataset, checked.max_prompts)), checked)


@dataclass(frozen=True)
class _Row:
    """One scored completion, small enough to send to every process."""

    prompt: int
    reward: float
    length: int
    truncated: bool
    answer: Hashable | None


@dataclass(frozen=True)
class _Chunks:
    """Turns chunks of prompts into scored completions.

    A chunk holds whole groups, because a reward function may compare the completions of a prompt.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    config: GenerationConfig
    reward_funcs: list[RewardFunc]
    reward_weights: list[float]
    options: EvaluationOptions
    trainer_state: Any

    def all_rows(self, dataset: Dataset) -> list[_Row]:
        """Completions of the whole dataset, sampled by all processes together."""
        state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
        size = max(1, self.options.batch_size // self.options.num_generations)
        mine = range(state.process_index * size, len(dataset), state.num_processes * size)
        silent = self.options.disable_tqdm or not state.is_main_process
        device = next(self.model.parameters()).device
        rows = []
        with sampling.evaluation_mode(self.model), sampling.own_random_state(device):
            for start in tqdm(mine, "Sampling", disable=silent, leave=False):
                sampling.seed_everything(device, self.options.seed, start)
                rows += self.rows(start, dataset[start : start + size])
        return gather_object(rows)

    def rows(self, start: int, columns: dict[str, list[Any]]) -> list[_Row]:
        """Completions of the prompts in `columns`, the first of which is number `start`."""
        G, extractor = self.options.num_generations, self.options.extractor
        repeated = {name: [x for x in column for _ in range(G)] for name, column in columns.items()}
        prompts = repeated.pop("prompt")
        completions = self.completions(columns["prompt"])
        ids = [completion.token_ids for completion in completions]
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        rewards = scoring.score(
            self.reward_funcs,
            self.reward_weights,
            prompts,
            [_as_message(p, text) for p, text in zip(prompts, texts, strict=True)],
            ids,
            {k: v for k, v in repeated.items() if k not in ("completion", "completion_ids")},
            self.trainer_state,
        )
        return [
            _Row(
                prompt=start + i // G,
                reward=rewards[i],
                length=len(ids[i]),
                truncated=completions[i].truncated,
                answer=scoring.extract(extractor, texts[i]),
            )
            for i in range(len(prompts))
        ]

    def completions(self, prompts: list[sampling.Prompt]) -> list[sampling.Completion]:
        """`num_generations` completions per prompt, at most `batch_size` at once."""
        template, size = self.options.chat_template_kwargs or {}, self.options.batch_size
        prompt_ids = []
        for prompt in prompts:
            ids = sampling.tokenize_prompt(self.tokenizer, prompt, template)
            prompt_ids += [ids] * self.options.num_generations
        completions = []
        for i in range(0, len(prompt_ids), size):
            completions += sampling.sample(self.model, prompt_ids[i : i + size], self.config)
        return completions


def _as_message(prompt: sampling.Prompt, text: str) -> str | list[dict[str, str]]:
    """A completion in the form of its prompt, as TRL's trainers give it to reward functions."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def _assemble(rows: list[_Row], options: EvaluationOptions) -> EvaluationResult:
    """Puts the rows of all processes back into the dataset's order; the sort is stable."""
    rows, G = sorted(rows, key=lambda row: row.prompt), options.num_generations
    groups = [rows[i : i + G] for i in range(0, len(rows), G)]
    answers = [[row.answer for row in group] for group in groups]
    return EvaluationResult(
        rewards_PG=torch.tensor([[r.reward for r in g] for g in groups], dtype=torch.float64),
        labels_PG=scoring.label_answers(answers) if options.extractor else None,
        lengths_PG=torch.tensor([[r.length for r in g] for g in groups]),
        truncated_PG=torch.tensor([[r.truncated for r in g] for g in groups]),
        ks=options.k_values,
        success_threshold=options.success_threshold,
        unparsable=options.unparsable,
    )


def whole_model(model: PreTrainedModel) -> PreTrainedModel:
    """The model under its wrappers; refuses one whose weights are spread over processes."""
    modules = list(model.modules())
    if any(isinstance(module, (FSDPModule, FullyShardedDataParallel)) for module in modules):
        sharding = "FSDP"
    elif any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        sharding = "DeepSpeed ZeRO-3"
    else:
        return extract_model_from_parallel(model)
    raise ValueError(
        f"model is sharded by {sharding}: each process samples its own prompts, which needs all "
        "weights in each process. Train with DDP or ZeRO-2, or save a checkpoint and call "
        "evaluate_generations on it in a script of its own."
    )


def _first_prompts(dataset: Dataset, max_prompts: int | None) -> Dataset:
    if not isinstance(dataset, Dataset):
        raise ValueError(
            f"dataset is a {type(dataset).__name__}: every process must be able to pick its "
            "prompts by number. Give a datasets.Dataset (`Dataset.from_list(list(rows))`)."
        )
    if "prompt" not in dataset.column_names or len(dataset) == 0:
        raise ValueError(
            f"dataset has {len(dataset)} rows and columns {dataset.column_names}: nothing to "
            "sample from. Give at least one row and a column 'prompt'."
        )
    return dataset if max_prompts is None else dataset.take(min(max_prompts, len(dataset)))
