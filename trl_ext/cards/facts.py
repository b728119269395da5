"""What a card may say of a run: Hub ids, options, versions; never a path of the user's machine."""

import dataclasses
import re
from importlib import metadata
from pathlib import Path
from typing import Any

from huggingface_hub.utils import HFValidationError, validate_repo_id
from transformers import TrainingArguments

# Keys of Hugging Face, GitHub, OpenAI and AWS, as secret scanners describe them.
TOKEN = re.compile(
    r"hf_[A-Za-z0-9]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|sk-[A-Za-z0-9_-]{20,}"
    r"|AKIA[0-9A-Z]{16}"
)
LOCAL_PATH = re.compile(r"(?<![\w/:.])(?:/[\w.@-]+){2,}|(?<!\w)[A-Za-z]:\\|file://|(?<!\w)~/")

ALWAYS = (
    *("learning_rate", "lr_scheduler_type", "warmup_steps", "max_steps", "num_train_epochs"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "num_generations"),
    *("max_completion_length", "temperature", "top_p", "top_k", "beta", "loss_type", "seed"),
)
PLACES = (
    *("output_dir", "logging_dir", "run_name", "hub_token", "hub_model_id", "project"),
    *("resume_from_checkpoint", "trackio_space_id", "vllm_server_base_url", "vllm_server_host"),
)
COMFORT = ("disable_tqdm", "report_to", "debug", "dataloader_pin_memory", "push_to_hub")


def hub_id(name_or_path: str | None) -> str | None:
    """Returns `name_or_path` if it can be an id on the Hub, None if it is a local path or nothing.

    Args:
        name_or_path: What `from_pretrained` was given. A name that is also a folder here counts as
            local, as it does for `from_pretrained`.
    """
    if not name_or_path or Path(name_or_path).exists():
        return None
    try:
        validate_repo_id(name_or_path)
    except HFValidationError:
        return None
    return name_or_path


def hub_dataset_id(dataset: Any) -> str | None:
    """Returns the Hub id from which a `datasets.Dataset` was downloaded, None if it was made here.

    The download record of `dataset.info` is the only place where `datasets` keeps the owner's name.
    """
    sources = getattr(getattr(dataset, "info", None), "download_checksums", None) or {}
    for source in sources:
        if found := re.match(r"hf://datasets/([^@/]+(?:/[^@/]+)?)@", str(source)):
            return hub_id(found[1])
    return None


def hyperparameters_of(args: TrainingArguments) -> dict[str, Any]:
    """Returns the options a reader needs to repeat the run: the main ones and every changed one.

    Places (folders, servers, run names), comforts of the console, and values that are a path or a
    token are left out.
    """
    options = {}
    for field in dataclasses.fields(args):
        value = getattr(args, field.name)
        value = getattr(value, "value", value)  # transformers keeps enumerations
        told = field.name in ALWAYS or value != _default(field)
        plain = isinstance(value, (bool, int, float, str, list, tuple, dict))
        if told and plain and field.name not in PLACES + COMFORT and not is_private(str(value)):
            options[field.name] = value
    return options


def _default(field: dataclasses.Field) -> Any:
    factory = field.default_factory
    return field.default if factory is dataclasses.MISSING else factory()


def is_private(text: str) -> bool:
    """Says whether the text holds an access token or a path of the machine it was written on."""
    return bool(TOKEN.search(text) or LOCAL_PATH.search(text))


def framework_versions() -> dict[str, str]:
    """Returns the installed versions of the libraries that decide what a training run computes."""
    names = ("trl-ext", "trl", "transformers", "torch", "datasets", "peft", "accelerate")
    return {name: metadata.version(name) for name in names}
