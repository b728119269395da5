"""Evaluates a policy by sampling: many completions per prompt, each scored by reward functions."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from trl_ext.evals import sampling, scoring
from trl_ext.evals.options import EvaluationOptions
from trl_ext.evals.result import EvaluationResult
from trl_ext.evals.scoring import RewardFunc
from trl_ext.evals.shares import first_rows, rows_of_all_processes, whole_model


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
    return _assemble(chunks.all_rows(first_rows(dataset, checked.max_prompts)), checked)


@dataclass(frozen=True)
class _Row:
    """One scored completion, small enough to send to every process."""

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
        return rows_of_all_processes(
            self.rows,
            dataset,
            self.model,
            size=max(1, self.options.batch_size // self.options.num_generations),
            seed=[self.options.seed],
            title="Sampling",
            disable_tqdm=self.options.disable_tqdm,
        )

    def rows(self, _: int, columns: dict[str, list[Any]]) -> list[_Row]:
        """Completions of the prompts in `columns`."""
        G, extractor = self.options.num_generations, self.options.extractor
        repeated = {name: [x for x in column for _ in range(G)] for name, column in columns.items()}
        prompts = repeated.pop("prompt")
        prompt_ids = sampling.tokenize_prompts(
            self.tokenizer, columns["prompt"], self.options.chat_template_kwargs, repeat=G
        )
        completions = sampling.sample_all(
            self.model, prompt_ids, self.config, self.options.batch_size
        )
        ids = [completion.token_ids for completion in completions]
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        rewards = scoring.score(
            self.reward_funcs,
            self.reward_weights,
            prompts,
            [sampling.as_message(p, text) for p, text in zip(prompts, texts, strict=True)],
            ids,
            {k: v for k, v in repeated.items() if k not in ("completion", "completion_ids")},
            self.trainer_state,
        )
        return [
            _Row(
                reward=rewards[i],
                length=len(ids[i]),
                truncated=completions[i].truncated,
                answer=scoring.extract(extractor, texts[i]),
            )
            for i in range(len(prompts))
        ]


def _assemble(rows: list[_Row], options: EvaluationOptions) -> EvaluationResult:
    """Groups the rows, which come in the dataset's order."""
    G = options.num_generations
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
