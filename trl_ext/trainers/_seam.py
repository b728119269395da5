"""The only file that knows TRL's private methods.

Three classes, one concern each, stacked in the order in which a run meets them:
`ConstructedTrainer` builds what TRL builds wrongly or not at all, `ResumableTrainer` makes a
checkpoint hold the whole run, `CreditTrainer` lets a method replace the advantages and the KL.
With no method bound to it the stack computes what TRL computes, bit for bit; the one exception is
a model with absolute positions and left-padded prompts, which TRL scores at shifted positions.
"""

import copy
import functools
import inspect
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import trl
from accelerate.utils import broadcast_object_list, gather_object, is_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerState
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl.trainer import grpo_trainer
from trl.trainer.utils import get_config_model_id, use_adapter

from trl_ext.cards import write_model_card
from trl_ext.objectives.baselines import leave_one_out
from trl_ext.objectives.kl import k3, kl_to_go
from trl_ext.objectives.reduce import reduce_tokens
from trl_ext.objectives.scorable import credit_of_scorable
from trl_ext.runtime.exact_state import (
    load_exact_state,
    load_reference,
    save_exact_state,
    save_reference,
)
from trl_ext.runtime.guards import NonFiniteGuard
from trl_ext.runtime.host import check_host
from trl_ext.runtime.manifest import sound_checkpoint, write_manifest
from trl_ext.trainers.card import trainer_card

check_host()
_HOST_INIT = trl.GRPOTrainer.__init__


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
        kwargs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
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
    max_completion_length: Any
    num_generations: Any

    @functools.wraps(_HOST_INIT)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = inspect.signature(_HOST_INIT).bind(self, *args, **kwargs).arguments
        del given["self"]
        given["args"] = self._checked_config(given["model"], given.get("args"))
        with _reference_copied_from(given["model"]):
            super().__init__(**given)
        self._refuse_unsupported()
        for model in (self.model, self.ref_model):
            if model is not None and _has_absolute_positions(self.accelerator.unwrap_model(model)):
                model.register_forward_pre_hook(_number_positions, with_kwargs=True)
        self.add_callback(NonFiniteGuard())
        for callback in self.callback_handler.callbacks:
            if hasattr(callback, "attach"):
                callback.attach(self)

    def _refuse_unsupported(self) -> None:
        """What only the built model and its launcher tell."""
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if self.args.sync_ref_model and sharded:
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
        return rewards_BF


class ResumableTrainer(ConstructedTrainer):
    """A resumed run equals the uninterrupted one to the bit, at every step.

    TRL's checkpoint lacks the generation window in use, its position in it, the metrics gathered
    since the last log, how often the prompts were shuffled, where in a stream of prompts it stands,
    and a reference that moved.
    """

    _sampler: Any = None
    _tr_loss: Any

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
            save_reference(output_dir, self.accelerator.unwrap_model(self.ref_model))
        values = {
            "step": self._step,
            "tr_loss": self._tr_loss.item(),
            "total_loss": self._total_loss_scalar,
            "last_logged": self._globalstep_last_logged,
            "metrics": self._metrics["train"],
            "logs": self._logged_completions(),
        }
        save_exact_state(output_dir, self.args.process_index, self._buffered_inputs, values)

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
        state = load_exact_state(checkpoint, self.args.process_index, self.accelerator.device)
        if state is None:
            return
        if self.args.sync_ref_model:
            load_reference(checkpoint, self.accelerator.unwrap_model(self.ref_model))
        self._buffered_inputs, values = state
        self._step = values["step"]
        self._tr_loss = torch.tensor(values["tr_loss"], device=self.args.device)
        self._total_loss_scalar = values["total_loss"]
        self._globalstep_last_logged = values["last_logged"]
        self._metrics["train"] = defaultdict(list, values["metrics"])
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


class CreditTrainer(ResumableTrainer):
    """Replaces what TRL multiplies with log-probabilities, and the KL it adds.

    A method overrides `credit` (and `labels`, if credit compares more than rewards) or `kl_loss`;
    what it leaves alone is TRL's.
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

    def kl_loss(self, tokens: Tokens) -> Tensor:
        """`(B, T)` loss per token whose gradient is that of the KL."""
        raise NotImplementedError

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        rewards_BF = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        rewards_B = (rewards_BF * self.reward_weights.to(rewards_BF.device)).nansum(1)
        self._rewards_B = rewards_B.masked_fill(rewards_BF.isnan().all(1), torch.nan)
        labels = self.labels(completions)
        self._labels_B = None if labels is None else gather_object(labels)
        return rewards_BF

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        training = self.model.training
        G = self.num_generations if training else self.num_generations_eval
        if type(self).credit is not CreditTrainer.credit:
            credit_PG = self._group_credit(self._rewards_B.view(-1, G))
            silent = (credit_PG == 0).all(1).float().mean().item()
            metrics = self._metrics["train" if training else "eval"]
            metrics["frac_groups_without_credit"].append(silent)
            self._replace_advantages(output, credit_PG.flatten())
        if training and self.owns_kl and self.args.kl_baseline == "leave_one_out":
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
        rows = output["advantages"].size(0)
        start = self.accelerator.process_index * rows
        output["advantages"] = credit_B[start : start + rows]
        logged = self._logs["advantages"]
        for _ in range(min(len(logged), credit_B.numel())):
            logged.pop()
        logged.extend(credit_B.tolist())

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
        start = self.accelerator.process_index * B
        return others_BT[start : start + B, :T]

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        scored = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        self._last_logp_BT: Any = scored[0]  # `_compute_loss` does not return the policy's
        return scored

    def _compute_loss(self, model, inputs):
        if self.beta == 0.0 or not self.owns_kl:
            return super()._compute_loss(model, inputs)
        beta, self.beta = self.beta, 0.0
        try:
            loss = super()._compute_loss(model, inputs)
        finally:
            self.beta = beta
        logp_BT, self._last_logp_BT = self._last_logp_BT, None
        tokens = Tokens(
            logp_BT=logp_BT,
            old_logp_BT=self._sampling_logp(inputs, logp_BT),
            ref_logp_BT=inputs["ref_per_token_logps"],
            mask_BT=_loss_mask(inputs),
            baseline_BT=inputs.get("kl_baseline"),
            logits=functools.partial(self._logits, model, inputs),
        )
        self._log_kl(tokens)
        return loss + beta * self._reduced(self.kl_loss(tokens), tokens.mask_BT, inputs)

    def _sampling_logp(self, inputs: dict, logp_BT: Tensor) -> Tensor:
        """Log-probabilities of the policy that sampled: the server's own, where it reports them."""
        old_BT = inputs.get("old_per_token_logps", logp_BT.detach())
        if self.use_vllm and self.vllm_importance_sampling_correction:
            sampled_BT = inputs["sampling_per_token_logps"]
            return torch.where(sampled_BT.isnan(), old_BT, sampled_BT)
        return old_BT

    def _log_kl(self, tokens: Tokens) -> None:
        with torch.no_grad():
            k3_BT = k3(tokens.logp_BT, tokens.ref_logp_BT)
            sums = torch.stack([(k3_BT * tokens.mask_BT).sum(), tokens.mask_BT.sum()])
            total, count = self.accelerator.reduce(sums, reduction="sum").tolist()
        mode = "train" if self.model.training else "eval"
        self._metrics[mode]["kl"].append(total / max(count, 1.0))

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

    def _logits(self, model: nn.Module, batch: dict) -> tuple[Tensor, Tensor]:
        policy = self._tempered_logits(model, batch)
        with torch.no_grad():
            if self.ref_model is not None:
                return policy, self._tempered_logits(self.ref_model, batch)
            unwrapped: Any = self.accelerator.unwrap_model(self.model)
            with use_adapter(unwrapped, "ref" if "ref" in unwrapped.peft_config else None):
                return policy, self._tempered_logits(self.model, batch)

    def _tempered_logits(self, model: nn.Module, batch: dict) -> Tensor:
        ids, mask = _joined(batch)
        T = batch["completion_ids"].size(1)
        with self.accelerator.autocast():
            out = model(input_ids=ids, attention_mask=mask, logits_to_keep=T + 1, use_cache=False)
        return out.logits[:, :-1].float() / self.temperature


def _loss_mask(batch: dict) -> Tensor:
    mask_BT = batch["completion_mask"]
    return mask_BT * batch["tool_mask"] if "tool_mask" in batch else mask_BT


def _joined(batch: dict) -> tuple[Tensor, Tensor]:
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    return ids, torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
