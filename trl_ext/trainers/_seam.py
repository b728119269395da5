"""The only file that knows TRL's private methods.

Classes of one concern each, stacked in the order in which a run meets them: `ConstructedTrainer`
builds what TRL builds wrongly or not at all, `ResumableTrainer` makes a checkpoint hold the whole
run, `ScheduledTrainer` says where completions come from and when. On these stand the two bases of
methods: `CreditTrainer` lets a method replace the advantages and the KL, `GroupTrainer` hands it
whole groups, of which it makes its own loss. With no method bound to it `CreditTrainer` computes
what TRL computes, bit for bit; the one exception is a model with absolute positions and left-padded
prompts, which TRL scores at shifted positions.
"""

import copy
import functools
import inspect
import itertools
import math
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
import trl
from accelerate.utils import broadcast_object_list, gather_object, is_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerState
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl.models.utils import disable_gradient_checkpointing, unwrap_model_for_generation
from trl.trainer import grpo_trainer
from trl.trainer import utils as trl_utils
from trl.trainer.utils import (
    get_config_model_id,
    shuffle_sequence_dict,
    split_tensor_dict,
    use_adapter,
)

from trl_ext.cards import write_model_card
from trl_ext.objectives.baselines import leave_one_out
from trl_ext.objectives.kl import k3, kl_to_go
from trl_ext.objectives.pair_rules import win_rates
from trl_ext.objectives.reduce import reduce_tokens
from trl_ext.objectives.scorable import credit_of_scorable
from trl_ext.objectives.sequence_policy import effective_sample_size
from trl_ext.resolve import resolve
from trl_ext.rollouts import (
    OneStepAhead,
    Opponent,
    Request,
    Rollout,
    branch,
    mixed_logps,
    positions,
    random_state,
    sample,
    set_random_state,
)
from trl_ext.runtime.exact_state import (
    load_exact_state,
    load_policy,
    save_exact_state,
    save_policy,
)
from trl_ext.runtime.guards import NonFiniteGuard
from trl_ext.runtime.host import check_host
from trl_ext.runtime.manifest import sound_checkpoint, write_manifest
from trl_ext.runtime.record import write_round
from trl_ext.trainers.background import (
    background_sampler,
    own_share,
    refuse_what_a_sampler_lacks,
)
from trl_ext.trainers.card import trainer_card
from trl_ext.trainers.group_rows import (
    Group,
    Metrics,
    Selection,
    flattened,
    grouped,
    record_rows,
    recorded_tool_mask,
    trimmed,
    without_eos,
)
from trl_ext.trainers.judging import bradley_terry, judged
from trl_ext.trainers.replay_buffer import ReplayBuffer
from trl_ext.trainers.token_credit import Round, TokenCredit, refuse_what_branching_lacks

check_host()
_HOST_INIT = trl.GRPOTrainer.__init__


@contextmanager
def _scored_at(temperature: float) -> Iterator[None]:
    """Builds TRL's fused head, which scores policy and reference, for this temperature."""
    fuse = grpo_trainer.add_fused_lm_head

    def fused(model: Any, **options: Any) -> None:
        fuse(model, **{**options, "temperature": temperature})

    grpo_trainer.add_fused_lm_head = fused
    try:
        yield
    finally:
        grpo_trainer.add_fused_lm_head = fuse


@contextmanager
def _reference_copied_from(model: Any) -> Iterator[None]:
    """TRL reloads the reference from `config._name_or_path`: a model changed in memory would be
    pulled towards weights it never had, and a custom class would not load at all."""
    if not isinstance(model, PreTrainedModel) or is_deepspeed_zero3_enabled():
        yield  # a copy would hold this process's share of the weights
        return
    reload = grpo_trainer.create_model_from_path
    grpo_trainer.create_model_from_path = lambda *_, **__: _copied(model)
    try:
        yield
    finally:
        grpo_trainer.create_model_from_path = reload


def _copied(model: PreTrainedModel) -> PreTrainedModel:
    copied = copy.deepcopy(model)
    if not hasattr(model, "_hf_hook"):  # which belongs to a model split over devices
        # An earlier trainer's fused head: copied, it would still run the original's weights.
        vars(copied).pop("forward", None)
    return copied


def _number_positions(_: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Forward pre-hook: positions count tokens, not pads, as they do while sampling."""
    mask = kwargs.get("attention_mask")
    if mask is not None and kwargs.get("position_ids") is None and not kwargs.get("use_cache"):
        kwargs["position_ids"] = positions(mask)
    return args, kwargs


def _has_absolute_positions(model: Any) -> bool:
    """Rotary positions are relative: pads shift them without effect, and TRL stays untouched."""
    model = model.get_base_model() if is_peft_model(model) else model
    rotary = getattr(model.config.get_text_config(), "rope_parameters", None) is not None
    return not rotary and "position_ids" in inspect.signature(model.forward).parameters


class ConstructedTrainer(trl.GRPOTrainer):
    """TRL's constructor, argument for argument, around a checked and mended construction."""

    config_class: ClassVar[type[trl.GRPOConfig]]
    # Optional in the host's eyes, or of its own types; once constructed they are what we say.
    args: Any
    model: Any
    ref_model: Any
    accelerator: Any
    processing_class: Any
    max_completion_length: Any
    num_generations: Any
    num_generations_eval: Any
    pad_to_multiple_of: Any
    chat_template_kwargs: Any

    @functools.wraps(_HOST_INIT)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = inspect.signature(_HOST_INIT).bind(self, *args, **kwargs).arguments
        del given["self"]
        given["args"] = self._checked_config(given["model"], given.get("args"))
        self._given_scores: list[float | None] = []
        if given["args"].score_name is not None:
            self._refuse_reward_funcs(given.get("reward_funcs"), given["args"].score_name)
            given["reward_funcs"] = [self._scores_under(given["args"].score_name)]
        with (
            _reference_copied_from(given["model"]),
            _scored_at(given["args"].scoring_temperature),
        ):
            super().__init__(**given)
        self._refuse_unsupported()
        for model in (self.model, self.ref_model):
            if model is not None and _has_absolute_positions(self.accelerator.unwrap_model(model)):
                model.register_forward_pre_hook(_number_positions, with_kwargs=True)
        self.add_callback(NonFiniteGuard())
        for part in [*self.callback_handler.callbacks, *self.reward_funcs]:
            if hasattr(part, "attach"):
                part.attach(self)

    @property
    def sharded(self) -> bool:
        """Whether no process need hold all of the weights."""
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    def _refuse_unsupported(self) -> None:
        """What only the built model and its launcher tell."""
        if self.args.sync_ref_model and self.sharded:
            raise ValueError(
                "sync_ref_model=True is not supported with FSDP or DeepSpeed: a sharded reference "
                "is not in the checkpoint, and a resumed run would start from another one. Use DDP."
            )
        if not any(p.requires_grad for p in self.model.parameters()):
            raise ValueError(
                "model: no parameter requires a gradient, so training would change nothing. A "
                "PeftModel must be loaded with is_trainable=True, or pass peft_config."
            )
        if self._is_vlm and self.args.scores_text_again:
            raise ValueError(
                f"kl_gradient={self.args.kl_gradient!r} with kl_baseline={self.args.kl_baseline!r} "
                "is not supported for vision-language models: its further forward pass would see "
                "no images. Use kl_gradient='sequence' with kl_baseline='none'."
            )

    def _refuse_reward_funcs(self, reward_funcs: Any, instead: str) -> None:
        if reward_funcs is not None and reward_funcs != []:
            raise ValueError(
                f"reward_funcs={reward_funcs!r} is not applied: completions are compared by their "
                f"{instead.replace('_', ' ')} score. Pass reward_funcs=None."
            )

    def _scores_under(self, name: str) -> Callable[..., list[float | None]]:
        """Scores that do not come from a reward function, in the place where TRL looks for one."""

        def scores(**_: Any) -> list[float | None]:
            return self._given_scores

        scores.__name__ = name
        return scores

    def _checked_config(self, model: Any, config: Any) -> Any:
        if config is None:
            name = model if isinstance(model, str) else get_config_model_id(model.config)
            return self.config_class(f"{name.split('/')[-1]}-{self._name}")
        if not isinstance(config, self.config_class):
            raise TypeError(
                f"args: {type(self).__name__} needs a {self.config_class.__name__} of trl_ext, got "
                f"{type(config).__module__}.{type(config).__name__}; it takes the same arguments."
            )
        return config

    def create_model_card(self, model_name=None, dataset_name=None, tags=None) -> None:
        """Writes `README.md` into the output folder: TRL's card names the parent's paper, a local
        path or "None" as base model, and a licence key that the Hub does not read."""
        if self.is_world_process_zero():
            tags = [tags] if isinstance(tags, str) else list(tags or ())
            content = trainer_card(self, model_name, dataset_name, tags)
            write_model_card(content, str(self.args.output_dir))

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        rewards_BF = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        if rewards_BF.isinf().any():
            row, column = rewards_BF.isinf().nonzero()[0].tolist()
            raise ValueError(
                f"reward function {self.reward_func_names[column]!r} returned "
                f"{rewards_BF[row, column].item()} for row {row} of the gathered batch; a reward "
                "must be finite, or None where the completion cannot be scored."
            )
        rewards_B = (rewards_BF * self.reward_weights.to(rewards_BF.device)).nansum(1)
        self._rewards_B = rewards_B.masked_fill(rewards_BF.isnan().all(1), torch.nan)
        return rewards_BF


class ResumableTrainer(ConstructedTrainer):
    """A resumed run equals the uninterrupted one to the bit, at every step.

    TRL's checkpoint lacks the generation window in use, its position in it, the metrics gathered
    since the last log, how often the prompts were shuffled, where in a stream of prompts it stands,
    and a reference that moved.
    """

    _sampler: Any = None
    _tr_loss: Any

    @property
    def _past(self) -> list[dict[str, Any]]:
        """Earlier rounds that may be trained on again."""
        return []

    @_past.setter
    def _past(self, rounds: list[dict[str, Any]]) -> None:
        assert not rounds, "the checkpoint is of a run with a replay buffer"

    def _own_state(self) -> dict[str, Any]:
        """What else a checkpoint must hold, JSON-able."""
        return {}

    def _load_own_state(self, state: dict[str, Any]) -> None:
        """Restores `_own_state`."""

    def _get_train_sampler(self, dataset=None):
        self._sampler = super()._get_train_sampler(dataset)
        return self._sampler

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        """TRL's `train`, from the last checkpoint that is whole where the wanted one is not."""
        found = [None]
        if self.accelerator.is_main_process:
            found = [sound_checkpoint(resume_from_checkpoint, str(self.args.output_dir))]
        broadcast_object_list(found)
        return super().train(found[0], *args, **kwargs)

    def _save_checkpoint(self, model, trial):
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            run_folder = self._get_output_dir(trial=trial)
            write_manifest(f"{run_folder}/{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if self.args.sync_ref_model and self.args.should_save:
            save_policy(output_dir, self.accelerator.unwrap_model(self.ref_model))
        values = {
            "step": self._step,
            "past": len(self._past),
            "tr_loss": self._tr_loss.item(),
            "total_loss": self._total_loss_scalar,
            "last_logged": self._globalstep_last_logged,
            "metrics": self._metrics["train"],
            "logs": self._logged_completions(),
            "own": self._own_state(),
        }
        window = None if self._buffered_inputs is None else self._buffered_inputs + self._past
        save_exact_state(output_dir, self.args.process_index, window, values)

    def _init_training_state(
        self, max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
    ):
        trained = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        streamed = not isinstance(self.train_dataset, Sized)
        if resume_from_checkpoint is None or not streamed or self.args.ignore_data_skip:
            return trained
        # The host takes a stream for a single epoch, and would skip past its end.
        saved = TrainerState.load_from_json(
            os.path.join(resume_from_checkpoint, TRAINER_STATE_NAME)
        )
        epochs = int(saved.epoch or 0)
        batches_per_epoch = saved.max_steps * self.args.gradient_accumulation_steps
        return epochs, round(((saved.epoch or 0) - epochs) * batches_per_epoch)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self._sampler is not None:
            # The sampler draws one permutation per epoch from a generator of its own.
            for _ in range(int(self.state.epoch or 0)):
                next(iter(self._sampler), None)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        if checkpoint is None:
            return
        self._resumed_from = checkpoint
        state = load_exact_state(checkpoint, self.args.process_index, self.accelerator.device)
        if state is None:
            return
        if self.args.sync_ref_model:
            load_policy(checkpoint, self.accelerator.unwrap_model(self.ref_model))
        window, values = state
        if window is not None:
            kept = len(window) - values["past"]
            self._buffered_inputs, self._past = window[:kept], window[kept:]
        self._step = values["step"]
        self._tr_loss = torch.tensor(values["tr_loss"], device=self.args.device)
        self._total_loss_scalar = values["total_loss"]
        self._globalstep_last_logged = values["last_logged"]
        self._metrics["train"] = defaultdict(list, values["metrics"])
        self._load_own_state(values["own"])
        for key, rows in values["logs"].items():
            if isinstance(rows, list):
                self._logs[key].extend(rows)
                continue
            for name, column in rows.items():
                self._logs[key][name].extend(column)

    def _logged_completions(self) -> dict[str, Any]:
        """The completions table of the window in use; prompts with images are not kept."""
        if not self.log_completions or self._is_vlm:
            return {}
        columns = {key: rows for key, rows in self._logs.items() if key != "images"}
        return {
            key: {k: list(v) for k, v in rows.items()} if isinstance(rows, dict) else list(rows)
            for key, rows in columns.items()
        }


class ScheduledTrainer(ResumableTrainer):
    """Says where the completions of a round come from: TRL's engines, a sampler that works ahead
    with a snapshot of the weights, or the dataset."""

    _inputs: list[dict[str, Any]]
    _rollout: Rollout | None = None
    _behaviour_BT: Tensor | None = None  # log-probabilities of the policy that sampled, if stale

    @property
    def group_size(self) -> int:
        return self.num_generations if self.model.training else self.num_generations_eval

    @property
    def uses_old_logp(self) -> bool:
        """Whether the loss asks for the policy that sampled."""
        return True

    @property
    def opponent(self) -> Opponent | None:
        """Who takes part in sampling besides the policy."""
        return None

    @property
    def opponent_model(self) -> Any:
        """The model behind `opponent`; None: the policy with its adapter disabled."""
        return self.ref_model

    def given_completions(self, inputs: list, prompt_ids: list) -> list[list[int] | None] | None:
        """Token ids of the completions that the dataset holds, None where one is to be sampled."""
        return None

    def _refuse_unsupported(self) -> None:
        super()._refuse_unsupported()
        if self.args.schedule == "one_step":
            refuse_what_a_sampler_lacks(self, sees_images=self._is_vlm)

    @functools.cached_property
    def _ahead(self) -> OneStepAhead:
        return OneStepAhead(background_sampler(self))

    def train(self, *args, **kwargs):
        try:
            return super().train(*args, **kwargs)
        finally:
            if "_ahead" in vars(self):
                self._ahead.close()
                del self._ahead

    def _own_state(self) -> dict[str, Any]:
        ahead = {"ahead": self._ahead.state()} if self.args.schedule == "one_step" else {}
        return super()._own_state() | ahead

    def _load_own_state(self, state: dict[str, Any]) -> None:
        super()._load_own_state(state)
        if "ahead" in state and self.args.schedule == "one_step":
            self._ahead.load(state["ahead"])

    def _generate_and_score_completions(self, inputs):
        self._inputs = inputs
        ahead = self.model.training and self.args.schedule == "one_step"
        if ahead:
            self._inputs = self._exchange(inputs)
        elif self.args.schedule == "one_step" and self.use_vllm:
            self._ahead.settle()  # TRL gives the server the weights of now
        version = self._rollout.version if self._rollout else self.state.global_step
        try:
            output = super()._generate_and_score_completions(self._inputs)
        finally:
            self._rollout = None
        output["version"] = torch.full_like(output["completion_ids"][:, 0], version)
        stale = ahead and self.args.max_staleness != 0
        self._behaviour_BT = output.get("sampling_per_token_logps") if stale else None
        corrected = self.use_vllm and self.vllm_importance_sampling_correction
        if self._behaviour_BT is not None and not corrected:
            output["old_per_token_logps"] = self._behaviour_BT
        return output

    def _exchange(self, inputs: list) -> list:
        """Hands in the prompts of now; leaves in `_rollout` the completions of those it returns."""
        if self.args.max_staleness == 0:
            rollout, waited = self._ahead.now(self._request(inputs, fresh=False))
            if rollout.rng_state is not None:
                set_random_state(self.accelerator.device, rollout.rng_state)
        else:
            inputs, rollout, waited = self._ahead.exchange(inputs, self._request)
        self._rollout = own_share(self, rollout)
        self._metrics["train"]["perf/generation_wait_s"].append(waited)
        self._metrics["train"]["perf/training_wait_s"].append(rollout.idle_s)
        return inputs

    def _request(self, inputs: list, fresh: bool = True) -> Request:
        """What the sampler is asked: `fresh` gives it random numbers of its own, else it continues
        the trainer's."""
        prompt_ids, *_ = self._tokenize_prompts([row["prompt"] for row in inputs])
        given = self.given_completions(inputs, prompt_ids) or [None] * len(inputs)
        wanted = [ids for ids, known in zip(prompt_ids, given, strict=True) if known is None]
        if self.use_vllm:  # which has random numbers of its own
            return Request(gather_object(wanted), self.state.global_step)
        seed = int(torch.randint(2**62, ()).item()) if fresh else None
        state = None if fresh else random_state(self.accelerator.device)
        return Request(
            wanted,
            self.state.global_step,
            seed=seed,
            rng_state=state,
            opponent=self.opponent,
            scored=self.uses_old_logp,
        )

    def _sampling_rng(self) -> Tensor:
        """Random state of the device that `model.generate` draws on."""
        device = self.accelerator.device
        return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()

    def _set_sampling_rng(self, state: Tensor) -> None:
        device = self.accelerator.device
        if device.type == "cuda":
            torch.cuda.set_rng_state(state, device)
        else:
            torch.set_rng_state(state)

    def _generate_single_turn(
        self, prompt_ids, images, multimodal_fields, num_generations, *rest, **named
    ):
        given = self.given_completions(self._inputs, prompt_ids)
        if given is None:
            return self._sampled(
                prompt_ids, images, multimodal_fields, num_generations, *rest, **named
            )
        missing = [i for i, known in enumerate(given) if known is None]
        if missing:
            wanted = [prompt_ids[i] for i in missing]
            samples = num_generations * len(missing) // len(given)
            sampled, _ = self._sampled(wanted, None, {}, samples)
            for i, completion in zip(missing, sampled, strict=True):
                given[i] = completion
        return given, None

    def _sampled(self, prompt_ids, images, multimodal_fields, num_generations, *rest, **named):
        if self._rollout is not None:
            return self._rollout.completion_ids, self._rollout.logprobs
        if self.opponent is None:
            return super()._generate_single_turn(
                prompt_ids, images, multimodal_fields, num_generations, *rest, **named
            )
        with (
            unwrap_model_for_generation(
                self.model_wrapped, self.accelerator, generation_kwargs=self.generation_kwargs
            ) as model,
            torch.no_grad(),
        ):
            completion_ids = sample(
                model,
                prompt_ids,
                self.generation_config,
                eos_token_ids=self.eos_token_ids,
                pad_to_multiple_of=self.pad_to_multiple_of,
                opponent_model=self.opponent_model,
                opponent=self.opponent,
            )
        return completion_ids, None

    @contextmanager
    def _reference(self) -> Iterator[Any]:
        """The model to call for the reference policy; within it an adapter is off."""
        if self.ref_model is not None:
            yield self.ref_model
            return
        unwrapped: Any = self.accelerator.unwrap_model(self.model)
        with use_adapter(unwrapped, "ref" if "ref" in unwrapped.peft_config else None):
            yield self.model

    def _logits(self, model: nn.Module, batch: dict) -> tuple[Tensor, Tensor]:
        """Of policy and reference, `(B, T, V)` each, divided by the temperature."""
        policy = self._tempered_logits(model, batch)
        with torch.no_grad(), self._reference() as reference:
            return policy, self._tempered_logits(reference, batch)

    def _tempered_logits(self, model: nn.Module, batch: dict) -> Tensor:
        ids, mask = _joined(batch)
        T = batch["completion_ids"].size(1)
        with self.accelerator.autocast():
            out = model(input_ids=ids, attention_mask=mask, logits_to_keep=T + 1, use_cache=False)
        return out.logits[:, :-1].float() / self.args.scoring_temperature

    def _log_means(self, metrics: Metrics) -> None:
        """Weighted means over all ranks; nothing is logged where all weights are 0."""
        with torch.no_grad():
            sums = [
                torch.stack([(value * weight).sum(), weight.sum()]).float()
                for value, weight in metrics.values()
            ]
            totals = self.accelerator.reduce(torch.stack(sums), reduction="sum").tolist()
        for name, (total, weight) in zip(metrics, totals, strict=True):
            self._metrics[self._mode()][name].append(total / weight if weight else math.nan)

    def _show_advantages(self, all_B: Tensor) -> None:
        """What the completions table says of all processes' rows, in place of TRL's own."""
        logged = self._logs["advantages"]
        for _ in range(min(len(logged), all_B.numel())):
            logged.pop()
        logged.extend(all_B.tolist())

    def _own_rows(self, gathered: Tensor, rows: int) -> Tensor:
        """This process's rows of what was gathered from all."""
        start = self.accelerator.process_index * rows
        return gathered[start : start + rows]

    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    def _log_staleness(self, inputs: dict) -> None:
        if not self.model.training:
            return
        # All processes sample a round at the same step: there is nothing to gather.
        age = self.state.global_step - inputs["version"].float()
        metrics, oldest = self._metrics["train"], age.max().item()
        metrics["sampling/staleness_mean"].append(age.mean().item())
        metrics["sampling/staleness_max"] = [max([oldest, *metrics["sampling/staleness_max"]])]

    def _log_drift(self, log_ratio_BT: Tensor, mask_BT: Tensor) -> None:
        """How far the policy is from the one that sampled: nats per completion, and the effective
        sample size of the sequence importance ratios, as a fraction."""
        with torch.no_grad():
            log_ratio_B = self.accelerator.gather((log_ratio_BT * mask_BT).sum(1))
        size = effective_sample_size(log_ratio_B).item() / log_ratio_B.numel()
        self._metrics["train"]["sampling/behaviour_drift"].append(log_ratio_B.mean().item())
        self._metrics["train"]["sampling/effective_sample_size"].append(size)


@dataclass(frozen=True)
class Tokens:
    """What a KL loss may look at: one micro-batch, `(B, T)`, log-probabilities in nats.

    `logits` returns those of the current policy and of the reference, `(B, T, V)`, divided by the
    temperature; it costs one more forward pass of each.
    """

    logp_BT: Tensor
    old_logp_BT: Tensor
    ref_logp_BT: Tensor
    mask_BT: Tensor
    baseline_BT: Tensor | None
    logits: Callable[[], tuple[Tensor, Tensor]]


class CreditTrainer(ScheduledTrainer):
    """Replaces what TRL multiplies with log-probabilities, and the KL it adds.

    A method overrides `credit` (and `labels`, if credit compares more than rewards), `token_credit`
    or `kl_loss`; what it leaves alone is TRL's.
    """

    @property
    def min_samples(self) -> int:
        """The smallest group that has a credit."""
        return 2

    @property
    def owns_kl(self) -> bool:
        """Whether `kl_loss` takes the place of TRL's KL."""
        return False

    def credit(self, rewards_PG: Tensor, *labels_PG: Tensor) -> Tensor:
        """`(P, m)` rewards, and what `labels` says of them, to `(P, m)` credit."""
        raise NotImplementedError

    def labels(self, completions: list) -> list[str | None] | None:
        """What completions are compared by inside a group, one per row; None if by nothing."""
        return None

    def token_credit(self, sampled: Round) -> TokenCredit:
        """Credit of the tokens of this process's rows; not asked for in evaluation."""
        raise NotImplementedError

    def kl_loss(self, tokens: Tokens) -> Tensor:
        """`(B, T)` loss per token whose gradient is that of the KL."""
        raise NotImplementedError

    @property
    def _credits_tokens(self) -> bool:
        return type(self).token_credit is not CreditTrainer.token_credit

    def _refuse_unsupported(self) -> None:
        super()._refuse_unsupported()
        if self._credits_tokens:
            refuse_what_branching_lacks(self, sees_images=self._is_vlm)

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        rewards_BF = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        labels = self.labels(completions)
        self._labels_B = None if labels is None else gather_object(labels)
        return rewards_BF

    def _generate_and_score_completions(self, inputs):
        columns = len(inputs[0])
        output = super()._generate_and_score_completions(inputs)
        if self.model.training and self._credits_tokens:
            # What a `rollout_func` adds to a row may be of its completion alone.
            self._credit_tokens(output, alike=len(self._inputs[0]) == columns)
        if type(self).credit is not CreditTrainer.credit:
            credit_PG = self._group_credit(self._rewards_B.view(-1, self.group_size))
            silent = (credit_PG == 0).all(1).float().mean().item()
            self._metrics[self._mode()]["frac_groups_without_credit"].append(silent)
            self._replace_advantages(output, credit_PG.flatten())
        if self.model.training and self.owns_kl and self.args.kl_baseline == "leave_one_out":
            output["kl_baseline"] = self._kl_baseline(output)
        return output

    def _group_credit(self, rewards_PG: Tensor) -> Tensor:
        labels_PG = []
        if self._labels_B is not None:
            number = {label: i for i, label in enumerate(dict.fromkeys(self._labels_B))}
            numbers = [-1 if label is None else number[label] for label in self._labels_B]
            labels_PG = [torch.tensor(numbers, device=rewards_PG.device).view_as(rewards_PG)]
        return credit_of_scorable(self.credit, rewards_PG, *labels_PG, min_samples=self.min_samples)

    def _replace_advantages(self, output: dict, credit_B: Tensor) -> None:
        """Local rows into the batch, all rows into the completions table."""
        output["advantages"] = self._own_rows(credit_B, output["advantages"].size(0))
        self._show_advantages(credit_B)

    def _credit_tokens(self, output: dict, alike: bool) -> None:
        if "tool_mask" in output:
            raise ValueError(
                f"rollout_func returned env_mask, which {type(self).__name__} does not support: "
                "what it continues is the policy's own text. Return completions of one turn."
            )
        mask_BT, B = _loss_mask(output), len(self._inputs)
        first, G = B * self.accelerator.process_index, self.group_size
        sampled = Round(
            rows=self._inputs,
            labels=[(first + row) // G if alike else (row, "alone") for row in range(B)],
            prompt_ids=_unpadded(output["prompt_ids"], output["prompt_mask"]),
            completion_ids=_unpadded(output["completion_ids"], output["completion_mask"]),
            rewards_B=self._own_rows(self._rewards_B, B),
            mask_BT=mask_BT,
            continued=self._continued,
            rewarded=functools.partial(self._rewarded, output),
        )
        told = self.token_credit(sampled)
        assert told.credit_BT.shape == mask_BT.shape, told.credit_BT.shape
        output["advantages"] = told.credit_BT
        mean_B = (told.credit_BT * mask_BT).sum(1) / mask_BT.sum(1).clamp(min=1)
        self._show_advantages(self.accelerator.gather(mean_B))
        self._log_means(told.metrics)
        for name, column in told.columns.items():
            self._logs["extra"][name].extend(gather_object(column))

    def _continued(
        self, prefix_ids: list[list[int]], max_new_tokens: list[int], K: int
    ) -> list[list[list[int]]]:
        """K continuations of each prefix, by TRL's engine or from branches of the model's cache."""
        started = time.perf_counter()
        if self.use_vllm:
            found = self._continued_by_server(prefix_ids, max_new_tokens, K)
        else:
            kwargs = self.args.gradient_checkpointing_kwargs
            with unwrap_model_for_generation(
                self.model_wrapped,
                self.accelerator,
                generation_kwargs=self.generation_kwargs,
                gradient_checkpointing_kwargs=kwargs,
            ) as model:
                found = branch(
                    model,
                    prefix_ids,
                    self.generation_config,
                    branches=K,
                    max_new_tokens=max_new_tokens,
                    eos_token_ids=self.eos_token_ids,
                    rows_per_pass=self.args.rollout_batch_size or len(self._inputs),
                )
        self._metrics["train"]["perf/branching_s"].append(time.perf_counter() - started)
        return found

    def _continued_by_server(
        self, prefix_ids: list[list[int]], max_new_tokens: list[int], K: int
    ) -> list[list[list[int]]]:
        # The engine is asked by all processes together, each with equally many rows.
        most = max(gather_object([len(prefix_ids)]))
        if most == 0:
            return []
        idle = [[self.eos_token_ids[0]]] * (most - len(prefix_ids))
        asked = [ids for ids in [*prefix_ids, *idle] for _ in range(K)]
        told, _ = self._sampled(asked, None, {}, K)
        return [
            [ids[:budget] for ids in told[i * K : (i + 1) * K]]
            for i, budget in enumerate(max_new_tokens)
        ]

    def _rewarded(self, output: dict, places: list[int], completion_ids: list[list[int]]) -> Tensor:
        """Rewards of completions that are not trained on, to the prompts of these rows."""
        if not places:
            return self._rewards_B[:0]
        prompt_ids = _unpadded(output["prompt_ids"], output["prompt_mask"])
        rows = [self._inputs[place] for place in places]
        completions = self._shown(rows, [prompt_ids[place] for place in places], completion_ids)
        prompts, rewards_B, found = [row["prompt"] for row in rows], self._rewards_B, []
        # A reward model reads no more at once than it does of the round itself.
        read_by_model = any(isinstance(function, nn.Module) for function in self.reward_funcs)
        rows_per_pass = len(self._inputs) if read_by_model else len(rows)
        with _own_rows_only():
            for begin in range(0, len(rows), rows_per_pass):
                part = slice(begin, begin + rows_per_pass)
                columns = (rows, prompts, completions, completion_ids)
                self._calculate_rewards(*(column[part] for column in columns))
                found.append(self._rewards_B)
        self._rewards_B = rewards_B
        # What reward functions log is of the completions that are trained on.
        self._pending_extra_logs.clear()
        self._pending_metrics.clear()
        return torch.cat(found)

    def _shown(
        self, rows: list[dict], prompt_ids: list[list[int]], completion_ids: list[list[int]]
    ) -> list:
        """Completions as TRL shows them to reward functions."""
        texts = self.processing_class.batch_decode(completion_ids, skip_special_tokens=True)
        if not trl.is_conversational({"prompt": rows[0]["prompt"]}):
            return texts
        parsers = (getattr(self._tokenizer, f"response_{x}", None) for x in ("template", "schema"))
        if all(parser is None for parser in parsers):
            return [[{"role": "assistant", "content": text}] for text in texts]
        return [
            [grpo_trainer.parse_response(self._tokenizer, ids, prefix=prefix, tools=None)]
            for prefix, ids in zip(prompt_ids, completion_ids, strict=True)
        ]

    def _kl_baseline(self, batch: dict) -> Tensor:
        """KL-to-go of the group's other completions, `(B, T)`, taken before rows are shuffled."""
        mask_BT, (B, T) = _loss_mask(batch), batch["completion_ids"].shape
        if "old_per_token_logps" not in batch:
            with torch.no_grad():
                batch["old_per_token_logps"], *_ = self._get_per_token_logps_and_entropies(
                    self.model, *_joined(batch), T, batch_size=self.args.per_device_train_batch_size
                )
        log_ratio_BT = (batch["old_per_token_logps"] - batch["ref_per_token_logps"]) * mask_BT
        padded_BT = self.accelerator.pad_across_processes(log_ratio_BT, dim=1)
        to_go_TB = kl_to_go(self.accelerator.gather(padded_BT)).T
        groups = to_go_TB.reshape(-1, self.num_generations)
        others_BT = leave_one_out(groups).view_as(to_go_TB).T
        return self._own_rows(others_BT, B)[:, :T]

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        scored = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        self._last_logp_BT: Any = scored[0]  # `_compute_loss` does not return the policy's
        return scored

    def _compute_loss(self, model, inputs):
        self._log_staleness(inputs)
        beta, self.beta = self.beta, 0.0 if self.owns_kl else self.beta
        try:
            loss = super()._compute_loss(model, inputs)
        finally:
            self.beta = beta
        logp_BT, self._last_logp_BT = self._last_logp_BT, None
        if self.model.training and self.args.schedule == "one_step":
            log_ratio_BT = logp_BT - self._sampling_logp(inputs, logp_BT)
            self._log_drift(log_ratio_BT, _loss_mask(inputs))
        if self.beta == 0.0 or not self.owns_kl:
            return loss
        tokens = Tokens(
            logp_BT=logp_BT,
            old_logp_BT=self._sampling_logp(inputs, logp_BT),
            ref_logp_BT=inputs["ref_per_token_logps"],
            mask_BT=_loss_mask(inputs),
            baseline_BT=inputs.get("kl_baseline"),
            logits=functools.partial(self._logits, model, inputs),
        )
        self._log_kl(logp_BT, tokens.ref_logp_BT, tokens.mask_BT)
        return loss + beta * self._reduced(self.kl_loss(tokens), tokens.mask_BT, inputs)

    def _sampling_logp(self, inputs: dict, logp_BT: Tensor) -> Tensor:
        """Log-probabilities of the policy that sampled: the server's own, where it reports them."""
        old_BT = inputs.get("old_per_token_logps", logp_BT.detach())
        if self.use_vllm and self.vllm_importance_sampling_correction:
            sampled_BT = inputs["sampling_per_token_logps"]
            return torch.where(sampled_BT.isnan(), old_BT, sampled_BT)
        return old_BT

    def _log_kl(self, logp_BT: Tensor, ref_logp_BT: Tensor, mask_BT: Tensor) -> None:
        with torch.no_grad():
            k3_BT = k3(logp_BT, ref_logp_BT)
            sums = torch.stack([(k3_BT * mask_BT).sum(), mask_BT.sum()])
            total, count = self.accelerator.reduce(sums, reduction="sum").tolist()
        self._metrics[self._mode()]["kl"].append(total / max(count, 1.0))

    def _reduced(self, loss_BT: Tensor, mask_BT: Tensor, inputs: dict) -> Tensor:
        training = self.model.training
        accumulation = self.current_gradient_accumulation_steps if training else 1
        tokens = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes
        if training:
            tokens = tokens * accumulation / self.args.steps_per_generation
        return reduce_tokens(
            loss_BT,
            mask_BT,
            self.loss_type,
            accumulation=accumulation,
            max_completion_length=self.max_completion_length,
            tokens_per_step=tokens,
        )


@contextmanager
def _own_rows_only() -> Iterator[None]:
    """Keeps TRL from gathering rewards, of which each process may have another number."""
    gather = grpo_trainer.gather
    grpo_trainer.gather = lambda rewards: rewards
    try:
        yield
    finally:
        grpo_trainer.gather = gather


@contextmanager
def _small_tiles(device: torch.device) -> Iterator[None]:
    """Lets TRL's fused head take 2048 columns of the vocabulary at a time on a CPU: without Triton
    some ten copies of a tile live at once, and whole rows of logits would cost less memory."""
    columns = trl_utils._CHUNKED_LOGPROB_CHUNK_SIZE
    trl_utils._CHUNKED_LOGPROB_CHUNK_SIZE = 2048 if device.type == "cpu" else columns
    try:
        yield
    finally:
        trl_utils._CHUNKED_LOGPROB_CHUNK_SIZE = columns


class GroupTrainer(ScheduledTrainer):
    """Hands a method whole groups: one row is one prompt with M of its completions.

    A method overrides `select` and `group_loss`. Groups never split over ranks or micro-batches,
    each micro-batch is trimmed to its own longest prompt and completion, and only selected
    completions are scored.
    """

    _unscored = False
    _preferences_PGG: Tensor | None = None

    @property
    def uses_old_logp(self) -> bool:
        return False

    @property
    def judged_places(self) -> list[tuple[int, int]]:
        """Places (i, j) in a group that a judge compares: all, or each with each opponent's."""
        G = self.group_size
        if self.opponent is None or self.opponent.in_every_row:
            return list(itertools.combinations(range(G), 2))
        return list(itertools.product(range(G // 2), range(G // 2, G)))

    @functools.cached_property
    def snapshots(self) -> dict[str, nn.Module]:
        """Frozen copies of earlier policies, by name; they are part of a checkpoint."""
        return {}

    @functools.cached_property
    def replay_buffer(self) -> ReplayBuffer:
        """Rounds that may be trained on again; none unless a method says so."""
        return ReplayBuffer(0, 0.0)

    def begin_round(self) -> None:
        """Called before a round is sampled."""

    def also_scored(self) -> dict[str, nn.Module]:
        """Further models whose summed log-probabilities `(P, M)` the loss finds in `stored`."""
        return {}

    def given_scores(self, inputs: list, completion_ids: list) -> list[float | None]:
        """Scores that no reward function gives, one per row; empty where there are none."""
        return []

    def shaped_rewards(self, rewards_PG: Tensor, truncated_PG: Tensor) -> Tensor:
        """Rewards of this process's groups as they are compared; `truncated`: without an EOS."""
        return rewards_PG

    def select(
        self, rewards_PG: Tensor, preferences_PGG: Tensor | None, rows: list[dict[str, Any]]
    ) -> Selection:
        """From the scores of this process's groups to what is trained on; `rows` are those of the
        dataset, one per completion."""
        raise NotImplementedError

    def rewritten(self, output: dict, kept: Selection, rows: list[dict[str, Any]]) -> dict:
        """The batch of completions `(B, ...)` as it is trained on, if not as it was sampled."""
        return output

    def group_loss(self, group: Group) -> tuple[Tensor, Metrics]:
        """`(P,)` loss per prompt in nats, and metrics: name to values and their weights."""
        raise NotImplementedError

    def _refuse_unsupported(self) -> None:
        super()._refuse_unsupported()
        if self._is_vlm:
            raise ValueError(
                f"{type(self).__name__} does not support vision-language models: images are not "
                "kept with a group. Use trl_ext.GRPOTrainer."
            )
        sizes = {"per_device_train_batch_size": self.num_generations}
        if self.eval_dataset is not None:
            sizes["per_device_eval_batch_size"] = self.num_generations_eval
        for name, G in sizes.items():
            if getattr(self.args, name) % G or G < 2:
                raise ValueError(
                    f"{name}={getattr(self.args, name)} must be a multiple of the {G} completions "
                    "per prompt, at least 2: a group must not split over micro-batches or ranks. "
                    f"Change {name}, num_generations or num_generations_eval."
                )
        self._refuse_further_writers()

    def _refuse_further_writers(self) -> None:
        """Completions of the dataset and of an opponent are whole after one turn."""
        given = {
            "tools": self.tools,
            "environment_factory": self.environment_factories,
            "use_transformers_continuous_batching": self.use_transformers_continuous_batching,
            # Which may well answer in an opponent's place.
            "rollout_func": self.rollout_func if self.opponent is None else None,
        }
        for name, value in given.items():
            if value and self.args.other_writer is not None:
                raise ValueError(
                    f"{name} is not supported with {self.args.other_writer}, which says itself who "
                    "writes the completions, each in one turn. Leave it unset."
                )

    def take_snapshot(self, name: str) -> None:
        """Keeps the policy of now under a name, in place of what had it before."""
        policy = self.accelerator.unwrap_model(self.model)
        if name not in self.snapshots:
            if self.sharded or is_peft_model(policy):
                raise ValueError(
                    f"{type(self).__name__} with these options keeps copies of the policy, which "
                    "is not supported with FSDP, DeepSpeed or an adapter. Train all weights, DDP."
                )
            copied = _copied(policy).requires_grad_(False)
            copied.gradient_checkpointing_disable()  # it only samples and scores
            grpo_trainer.add_fused_lm_head(copied, temperature=self.args.scoring_temperature)
            self.snapshots[name] = copied
        self.snapshots[name].load_state_dict(policy.state_dict())

    @property
    def _past(self) -> list[dict[str, Any]]:
        return self.replay_buffer.rounds

    @_past.setter
    def _past(self, rounds: list[dict[str, Any]]) -> None:
        self.replay_buffer.rounds = rounds

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if self.args.should_save:
            for name, model in self.snapshots.items():
                save_policy(output_dir, model, name)

    def _load_own_state(self, state: dict[str, Any]) -> None:
        # First: a sampler that works ahead may sample with one of them.
        for name in state.get("snapshots", ()):
            self.take_snapshot(name)
            load_policy(self._resumed_from, self.snapshots[name], name)
        super()._load_own_state(state)

    def _own_state(self) -> dict[str, Any]:
        return super()._own_state() | {"snapshots": list(self.snapshots)}

    def _tokenize_prompts(self, prompts):
        if "prompt_ids" in self._inputs[0]:  # recorded by an earlier run
            return [list(row["prompt_ids"]) for row in self._inputs], None, {}
        return super()._tokenize_prompts(prompts)

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        self._preferences_PGG, self._given_scores = (
            None,
            self.given_scores(inputs, completion_ids_list),
        )
        if self.args.asks_judge:
            self._ask_judge(prompts, completions)
        return super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)

    def _ask_judge(self, prompts: list, completions: list) -> None:
        judge, places = resolve(self.args.judge, "judge"), self.judged_places
        both_orders = self.args.judge_both_orders
        told_PGG, inconsistent = judged(
            judge, prompts, completions, self.group_size, places, both_orders
        )
        if both_orders:
            mean = self.accelerator.reduce(
                torch.tensor(inconsistent, device=self.accelerator.device), reduction="mean"
            )
            self._metrics[self._mode()]["judge/inconsistency"].append(mean.item())
        self._preferences_PGG = told_PGG.to(self.accelerator.device)
        self._given_scores = win_rates(told_PGG).flatten().tolist()

    def _get_per_token_logps_and_entropies(self, model, input_ids, mask, logits_to_keep, **kwargs):
        if self._unscored:  # TRL would score all completions; ours are scored once selected
            logp_BT = torch.zeros_like(input_ids[:, -logits_to_keep:], dtype=torch.float32)
            return logp_BT, None, None
        with _small_tiles(self.accelerator.device):
            return super()._get_per_token_logps_and_entropies(
                model, input_ids, mask, logits_to_keep, **kwargs
            )

    def _generate_and_score_completions(self, inputs):
        beta, self.beta, self._unscored = self.beta, 0.0, True
        try:
            output = super()._generate_and_score_completions(inputs)
        finally:
            self.beta, self._unscored = beta, False
        # With schedule="one_step" these are the prompts of the round before.
        inputs, G = self._inputs, self.group_size
        if "tool_mask" in inputs[0]:
            output["tool_mask"] = recorded_tool_mask(inputs, output["completion_mask"], G)
        truncated_PG = without_eos(output, self.eos_token_ids).view(-1, G)
        rewards_PG = self._own_rows(self._rewards_B, len(inputs)).view(-1, G)
        rewards_PG = self.shaped_rewards(rewards_PG, truncated_PG)
        if self.args.judge == "bradley_terry":
            self._preferences_PGG = bradley_terry(rewards_PG)
        kept = self.select(rewards_PG, self._preferences_PGG, inputs)
        self._show_advantages(self.accelerator.gather(kept.role_PG.flatten().contiguous()))
        scored = self.rewritten({**output, "old_logp": self._behaviour_BT}, kept, inputs)
        return grouped(scored, rewards_PG, kept, inputs, named=self.args.record_path is not None)

    def _prepare_inputs(self, generation_batch):
        if not self.model.training:
            return self._scored(self._generate_and_score_completions(generation_batch))
        n = self.args.steps_per_generation
        if self._step % (n * self.num_iterations) == 0 or self._buffered_inputs is None:
            self.begin_round()
            batch: Any = self._generate_and_score_completions(generation_batch)
            batch = self.replay_buffer.exchange(batch)
            if "prompt_ids" not in self._inputs[0]:  # a record is replayed in its own order
                batch = shuffle_sequence_dict(batch)
            self._buffered_inputs = [self._scored(part) for part in split_tensor_dict(batch, n)]
            if self.args.record_path is not None:
                self._record_round()
        return self._buffered_inputs[self._step % n]

    def _record_round(self) -> None:
        rank, window = self.accelerator.process_index, self.args.steps_per_generation
        rows = [row for part in self._buffered_inputs for row in record_rows(part)]
        number = self._step // (window * self.num_iterations)
        write_round(self.args.record_path, number, rank, self.state.global_step, rows)

    def _scored(self, batch: dict) -> dict:
        """A micro-batch with what the reference and, where asked for, the sampling policy say."""
        batch = trimmed(batch)
        (P, M, T), rows = batch["completion_ids"].shape, flattened(batch)
        off_policy = self.args.gradient_accumulation_steps % (
            self.args.steps_per_generation * self.num_iterations
        )
        options = self.args.gradient_checkpointing_kwargs
        with torch.no_grad(), disable_gradient_checkpointing(self.model, options):
            if self.beta != 0.0:
                with self._reference() as reference:
                    batch["ref_logp"] = self._logp(reference, rows).view(P, M, T)
            if self.uses_old_logp and off_policy and "old_logp" not in batch:
                batch["old_logp"] = self._logp(self.model, rows).view(P, M, T)
            if self.opponent is not None and self.opponent.in_every_row:
                mixed_BT = self._mixture_logp(rows, self.opponent.coefficient)
                batch["sampled_logp"] = mixed_BT.view(P, M, T)
            for name, scorer in self.also_scored().items():
                batch[name] = (self._logp(scorer, rows) * _loss_mask(rows)).sum(1).view(P, M)
        return batch

    def _mixture_logp(self, rows: dict, coefficient: float) -> Tensor:
        """`(B, T)`: of the sampled tokens under the mixture of policy and reference."""
        logp_BTV = mixed_logps(*self._logits(self.model, rows), coefficient)
        return logp_BTV.gather(-1, rows["completion_ids"].unsqueeze(-1)).squeeze(-1)

    def _logp(self, model: Any, rows: dict) -> Tensor:
        T = rows["completion_ids"].size(1)
        return self._get_per_token_logps_and_entropies(model, *_joined(rows), T)[0]

    def _compute_loss(self, model, inputs):
        rows, (P, M, T) = flattened(inputs), inputs["completion_ids"].shape
        mask_BT = _loss_mask(rows)
        score = cast(Any, self._get_per_token_logps_and_entropies)
        logp_BT, entropy_BT, aux_loss = score(
            model, *_joined(rows), T, compute_entropy=True, compute_aux_loss=self.aux_loss_enabled
        )
        now_BT: Tensor = logp_BT.detach()
        ref_BT, old_BT = rows.get("ref_logp", now_BT), rows.get("old_logp", now_BT)
        old_BT = torch.where(old_BT.isnan(), now_BT, old_BT)  # a server may not tell
        logp, ref, old, mask = (x.view(P, M, T) for x in (logp_BT, ref_BT, old_BT, mask_BT))
        logits = functools.partial(self._logits, model, rows)
        group = Group(logp, ref, old, mask, inputs, logits)
        loss_P, metrics = self.group_loss(group)
        assert loss_P.shape == (P,), loss_P.shape
        sampled_BT = mask_BT * (1 - rows["answer_mask"]) if "answer_mask" in rows else mask_BT
        metrics = {**metrics, "entropy": (entropy_BT, sampled_BT)}
        if "ref_logp" in rows:
            metrics["kl"] = (k3(now_BT, ref_BT), sampled_BT)
        if self.model.training:
            self._log_staleness(inputs)
            if "old_logp" in rows:
                self._log_drift(logp_BT - old_BT, sampled_BT)
        self._log_means(metrics)
        loss = loss_P.mean()
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * aux_loss
        accumulation = self.current_gradient_accumulation_steps if self.model.training else 1
        return loss / accumulation


def _loss_mask(batch: dict) -> Tensor:
    mask_BT = batch["completion_mask"]
    return mask_BT * batch["tool_mask"] if "tool_mask" in batch else mask_BT


def _unpadded(ids: Tensor, mask: Tensor) -> list[list[int]]:
    return [row[kept].tolist() for row, kept in zip(ids, mask.bool(), strict=True)]


def _joined(batch: dict) -> tuple[Tensor, Tensor]:
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    return ids, torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
