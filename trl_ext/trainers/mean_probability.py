"""RLPR's reward: how probable the policy itself finds the reference answer behind its thought.

It takes the place of a verifier in every trainer that has reward functions. It is no plain
function, because it asks the policy: trl_ext's trainers attach it, to one of TRL's one does so by
hand. Dropped: RLPR's filter of prompts whose rewards hardly differ.

Source: arXiv:2506.18254.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, Trainer

from trl_ext.completions import Message, tokenize_prompt
from trl_ext.modes import evaluation_mode
from trl_ext.objectives.jepo import mean_probability_reward
from trl_ext.rollouts import sampled_logps
from trl_ext.rollouts.splice import (
    answer_token_ids,
    check_context,
    check_marker,
    end_of_answer,
    thought_length,
)


class MeanProbabilityReward:
    """Rewards a thought by the mean probability of the reference answer's tokens behind it.

    r = clip(1/|a*| Σₜ π(a*ₜ|x, c, a*₍<t₎) − b, 0, 1),   b the same mean behind the bare marker

    π is the policy of now, at temperature 1 and without dropout; no gradient enters the reward. The
    thought c is cut behind the first token that completes the marker, and the answer, from the
    dataset's column `answer`, is tokenised on its own, as in `JEPOTrainer`.

    Args:
        marker: text that ends the thought and announces the answer, not empty. A completion without
            it earns 0.
        answer_prefix: text between marker and answer, tokenised with the answer.
        answer_eos: whether the end of sequence counts as a token of the answer.
        debias: subtract b; without it a thought is paid for what the prompt alone tells.
        batch_size: rows in the model at once; default the trainer's `per_device_train_batch_size`.

    Raises:
        ValueError: an empty marker; on attaching, a second trainer, a sharded model, a processor of
            images, or a marker that its tokenizer does not give back; on call, an answer that is no
            text, or one that is longer than the model's context.

    Example:

    ```python
    reward = MeanProbabilityReward(marker="the final answer is")
    trainer = GRPOTrainer(model, reward_funcs=reward, args=args, train_dataset=with_answers)
    ```

    Source: arXiv:2506.18254.
    """

    __name__ = "mean_probability_reward"

    def __init__(
        self,
        marker: str = "the final answer is",
        *,
        answer_prefix: str = " ",
        answer_eos: bool = False,
        debias: bool = True,
        batch_size: int | None = None,
    ):
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size={batch_size} would score nothing. Give at least 1.")
        if not marker:
            raise ValueError(
                f"marker={marker!r} leaves no thought: all completions of a prompt would earn the "
                "same. Give the text that announces the answer."
            )
        self.marker, self.answer_prefix, self.answer_eos = marker, answer_prefix, answer_eos
        self.debias, self.batch_size = debias, batch_size
        self.trainer: Any = None

    def attach(self, trainer: Trainer) -> None:
        """Takes policy and tokenizer from `trainer`; trl_ext's trainers call this themselves."""
        if self.trainer is not None and self.trainer is not trainer:
            raise ValueError(
                "this MeanProbabilityReward is attached to another trainer, whose policy it asks. "
                "Make one per trainer."
            )
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            raise ValueError(
                "MeanProbabilityReward is not supported with FSDP or DeepSpeed: processes score "
                "different numbers of answers, and a sharded model would wait for the others. Use "
                "DDP."
            )
        if not isinstance(trainer.processing_class, PreTrainedTokenizerBase):
            raise ValueError(
                f"processing_class is a {type(trainer.processing_class).__name__}: "
                "MeanProbabilityReward reads text alone. Use a model with a tokenizer."
            )
        check_marker(trainer.processing_class, self.marker, self.answer_prefix)
        self.trainer = trainer

    def __call__(
        self,
        prompts: Sequence[str | Sequence[Message]],
        completion_ids: Sequence[Sequence[int]],
        answer: Sequence[str | None] | None = None,
        **kwargs: Any,
    ) -> list[float | None]:
        """Scores `B` completions.

        Args:
            prompts: `B` strings or conversations.
            completion_ids: `B` lists of sampled tokens.
            answer: `B` reference answers.
            **kwargs: other columns and TRL's extras, unused.

        Returns:
            `B` rewards in [0, 1]; 0 without the marker, None where the answer is None or empty.
        """
        if self.trainer is None:
            raise ValueError(
                "MeanProbabilityReward is attached to no trainer, whose policy it could ask. Call "
                "reward.attach(trainer) before training; trl_ext's trainers do so themselves."
            )
        if answer is None:
            raise ValueError(
                "the dataset has no column 'answer', whose texts MeanProbabilityReward scores: got "
                f"{sorted(kwargs)}. Add the reference answers under this name."
            )
        tokenizer = self.trainer.processing_class
        end = end_of_answer(tokenizer, prompts[0]) if self.answer_eos else None
        answers = [self._answer_ids(text, end) for text in answer]
        rewards: list[float | None] = [0.0 if ids else None for ids in answers]
        thoughts = [self._thought(ids) for ids in completion_ids]
        marked = {i: c for i, c in enumerate(thoughts) if c is not None and answers[i]}
        if marked:
            questions = [self._prompt_ids(prompts[i]) for i in marked]
            told = [answers[i] for i in marked]
            contexts = [q + c for q, c in zip(questions, marked.values(), strict=True)]
            baseline_B = self._bare(questions, told) if self.debias else 0.0
            earned_B = mean_probability_reward(*self._scored(contexts, told), baseline_B)
            for i, reward in zip(marked, earned_B.tolist(), strict=True):
                rewards[i] = reward
        return rewards

    def _answer_ids(self, text: str | None, end: int | None) -> list[int]:
        if text is None or (isinstance(text, str) and not text.strip()):
            return []
        tokenizer, row = self.trainer.processing_class, {"answer": text}
        return answer_token_ids(tokenizer, row, self.answer_prefix, end)

    def _thought(self, token_ids: Sequence[int]) -> list[int] | None:
        n = thought_length(token_ids, self.trainer.processing_class, self.marker)
        return None if n is None else list(token_ids)[:n]

    def _prompt_ids(self, prompt: str | Sequence[Message]) -> list[int]:
        template = getattr(self.trainer.args, "chat_template_kwargs", None)
        return tokenize_prompt(self.trainer.processing_class, prompt, template)

    def _bare(self, questions: list[list[int]], answers: list[list[int]]) -> Tensor:
        """`(B,)`, the mean probability of each answer behind the bare marker."""
        rows = [(tuple(q), tuple(a)) for q, a in zip(questions, answers, strict=True)]
        place = {row: i for i, row in enumerate(dict.fromkeys(rows))}  # a group asks but once
        marker = self.trainer.processing_class(self.marker, add_special_tokens=False)["input_ids"]
        contexts = [[*question, *marker] for question, _ in place]
        mean_P = mean_probability_reward(*self._scored(contexts, [list(a) for _, a in place]))
        return mean_P[[place[row] for row in rows]]

    def _scored(self, contexts: list[list[int]], answers: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the answers' tokens, `(B, T)`, and their mask."""
        policy = self.trainer.accelerator.unwrap_model(self.trainer.model)
        rows = self.batch_size or self.trainer.args.per_device_train_batch_size
        lengths = [len(c) + len(a) for c, a in zip(contexts, answers, strict=True)]
        check_context(lengths, policy, "prompt, thought and reference answer")
        with evaluation_mode(policy):
            logps = [torch.tensor(r) for r in sampled_logps(policy, contexts, answers, 1.0, rows)]
        pad = torch.nn.utils.rnn.pad_sequence
        masks = [torch.ones_like(row) for row in logps]
        return pad(logps, batch_first=True), pad(masks, batch_first=True)
