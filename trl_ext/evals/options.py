"""How completions are sampled and counted: one set of defaults for function and callback."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

from trl_ext.evals.metrics import checked_ks
from trl_ext.evals.scoring import AnswerExtractor
from trl_ext.objectives.majority import Unparsable
from trl_ext.resolve import resolve

# Sampling options under which completions are samples of the policy itself, and those that cannot
# change what is sampled.
PLAIN = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0}
HARMLESS = ("max_new_tokens", "cache_implementation")


@dataclass(frozen=True, kw_only=True)
class BatchOptions:
    """How a dataset is worked off, checked on construction.

    Args:
        max_prompts: evaluate only the first so many prompts.
        chat_template_kwargs: further arguments of `apply_chat_template`.
        batch_size: completions in the model at once, per process.
        disable_tqdm: no progress bar.
    """

    max_prompts: int | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    batch_size: int = 64
    disable_tqdm: bool = False

    def __post_init__(self):
        self._check_positive("batch_size", "max_prompts")

    def _check_positive(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} would evaluate nothing. Give at least 1.")


@dataclass(frozen=True, kw_only=True)
class SamplingOptions(BatchOptions):
    """How completions are sampled, checked on construction; with the fields of [`BatchOptions`].

    Args:
        num_generations: completions per prompt, G.
        max_completion_length: tokens; a completion without an end by then is truncated.
        temperature: of sampling; 0 is greedy and asks for `num_generations=1`.
        top_p: probability mass of nucleus sampling, in (0, 1].
        top_k: tokens kept per step, 0 for all.
        generation_kwargs: fields of `transformers.GenerationConfig`; they win over the above.
        seed: of the noise; equal seeds give two policies common noise.
    """

    num_generations: int = 1
    max_completion_length: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    generation_kwargs: dict[str, Any] | None = None
    seed: int = 0

    def __post_init__(self):
        super().__post_init__()
        self._check_positive("num_generations", "max_completion_length")
        if self.seed < 0:
            raise ValueError(f"seed={self.seed} is no seed of numpy's. Give an integer from 0 up.")
        temperature, top_p = self.sampling["temperature"], self.sampling["top_p"]
        if temperature < 0 or not 0 < top_p <= 1:
            raise ValueError(
                f"temperature={temperature} and top_p={top_p} define no distribution. Choose a "
                "temperature of at least 0 and top_p in (0, 1]."
            )
        if temperature == 0 and self.num_generations > 1:
            raise ValueError(
                f"temperature=0 decodes greedily: all num_generations={self.num_generations} "
                "completions of a prompt would be equal. Set num_generations=1, or a temperature "
                "above 0."
            )

    @property
    def sampling(self) -> dict[str, Any]:
        """The options that belong to `transformers.GenerationConfig`, under its names."""
        return {
            "max_new_tokens": self.max_completion_length,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            **(self.generation_kwargs or {}),
        }


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions(SamplingOptions):
    """Options of `evaluate_generations` and `GenerationEvaluator`, and [`SamplingOptions`].

    Args:
        ks: values of k to report, each in [1, G]; `None` means the powers of two up to G.
        answer_extractor: from completion text to a hashable answer or `None`, as a function or as
            `"module:function"`. Enables maj@k.
        unparsable: `"null"` or `"exclude"`, what completions without an answer do in the vote; the
            evaluator takes it from the config of a `MajorityVoteTrainer`.
        success_threshold: least reward of a correct completion.
        reward_weights: one per reward function; 1 by default.
        marker: text behind which a completion gives its answer; empty for answers without a
            thought. Enables the bounds Lₖ on the likelihood of the column `answer`. They are of the
            policy itself: temperature 1, no filter. The evaluator takes this and the next two from
            the config of a `JEPOTrainer`.
        answer_prefix: text between marker and answer, tokenised with the answer.
        answer_eos: whether the end of sequence belongs to the answer.
    """

    num_generations: int = 16
    ks: Sequence[int] | None = None
    answer_extractor: AnswerExtractor | str | None = None
    unparsable: Unparsable = "null"
    success_threshold: float = 1.0
    reward_weights: Sequence[float] | None = None
    marker: str | None = None
    answer_prefix: str = " "
    answer_eos: bool = True

    def __post_init__(self):
        super().__post_init__()
        self._check_bounds()
        if self.unparsable not in get_args(Unparsable):
            raise ValueError(f"unparsable={self.unparsable!r} is none of null, exclude.")
        checked_ks(self.ks, self.num_generations)
        _ = self.extractor

    def _check_bounds(self):
        given = {name: value for name, value in self.sampling.items() if name not in HARMLESS}
        changed = {name: value for name, value in given.items() if value != PLAIN.get(name)}
        if self.marker is not None and changed:
            raise ValueError(
                f"marker={self.marker!r} with {changed}: the bounds on the answer's likelihood are "
                f"those of the policy, and thoughts would come from another one. Leave {PLAIN} as "
                "they are and add no other filter, or set marker=None for no bounds."
            )

    @property
    def k_values(self) -> tuple[int, ...]:
        """`ks`, sorted and without repetitions, or its default."""
        return checked_ks(self.ks, self.num_generations)

    @property
    def extractor(self) -> AnswerExtractor | None:
        """`answer_extractor` as a function."""
        if self.answer_extractor is None:
            return None
        return resolve(self.answer_extractor, "answer_extractor")
