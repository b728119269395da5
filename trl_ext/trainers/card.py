"""What a trainer can say of its model when a card is written."""

import dataclasses
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import trl
from accelerate.utils import is_peft_model

from trl_ext.cards import (
    CardContent,
    Paper,
    Result,
    framework_versions,
    hub_dataset_id,
    hub_id,
    hyperparameters_of,
)

OF_THE_MACHINE = {"record_path", "sampler_device", "sampler_timeout"}  # nothing of the model


def trainer_card(
    trainer: Any, model_name: str | None, dataset_name: str | None, tags: Sequence[str]
) -> CardContent:
    """The card's content as far as the run knows it: no licence, no claim that nobody measured.

    Args:
        trainer: any trainer of trl_ext.
        model_name: title of the card; by default the Hub's name of the model, or its folder's.
        dataset_name: Hub id of the training data; found in the dataset's record if not given.
        tags: further tags.
    """
    model, args = trainer.accelerator.unwrap_model(trainer.model), trainer.args
    adapter = is_peft_model(model)
    if adapter:
        base = next(iter(model.peft_config.values())).base_model_name_or_path
    else:
        base = model.config._name_or_path
    dataset = hub_id(dataset_name) or hub_dataset_id(trainer.train_dataset)
    title = model_name or Path(args.hub_model_id or args.output_dir).name
    return CardContent(
        title=title,
        method=trainer._tag_names[-1],
        method_name=trainer._name,
        summary=f"A causal language model post-trained with {trainer._name}.",
        paper=Paper(**trainer._paper),
        model_id=args.hub_model_id or title,
        base_model=hub_id(base),
        datasets=(dataset,) if dataset else (),
        dataset_note="" if dataset else "Made for this run; not on the Hub.",
        tags=tuple(tags),
        library_name="peft" if adapter else "transformers",
        chat=getattr(trainer.processing_class, "chat_template", None) is not None,
        hyperparameters={**hyperparameters_of(args), **_own_options(args)},
        training=_run_facts(trainer),
        versions=framework_versions(),
        results=results_of(trainer.state.log_history, dataset or "held-out set"),
    )


def results_of(log_history: list[dict[str, Any]], dataset: str) -> tuple[Result, ...]:
    """The latest evaluation: every number that was logged with its standard error."""
    rows = [row for row in log_history if any(key.endswith("_se") for key in row)]
    if not rows:
        return ()
    names = [key for key in rows[-1] if f"{key}_se" in rows[-1]]
    return tuple(
        Result(
            dataset=dataset,
            metric=name.removeprefix("eval_"),
            value=rows[-1][name],
            standard_error=rows[-1][f"{name}_se"],
        )
        for name in names
    )


def _own_options(args: Any) -> dict[str, Any]:
    """Options that TRL does not have, told whether changed or not."""
    ours, host = (
        {field.name for field in dataclasses.fields(c)} for c in (type(args), trl.GRPOConfig)
    )
    told = ours - host - OF_THE_MACHINE
    return {k: v for k, v in args.to_dict().items() if k in told and v is not None}


def _run_facts(trainer: Any) -> dict[str, Any]:
    device = trainer.accelerator.device
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    facts = {
        "Hardware": f"{trainer.accelerator.num_processes} × {device.type} ({hardware})",
        "Optimizer steps": trainer.state.global_step,
        "Tokens": trainer.state.num_input_tokens_seen,
    }
    seconds = [row["train_runtime"] for row in trainer.state.log_history if "train_runtime" in row]
    if seconds:
        facts["Time"] = f"{seconds[-1]:.0f} s"
    return facts
