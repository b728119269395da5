"""The model card: content, metadata, and the checks that need no network."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers.utils import logging

from trl_ext.cards.facts import LOCAL_PATH, TOKEN, hub_id

logger = logging.get_logger(__name__)

TEMPLATE = Path(__file__).with_name("model_card.md.jinja")
REQUIRED_KEYS = ("language", "library_name", "pipeline_tag", "tags")
REQUIRED_TAGS = ("trl", "trl_ext")
# "None" where a value should stand: in a cell, a link or after a colon, not in a sentence.
EMPTY = re.compile(r"(?m)[|\[(/:]\s*None\s*(?:[|\])]|$)")


@dataclass(frozen=True)
class Paper:
    """The paper of the method; the fields are those of a TRL trainer's `_paper`."""

    title: str
    id: str
    citation: str


@dataclass(frozen=True)
class Result:
    """One number of an evaluation, with what is needed to judge it.

    Args:
        dataset: Hub id of the evaluated dataset, or a plain name if it is not on the Hub.
        metric: Name of the metric, for instance `"pass@16"`.
        value: Estimate of the metric, finite.
        standard_error: Standard error of `value`, ≥ 0; None if it was not estimated.
        n: Number of problems behind `value`; None if it is not known.
        task: Task id of the Hub.
        config: Configuration of the dataset.
        split: Split of the dataset.
    """

    dataset: str
    metric: str
    value: float
    standard_error: float | None = None
    n: int | None = None
    task: str = "text-generation"
    config: str | None = None
    split: str | None = None

    @property
    def interval(self) -> str:
        """The normal 95 % interval, or nothing where no standard error was estimated."""
        if self.standard_error is None:
            return ""
        half_width = 1.96 * self.standard_error
        return f"{self.value - half_width:.3f} to {self.value + half_width:.3f}"


@dataclass(frozen=True)
class CardContent:
    """All that a model card says.

    Args:
        title: Name of the model, without its owner.
        method: The method's plain name, as in the tags: `"pass-at-k"`.
        method_name: The method as a sentence names it: `"Pass@k policy gradient"`.
        summary: One paragraph: what the model is.
        paper: Paper of the method.
        model_id: Where the model can be loaded from, for the usage snippet.
        base_model: Hub id of the model that was trained; None for a local or new one.
        datasets: Hub ids of the training data.
        dataset_note: A sentence on data that has no Hub id.
        license: Licence id of the Hub, such as `"apache-2.0"`. None leaves it out, with a warning:
            only the owner of the weights can say it.
        language: Languages as ISO 639 codes.
        tags: Further tags.
        library_name: `"transformers"`, or `"peft"` for an adapter.
        pipeline_tag: Task id of the Hub.
        hyperparameters: Options of the run, from `hyperparameters_of`.
        training: Hardware, time, number of examples: free rows for the training section.
        versions: Library versions, from `framework_versions`.
        results: Evaluation results.
        figures: Pairs of file name beside the card and caption.
        intended_use: What the model is for.
        limitations: What it is not for, and what was not measured.
        usage: Python code that loads and asks the model; built from `model_id` if empty.
        chat: Whether the model is asked in messages or continues a text.

    Raises:
        ValueError: If a field would put a local path, a token or "None" on the card.
    """

    title: str
    method: str
    method_name: str = ""
    summary: str = ""
    paper: Paper | None = None
    model_id: str = ""
    base_model: str | None = None
    datasets: tuple[str, ...] = ()
    dataset_note: str = ""
    license: str | None = None
    language: tuple[str, ...] = ("en",)
    tags: tuple[str, ...] = ()
    library_name: str = "transformers"
    pipeline_tag: str = "text-generation"
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    results: tuple[Result, ...] = ()
    figures: tuple[tuple[str, str], ...] = ()
    intended_use: str = ""
    limitations: str = ""
    usage: str = ""
    chat: bool = True

    def __post_init__(self) -> None:
        if self.base_model is not None and hub_id(self.base_model) != self.base_model:
            raise ValueError(
                f"base_model={self.base_model!r} is a local path or no Hub id, and the Hub would "
                "link to nothing. Pass `hub_id(name_or_path)`, which gives None for such a model."
            )
        for dataset in self.datasets:
            if hub_id(dataset) != dataset:
                raise ValueError(
                    f"datasets={self.datasets!r}: {dataset!r} is a local path or no Hub id. "
                    "Leave it out and describe the data in `dataset_note`."
                )
        for name, _ in self.figures:
            if Path(name).name != name:
                raise ValueError(
                    f"figures: {name!r} is not a plain file name, and the link would break on the "
                    "Hub. Save the figure beside the card and pass its name."
                )


def model_card(content: CardContent) -> ModelCard:
    """Renders a card whose metadata the Hub accepts.

    Args:
        content: What the card says.

    Returns:
        The card. Sections without content are left out, never filled with "None".

    Raises:
        ValueError: If the result would show a token, a local path or an empty value.
    """
    if content.license is None:
        logger.warning_once(
            f"The model card of {content.title!r} states no licence, because none was given. Pass "
            "`license`, or add the key `license` to the card before you publish the model."
        )
    usage = content.usage.strip() or _usage(content)
    rendered = ModelCard.from_template(
        _metadata(content), template_path=str(TEMPLATE), content=content, usage=usage, cell=_cell
    )
    text = re.sub(r"\n{3,}", "\n\n", str(rendered))  # sections left out leave their blank lines
    if problems := card_problems(text):
        raise ValueError(f"The model card of {content.title!r} is not fit to publish: {problems}.")
    return ModelCard(text)


def write_model_card(content: CardContent, folder: str | Path) -> Path:
    """Writes the card as `README.md` into the folder and returns its path."""
    path = Path(folder) / "README.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    model_card(content).save(path)
    return path


def card_problems(text: str) -> list[str]:
    """Checks a card without the network, for what the Hub would refuse or a reader would regret.

    Args:
        text: The whole card, metadata block included.

    Returns:
        One sentence per problem; empty for a good card.
    """
    data = ModelCard(text, ignore_metadata_errors=True).data.to_dict()
    problems = [f"metadata lacks `{key}`" for key in REQUIRED_KEYS if not data.get(key)]
    problems += [f"tag `{t}` is missing" for t in REQUIRED_TAGS if t not in data.get("tags", [])]
    problems += [f"`{key}` is empty" for key, value in data.items() if value in ("None", "", [])]
    if "licence" in data:
        problems.append("`licence` is a key that the Hub does not read: write `license`")
    bases = data.get("base_model") or []
    for name in [bases] if isinstance(bases, str) else bases:
        if hub_id(name) != name:
            problems.append(f"base_model {name!r} is not a Hub id")
    if TOKEN.search(text):
        problems.append("it contains an access token")
    problems += [f"it shows the local path {found!r}" for found in LOCAL_PATH.findall(text)]
    if EMPTY.search(text):
        problems.append('it says "None"')
    return problems


def _metadata(content: CardContent) -> ModelCardData:
    tags = dict.fromkeys((*REQUIRED_TAGS, content.method, *content.tags))
    return ModelCardData(
        language=list(content.language),
        license=content.license,
        library_name=content.library_name,
        pipeline_tag=content.pipeline_tag,
        base_model=content.base_model,
        datasets=list(content.datasets) or None,
        metrics=list(dict.fromkeys(result.metric for result in content.results)) or None,
        tags=list(tags),
        model_name=content.title if content.results else None,
        eval_results=[_eval_result(result) for result in content.results] or None,
    )


def _eval_result(result: Result) -> EvalResult:
    return EvalResult(
        task_type=result.task,
        dataset_type=result.dataset,
        dataset_name=result.dataset.split("/")[-1],
        dataset_config=result.config,
        dataset_split=result.split,
        metric_type=result.metric,
        metric_name=result.metric,
        metric_value=round(result.value, 6),
    )


def _usage(content: CardContent) -> str:
    asked = "What is 7 times 12?"
    question = f'[{{"role": "user", "content": "{asked}"}}]' if content.chat else f'"{asked}"'
    return (
        "from transformers import pipeline\n\n"
        f'generator = pipeline("text-generation", model="{content.model_id or content.title}")\n'
        f"question = {question}\n"
        "answer = generator(question, max_new_tokens=256, return_full_text=False)\n"
        'print(answer[0]["generated_text"])'
    )


def _cell(value: Any) -> str:
    """Makes a value safe inside a Markdown table."""
    return str(value).replace("|", "\\|").replace("\n", " ")
