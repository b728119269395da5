"""What every config of trl_ext adds to TRL's: when rounds are sampled, and what is refused."""

import dataclasses
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import trl
from transformers.utils import is_torch_bf16_gpu_available

from trl_ext.objectives.reduce import EXACT_FOR_SEQUENCES

SCHEDULES = ("sync", "one_step")


# What makes the sampler another policy, with the value that does not.
NEUTRAL = {"top_p": 1.0, "top_k": 0, "min_p": None, "repetition_penalty": 1.0}
# The same among `generation_kwargs`, which win over the config's own options.
NEUTRAL_KWARGS = {
    **NEUTRAL,
    **{"do_sample": True, "num_beams": 1, "typical_p": 1.0, "top_h": None},
    **dict.fromkeys(("epsilon_cutoff", "eta_cutoff", "presence_penalty", "frequency_penalty"), 0.0),
    **dict.fromkeys(("no_repeat_ngram_size", "min_new_tokens", "min_length", "min_tokens"), 0),
    **dict.fromkeys(("bad_words_ids", "suppress_tokens", "begin_suppress_tokens")),
    **dict.fromkeys(("sequence_bias", "logit_bias", "forced_bos_token_id", "forced_eos_token_id")),
}


def refuse_truncated_sampling(config: trl.GRPOConfig, what: str) -> None:
    """An identity about the policy says nothing about a sampler that is another policy."""
    reason = "completions would come from another policy than the one that is scored"
    for name, value in NEUTRAL.items():
        given = getattr(config, name)
        if given != value and given:
            raise ValueError(
                f"{name}={given!r} is not supported with {what}: {reason}. Set {name}={value!r}."
            )
    neutral = {**NEUTRAL_KWARGS, "temperature": config.temperature}
    own: Any = config.generation_kwargs or {}
    for name, given in own.items():
        turned_off = not given and name not in ("do_sample", "temperature")
        if name in neutral and given != neutral[name] and not turned_off:
            raise ValueError(
                f"{name}={given!r} in generation_kwargs is not supported with {what}: {reason}. "
                "Leave it out."
            )


def refuse_ignored(config: trl.GRPOConfig, names: Iterable[str], what: str) -> None:
    """No option is silently ignored: each of `names` must have the default of its class."""
    defaults = {f.name: f.default for f in dataclasses.fields(config)}
    for name in names:
        given = getattr(config, name)
        if given != defaults[name]:
            raise ValueError(
                f"{name}={given!r} is not applied: {what}. Leave it at {defaults[name]!r}."
            )


def refuse_unknown(config: trl.GRPOConfig, choices: Mapping[str, Iterable[str]]) -> None:
    """Each option named must have one of its values."""
    for name, allowed in choices.items():
        if getattr(config, name) not in allowed:
            raise ValueError(f"{name}={getattr(config, name)!r} is none of {', '.join(allowed)}.")


def warn_if_lengths_reweigh(config: trl.GRPOConfig, stacklevel: int) -> None:
    """Warns of a loss type that divides by lengths; `stacklevel` of the line to be shown."""
    if config.loss_type not in EXACT_FOR_SEQUENCES:
        warnings.warn(
            f"loss_type={config.loss_type!r} reweighs completions by length, so the gradient "
            f"is not that of {type(config).__name__}'s objective; "
            f"{' and '.join(EXACT_FOR_SEQUENCES)} keep it.",
            stacklevel=stacklevel + 1,
        )


@dataclass
class BaseConfig(trl.GRPOConfig):
    """TRL's `GRPOConfig` plus the schedule of rounds.

    A round is one generation batch: N = steps_per_generation / gradient_accumulation_steps
    mini-batches, on which T = num_iterations passes are made. The weights that sampled it are
    0 … N·T − 1 optimizer steps old with `schedule="sync"`. With `"one_step"` the next round is
    sampled by a snapshot of the weights while this one is trained on: N·T … 2·N·T − 1 from the
    second round on.

    Args:
        schedule: who waits for whom.
        max_staleness: optimizer steps that weights may be old when training on their samples
            begins; 0 waits for the current weights, bit for bit as `"sync"`.
        sampler_device: device of the background sampler.
        sampler_timeout: seconds.
    """

    schedule: str = field(
        default="sync",
        metadata={
            "help": "'sync': sample, then train. 'one_step': sample the next round with a snapshot "
            "of the weights while this one is trained on (arXiv:2410.18252, section 3)."
        },
    )
    max_staleness: int | None = field(
        default=None,
        metadata={
            "help": "With schedule='one_step': optimizer steps that the sampling weights may be "
            "old when training on a round begins. None: no limit. 0: wait for the current "
            "weights (arXiv:2410.18252, section 3.2)."
        },
    )
    sampler_device: str | None = field(
        default=None,
        metadata={
            "help": "Device of the background sampler of schedule='one_step', e.g. 'cuda:1'; by "
            "default the trainer's own (arXiv:2410.18252, section 3)."
        },
    )
    sampler_timeout: float = field(
        default=1800.0,
        metadata={
            "help": "Seconds to wait for a round of the sampler of schedule='one_step' before the "
            "run ends with an error (arXiv:2410.18252, section 3)."
        },
    )

    def __post_init__(self) -> None:
        if self.bf16 is None and not self.fp16 and not self.use_cpu:
            # TRL turns bf16 on and then refuses a machine that lacks it.
            self.bf16 = None if is_torch_bf16_gpu_available() else False
        super().__post_init__()
        refuse_unknown(self, {"schedule": SCHEDULES})
        self._check_schedule()
        if self.log_completions_hub_repo is not None and self.hub_private_repo is None:
            raise ValueError(
                f"log_completions_hub_repo={self.log_completions_hub_repo!r} with hub_private_repo "
                "unset would create a public repository of completions. Set hub_private_repo=True, "
                "or False if that is meant; it governs the model's repository too."
            )

    @property
    def steps_per_round(self) -> int:
        """N·T: optimizer steps between two rounds of sampling, at least 1."""
        micro_batches = (self.steps_per_generation or 1) * self.num_iterations
        return max(1, micro_batches // self.gradient_accumulation_steps)

    @property
    def scoring_temperature(self) -> float:
        """What logits are divided by where policy and reference are scored."""
        return self.temperature

    @property
    def scores_text_again(self) -> bool:
        """Whether a loss needs a forward pass of ours, which knows token ids and nothing else."""
        return False

    @property
    def score_name(self) -> str | None:
        """Name of scores that do not come from reward functions; None if all do."""
        return None

    def _check_schedule(self) -> None:
        if self.schedule == "sync":
            names = ("max_staleness", "sampler_device", "sampler_timeout")
            refuse_ignored(self, names, "schedule='sync' samples in the trainer itself")
            return
        if self.max_staleness and self.max_staleness < self.steps_per_round:
            raise ValueError(
                f"max_staleness={self.max_staleness} would discard every round that was sampled "
                f"ahead: its weights are {self.steps_per_round} optimizer steps old when training "
                f"on it begins. Set max_staleness ≥ {self.steps_per_round}, 0 to wait for the "
                "current weights, or None."
            )
        if self.use_vllm and self.vllm_mode != "server":
            raise ValueError(
                f"vllm_mode={self.vllm_mode!r} is not supported with schedule='one_step': a "
                "colocated engine samples on the GPUs that train, so nothing overlaps. Use "
                "vllm_mode='server' or schedule='sync'."
            )
        if self.use_transformers_continuous_batching:
            raise ValueError(
                "use_transformers_continuous_batching=True is not supported with "
                "schedule='one_step': the background sampler uses model.generate. Set it to False."
            )
        if self.sampler_timeout <= 0:
            raise ValueError(f"sampler_timeout={self.sampler_timeout} must be positive (seconds).")

    def __getstate__(self) -> dict[str, Any]:
        """The host pickles its arguments into every checkpoint: no token may be among them."""
        state = self.__dict__.copy()
        return {k: None if k.endswith("_token") else v for k, v in state.items()}
