"""VinePPO: PPO whose advantages come from fresh rollouts at each step of reasoning, not a critic.

Each completion is split into steps at token boundaries. From the prefix in front of each step, K
rollouts are sampled with the weights of now and under the options of the completions themselves;
their mean reward is the prefix's value V, and a step from s to s′ earns V(s′) − V(s), the last one
r − V(s). All tokens of a step have its advantage. The clipped loss, and the KL, are those of
`GRPOTrainer`. Rollouts never enter the loss.

  - Prefixes are slices of the sampled ids. Rows of a prompt share the value of a prefix they have
    in common; a value is never shared between prompts.
  - A rollout has as many tokens as its completion had left. What one that is cut off earns, as what
    a completion that is cut off earns, is up to the reward functions; the authors give 0.
  - A step shorter than `min_step_tokens` is merged with what follows, and what would be more than
    `max_steps_per_completion` is one last step. The authors' cap gives later steps advantage 0,
    which is biased.
  - Where a completion ends right behind a boundary, its end of sequence is a step of its own, as
    any other token would be. The authors give it to the step before, which is a bias of the
    decision to end there (`eos_step=False`): see `objectives.vineppo`.
  - In evaluation nothing is branched: the loss has TRL's group-centred advantages.
  - With `schedule="one_step"` completions are those of older weights, values those of now.
  - With vLLM the prefixes are sent to the engine, whose prefix cache spares it the prefill; what
    comes back is cut at each prefix's own budget.

The gradient is unbiased from K = 1 on with `loss_type="dr_grpo"` (divided by the constant
`max_completion_length`) or `"luspo"`, and `whiten=False`.

Dropped: the authors' batch-wide whitening as a default, and their clipping of the KL to [0, 10].
Source: arXiv:2410.01679.
"""

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from trl_ext.objectives.segments import on_tokens
from trl_ext.objectives.vineppo import monte_carlo_values, step_advantages, whitened
from trl_ext.resolve import name_of, resolve
from trl_ext.rollouts.steps import (
    Prefix,
    Splitter,
    shared_prefixes,
    split_lines,
    split_sentences,
    step_starts,
    token_steps,
)
from trl_ext.trainers.base import refuse_ignored, warn_if_lengths_reweigh
from trl_ext.trainers.group_rows import Metrics
from trl_ext.trainers.grpo import GRPOConfig, GRPOTrainer
from trl_ext.trainers.token_credit import Ids, Round, TokenCredit

KAZEMNEJAD_2025 = {
    "title": "VinePPO: Refining Credit Assignment in RL Training of LLMs",
    "id": "2410.01679",
    "citation": textwrap.dedent("""\
        @inproceedings{kazemnejad2025vineppo,
            title     = {{VinePPO: Refining Credit Assignment in RL Training of LLMs}},
            author    = {Amirhossein Kazemnejad and Milad Aghajohari and Eva Portelance and
                         Alessandro Sordoni and Siva Reddy and Aaron Courville and
                         Nicolas Le Roux},
            booktitle = {International Conference on Machine Learning},
            year      = 2025,
            eprint    = {arXiv:2410.01679},
        }"""),
}
SPLITTERS: dict[str, Splitter] = {"lines": split_lines, "sentences": split_sentences}


@dataclass
class VinePPOConfig(GRPOConfig):
    """Configuration of [`VinePPOTrainer`].

    Args:
        num_rollouts: K.
        splitter: where steps may begin.
        min_step_tokens: a shorter step is merged with what follows.
        max_steps_per_completion: what would be more is merged with the last.
        eos_step: an end of sequence right behind a boundary is a step of its own.
        whiten: advantages of mean 0 and deviation 1 over the tokens of a round.
        log_values: show the values in the completions table.
        rollout_batch_size: rollouts that are decoded at once.
    """

    loss_type: str = field(
        default="dr_grpo",
        metadata={
            "help": "Normaliser of the loss; 'dr_grpo' and 'luspo' keep the policy gradient, the "
            "others reweigh completions by length (arXiv:2503.20783, section 3)."
        },
    )
    scale_rewards: str = field(
        default="none",
        metadata={
            "help": "Only 'none': advantages are differences of values (arXiv:2410.01679, "
            "section 4)."
        },
    )
    beta: float = field(
        default=1e-4, metadata={"help": "Weight of the KL (arXiv:2410.01679, appendix)."}
    )
    num_rollouts: int = field(
        default=9,
        metadata={"help": "K rollouts per step, at least 1 (arXiv:2410.01679, section 4)."},
    )
    splitter: str = field(
        default="lines",
        metadata={
            "help": "Where steps begin: 'lines', 'sentences' (LaTeX is left whole), or "
            "'module:function' from a text to positions of its characters (arXiv:2410.01679, "
            "appendix)."
        },
    )
    min_step_tokens: int = field(
        default=1,
        metadata={
            "help": "A step with fewer tokens is merged with what follows (arXiv:2410.01679, "
            "appendix)."
        },
    )
    max_steps_per_completion: int | None = field(
        default=None,
        metadata={
            "help": "Steps of which values are estimated; the last one holds all that follows. "
            "None: no limit (arXiv:2410.01679, appendix)."
        },
    )
    eos_step: bool = field(
        default=True,
        metadata={
            "help": "An end of sequence right behind a boundary is a step of its own, as any other "
            "token there is. False: it belongs to the step before, as in the authors' code; that "
            "spares a value, and is biased (arXiv:2410.01679, appendix)."
        },
    )
    whiten: bool = field(
        default=False,
        metadata={
            "help": "Advantages of mean 0 and deviation 1 over the tokens of a round, as in the "
            "authors' code; biased (arXiv:2410.01679, appendix)."
        },
    )
    log_values: bool = field(
        default=False,
        metadata={
            "help": "Adds to the completions table each completion's values along its steps, and "
            "the step that lost most (arXiv:2410.01679, section 6). Needs log_completions."
        },
    )
    rollout_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Rollouts decoded at once without vLLM; None: as many as a process has "
            "completions per round (arXiv:2410.01679, section 4)."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_ignored(self, ["scale_rewards"], "advantages are differences of values")
        refuse_ignored(
            self, ["multi_objective_aggregation"], "a value is the mean of one reward per rollout"
        )
        refuse_ignored(
            self,
            ["importance_sampling_level"],
            "one ratio per completion would give all its tokens the mean of their advantages",
        )
        refuse_ignored(
            self,
            ["vllm_structured_outputs_regex"],
            "the pattern would begin anew at each step of a completion",
        )
        self._check_counts()
        if self.log_values and not self.log_completions:
            raise ValueError(
                "log_values=True is not applied with log_completions=False: values stand in the "
                "completions table. Set log_completions=True."
            )
        self.split  # noqa: B018  a name that means nothing is refused here
        warn_if_lengths_reweigh(self, stacklevel=3)

    def _check_counts(self) -> None:
        for name, optional in (
            ("num_rollouts", False),
            ("min_step_tokens", False),
            ("max_steps_per_completion", True),
            ("rollout_batch_size", True),
        ):
            value = getattr(self, name)
            if value is None and optional:
                continue
            if type(value) is not int or value < 1:
                raise ValueError(f"{name}={value!r} is no count. Give a whole number, at least 1.")

    @property
    def split(self) -> Splitter:
        """The function that `splitter` names."""
        if not isinstance(self.splitter, str) and not callable(self.splitter):
            raise ValueError(
                f"splitter={self.splitter!r} says not where steps begin. Give 'lines', "
                "'sentences', 'module:function' or a function."
            )
        if isinstance(self.splitter, str) and self.splitter in SPLITTERS:
            return SPLITTERS[self.splitter]
        return resolve(self.splitter, "splitter")

    @property
    def splitter_name(self) -> str:
        """What stands for the splitter in files."""
        return name_of(self.splitter)

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "splitter": self.splitter_name}

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "splitter": self.splitter_name}


class VinePPOTrainer(GRPOTrainer):
    """PPO with Monte-Carlo values of steps. Formulas: `objectives.vineppo`."""

    config_class = VinePPOConfig
    _tag_names = ["trl", "trl_ext", "vineppo"]
    _name = "VinePPO"
    _paper = KAZEMNEJAD_2025

    def token_credit(self, sampled: Round) -> TokenCredit:
        tokenizer = self.processing_class
        starts = starts_of(tokenizer, sampled.completion_ids, self.args, self.eos_token_ids)
        prefixes, table = shared_prefixes(sampled.labels, sampled.completion_ids, starts)
        values_N = self._values(sampled, prefixes)
        values_BS = _padded([values_N[found] for found in table], math.nan)
        steps_B = torch.tensor([len(row) for row in starts], device=values_N.device)
        advantage_BS = step_advantages(values_BS, sampled.rewards_B, steps_B)
        credit_BT = on_tokens(advantage_BS, _segments(starts, sampled))
        if self.args.whiten:
            credit_BT = self._whitened(credit_BT, sampled.mask_BT)
        columns = {}
        if self.args.log_values:
            columns = value_columns(tokenizer, sampled, starts, values_BS, advantage_BS)
        metrics = _counted(sampled, steps_B, values_N, self.args.num_rollouts)
        return TokenCredit(credit_BT, metrics, columns)

    def _values(self, sampled: Round, prefixes: Sequence[Prefix]) -> Tensor:
        """`(N,)`: mean reward of K fresh rollouts behind each prefix."""
        K, rows = self.args.num_rollouts, [prefix.row for prefix in prefixes]
        begun = [sampled.completion_ids[prefix.row][: prefix.length] for prefix in prefixes]
        asked = [[*sampled.prompt_ids[row], *ids] for row, ids in zip(rows, begun, strict=True)]
        # A completion that came from elsewhere may be longer than any that is sampled.
        left = [max(1, self.max_completion_length - len(ids)) for ids in begun]
        rollouts = sampled.continued(asked, left, K)
        whole = [[*ids, *rest] for ids, K_of in zip(begun, rollouts, strict=True) for rest in K_of]
        places = [row for row in rows for _ in range(K)]
        return monte_carlo_values(sampled.rewarded(places, whole).view(-1, K))

    def _whitened(self, credit_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """Over the tokens of all processes."""
        B, T = credit_BT.shape
        padded = [self.accelerator.pad_across_processes(x, dim=1) for x in (credit_BT, mask_BT)]
        everyone = whitened(*(self.accelerator.gather(x) for x in padded))
        return everyone[B * self.accelerator.process_index :][:B, :T]


def starts_of(
    tokenizer: Any, completion_ids: Ids, args: VinePPOConfig, eos_token_ids: Sequence[int]
) -> list[list[int]]:
    """First tokens of each completion's steps; an end of sequence alone is one step."""
    limits = {"min_tokens": args.min_step_tokens, "most_steps": args.max_steps_per_completion}
    starts = []
    for ids in completion_ids:
        # Not every end of sequence is special to the tokenizer: some have a text.
        ended = bool(ids) and ids[-1] in eos_token_ids
        spoken = ids[: len(ids) - ended]
        own = ended and (args.eos_step or not spoken)
        starts.append(step_starts(tokenizer, spoken, args.split, ended=own, **limits))
    return starts


def value_columns(
    tokenizer: Any,
    sampled: Round,
    starts: list[list[int]],
    values_BS: Tensor,
    advantage_BS: Tensor,
) -> dict[str, list]:
    """Columns of the completions table: which step lost the solution.

    Args:
        tokenizer: decodes the step.
        sampled: the round.
        starts: first tokens of each row's steps.
        values_BS: V of the prefix in front of each step.
        advantage_BS: of each step.

    Returns:
        `values`: V in front of each step, then the reward, None where unscorable; `lost_at_step`:
        the step with the lowest advantage, None where none is negative; `lost_step`: its text.
    """
    columns: dict[str, list] = {"values": [], "lost_at_step": [], "lost_step": []}
    for row, (of_row, ids) in enumerate(zip(starts, sampled.completion_ids, strict=True)):
        along = [*values_BS[row, : len(of_row)].tolist(), sampled.rewards_B[row].item()]
        worst, step = advantage_BS[row].min(0)
        lost, text = int(step) if worst < 0 else None, None
        if lost is not None:
            begin, end = [*of_row, len(ids)][lost : lost + 2]
            text = tokenizer.decode(ids[begin:end], skip_special_tokens=True)
            text = text or tokenizer.decode(ids[begin:end])  # the decision to end
        known = [None if math.isnan(value) else value for value in along]
        for name, entry in zip(columns, (known, lost, text), strict=True):
            columns[name].append(entry)
    return columns


def _segments(starts: list[list[int]], sampled: Round) -> Tensor:
    """`(B, T)`: the step of each token, −1 behind a completion's end."""
    segment_BT = torch.full_like(sampled.mask_BT, -1, dtype=torch.long)
    for row, (of_row, ids) in enumerate(zip(starts, sampled.completion_ids, strict=True)):
        segment_BT[row, : len(ids)] = torch.tensor(token_steps(of_row, len(ids)))
    return segment_BT


def _padded(rows: list[Tensor], value: float) -> Tensor:
    """At least one column wide, also where no row has a step."""
    padded = pad_sequence(rows, batch_first=True, padding_value=value)
    return padded if padded.size(1) else padded.new_full((len(rows), 1), value)


def _counted(sampled: Round, steps_B: Tensor, values_N: Tensor, K: int) -> Metrics:
    """Mean value of a prefix; and per completion: steps, distinct prefixes, rollouts."""
    each_B = torch.ones_like(sampled.rewards_B)
    prefixes_B = each_B * (len(values_N) / len(each_B))
    return {
        "rollouts/value": (values_N.nan_to_num(), (~values_N.isnan()).float()),
        "rollouts/steps": (steps_B.float(), each_B),
        "rollouts/prefixes": (prefixes_B, each_B),
        "rollouts/samples": (K * prefixes_B, each_B),
    }
