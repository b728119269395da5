"""Training for majority vote: the most frequent of k answers is correct.

The credit is the leave-one-out estimator averaged over all k-subsets of the group, exact and with
ties broken symmetrically: a tied vote counts the average reward of the tied answers.

Source: arXiv:2503.19595, section 4.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, get_args

from torch import Tensor

from trl_ext.objectives.majority import Unparsable, majority_credit
from trl_ext.resolve import name_of, resolve
from trl_ext.trainers.grpo import GRPOTrainer
from trl_ext.trainers.k_sample import TANG_2025, KSampleConfig

AnswerExtractor = Callable[[str], Hashable | None]


@dataclass
class MajorityVoteConfig(KSampleConfig):
    """Configuration of [`MajorityVoteTrainer`].

    Args:
        answer_extractor: from a completion's text to its answer, or None if it has none.
        unparsable: what a completion without an answer does in the vote.
    """

    answer_extractor: str | None = field(
        default=None,
        metadata={
            "help": "From a completion's text to a hashable answer or None: a callable, or "
            "'module:function', e.g. 'trl_ext.rewards:last_boxed' (arXiv:2503.19595, section 4)."
        },
    )
    unparsable: str = field(
        default="null",
        metadata={
            "help": "Completions without an answer: 'null' lets them vote together for an answer "
            "of reward 0, 'exclude' leaves them out of the vote (arXiv:2503.19595, section 4)."
        },
    )

    def __post_init__(self) -> None:
        if self.answer_extractor is None:
            raise ValueError(
                "answer_extractor=None: a majority vote needs to know what a completion's answer "
                "is. Pass a callable or 'module:function', e.g. 'trl_ext.rewards:last_boxed'."
            )
        if self.unparsable not in get_args(Unparsable):
            raise ValueError(f"unparsable={self.unparsable!r} is none of null, exclude.")
        resolve(self.answer_extractor, "answer_extractor")
        super().__post_init__()
        if min(self.all_k) < 2:
            raise ValueError(f"k={self.k}: a vote needs at least 2 samples. Raise k.")

    @property
    def extractor_name(self) -> str:
        """What stands for the extractor in files."""
        return name_of(self.answer_extractor or "")

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "answer_extractor": self.extractor_name}

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "answer_extractor": self.extractor_name}


class MajorityVoteTrainer(GRPOTrainer):
    """Trains for E r(majority of k answers). Formula: `objectives.majority`."""

    config_class = MajorityVoteConfig
    _tag_names = ["trl", "trl_ext", "majority-vote"]
    _name = "Majority vote"
    _paper = TANG_2025

    @property
    def min_samples(self) -> int:
        return self.args.smallest_group(self.args.k)

    def labels(self, completions: list) -> list[str | None]:
        extract: AnswerExtractor = resolve(self.args.answer_extractor, "answer_extractor")
        texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
        answers = [extract(text) for text in texts]
        return [None if answer is None else repr(answer) for answer in answers]

    def credit(self, rewards_PG: Tensor, labels_PG: Tensor) -> Tensor:
        return majority_credit(rewards_PG, labels_PG, self.args.k, unparsable=self.args.unparsable)
