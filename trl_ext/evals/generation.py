"""Evaluates a policy by sampling: many completions per prompt, each scored by reward functions."""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from trl_ext.evals import sampling, scoring
from trl_ext.evals.answers import answer_logps
from trl_ext.evals.options import EvaluationOptions
from trl_ext.evals.result import EvaluationResult
from trl_ext.evals.scoring import RewardFunc
from trl_ext.evals.shares import first_rows, rows_of_all_processes, whole_model
from trl_ext.rollouts.splice import check_marker, end_of_answer


def evaluate_generations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    reward_funcs: RewardFunc | Sequence[RewardFunc] | None,
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
            all further columns go to the reward functions. With a `marker` also a column `answer`.
        reward_funcs: functions by TRL's contract, plain or asynchronous; their weighted sum is the
            reward. A completion for which all return `None` or NaN is unscorable: it counts
            neither as right nor as wrong. `None` with a `marker`: nothing is judged, and only the
            bounds on the answer's likelihood are reported.
        trainer_state: handed to the reward functions.
        options: fields of [`EvaluationOptions`].

    Returns:
        The scored completions, whose `metrics()` gives the numbers.

    Raises:
        ValueError: an argument out of range, a marker that the tokenizer does not give back, or a
            model sharded by FSDP or ZeRO-3.
    """
    checked = EvaluationOptions(**options)
    if checked.marker is not None:
        check_marker(tokenizer, checked.marker, checked.answer_prefix)
    model = whole_model(model)
    funcs = _checked_funcs(reward_funcs, checked)
    chunks = _Chunks(
        model,
        tokenizer,
        sampling.generation_config(model, tokenizer, _sampling(checked)),
        funcs,
        scoring.checked_weights(checked.reward_weights, funcs),
        checked,
        trainer_state,
    )
    columns = ("prompt",) if checked.marker is None else ("prompt", "answer")
    rows = chunks.all_rows(first_rows(dataset, checked.max_prompts, columns))
    return _assemble(rows, checked, judged=bool(funcs))


def _checked_funcs(
    reward_funcs: RewardFunc | Sequence[RewardFunc] | None, options: EvaluationOptions
) -> list[RewardFunc]:
    if reward_funcs is not None:
        return scoring.checked_reward_funcs(reward_funcs)
    if options.marker is None:
        raise ValueError(
            "reward_funcs=None with marker=None leaves nothing to judge completions by. Give at "
            "least one function, or the marker behind which a completion gives its answer."
        )
    return []


def _sampling(options: EvaluationOptions) -> dict[str, Any]:
    """A bound is of the policy itself, whatever filters the model brings in its own config."""
    unfiltered = {} if options.marker is None else sampling.UNFILTERED
    return {**unfiltered, **options.sampling}


@dataclass(frozen=True)
class _Row:
    """One scored completion, small enough to send to every process."""

    reward: float
    length: int
    truncated: bool
    answer: Hashable | None
    reference_logp: float


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
        reference_logps = self.reference_logps(prompt_ids, ids, repeated, columns["prompt"][0])
        return [
            _Row(
                reward=rewards[i],
                length=len(ids[i]),
                truncated=completions[i].truncated,
                answer=scoring.extract(extractor, texts[i]),
                reference_logp=reference_logps[i],
            )
            for i in range(len(prompts))
        ]

    def reference_logps(
        self,
        prompt_ids: list[list[int]],
        ids: list[list[int]],
        columns: dict[str, list[Any]],
        prompt: Any,
    ) -> list[float]:
        """log π(reference answer | prompt, thought); NaN where none is asked for."""
        if self.options.marker is None:
            return [math.nan] * len(ids)
        rows = list(zip(prompt_ids, ids, strict=True))
        end = end_of_answer(self.tokenizer, prompt) if self.options.answer_eos else None
        return answer_logps(self.model, self.tokenizer, rows, columns["answer"], self.options, end)


def _assemble(rows: list[_Row], options: EvaluationOptions, *, judged: bool) -> EvaluationResult:
    """Groups the rows, which come in the dataset's order."""
    G = options.num_generations
    groups = [rows[i : i + G] for i in range(0, len(rows), G)]
    answers = [[row.answer for row in group] for group in groups]
    rewards = [[row.reward for row in group] for group in groups]
    reference_logps = [[row.reference_logp for row in group] for group in groups]
    bounded = options.marker is not None
    return EvaluationResult(
        rewards_PG=torch.tensor(rewards, dtype=torch.float64) if judged else None,
        labels_PG=scoring.label_answers(answers) if options.extractor else None,
        lengths_PG=torch.tensor([[r.length for r in g] for g in groups]),
        truncated_PG=torch.tensor([[r.truncated for r in g] for g in groups]),
        ks=options.k_values,
        success_threshold=options.success_threshold,
        unparsable=options.unparsable,
        answer_logp_PG=torch.tensor(reference_logps, dtype=torch.float64) if bounded else None,
    )
