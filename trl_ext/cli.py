"""`trl-ext <method> --config run.yaml`: parses, calls public names, decides nothing.

Under accelerate: `accelerate launch -m trl_ext.cli <method> --config run.yaml`.
"""

import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset
from trl import GRPOConfig, GRPOTrainer, ModelConfig, get_peft_config, get_quantization_config

import trl_ext
from trl_ext.parser import StrictParser, refuse_unknown
from trl_ext.resolve import resolve

CAPITAL = re.compile(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
FUNCTION = re.compile(r"[\w.]+:\w+")
COLUMN = re.compile(r"{(\w+)}")


@dataclass
class RunArguments:
    """What a run needs to know beside the trainer's and the model's options."""

    dataset_name: str = field(
        metadata={
            "help": "Dataset on the Hub, a folder, a .json or .jsonl file, or module:function, "
            "which is called with the split."
        }
    )
    dataset_config: str | None = field(
        default=None, metadata={"help": "Configuration of the dataset."}
    )
    dataset_train_split: str = field(
        default="train", metadata={"help": "Split to train on; may be a slice, train[:1000]."}
    )
    dataset_test_split: str | None = field(
        default=None, metadata={"help": "Split to evaluate on; may be a slice, test[:200]."}
    )
    prompt_template: str | None = field(
        default=None,
        metadata={
            "help": "Text of the user's turn, with columns in braces, such as {question}. Without "
            "it the dataset must have a column prompt."
        },
    )
    system_prompt: str | None = field(
        default=None, metadata={"help": "System turn before the prompt template."}
    )
    answer_template: str | None = field(
        default=None,
        metadata={
            "help": "Text of the reference answer, with columns in braces, such as {solution}; it "
            "becomes the column answer. Without it that column is taken as it is."
        },
    )
    dataset_filter: str | None = field(
        default=None,
        metadata={"help": "Rows to keep, as column=value, such as question_type=proof."},
    )
    reward_funcs: list[str] | None = field(
        default=None,
        metadata={
            "help": "Reward functions, each as module:function, or a reward model's name on the "
            "Hub or folder. By default trl_ext.rewards:math_reward, or none where a judge or the "
            "dataset says which completion is better."
        },
    )
    environment_factory: str | None = field(
        default=None,
        metadata={"help": "Environment of TRL's environment_factory, as module:class."},
    )
    eval_generations: int = field(
        default=0,
        metadata={
            "help": "Completions per problem from which pass@k is estimated at each evaluation; 0 "
            "turns it off. Needs dataset_test_split."
        },
    )
    eval_reward_funcs: list[str] | None = field(
        default=None,
        metadata={
            "help": "Reward functions that judge the completions of eval_generations, each as "
            "module:function. By default those that are trained on; a method without any reports "
            "what needs no judge."
        },
    )
    eval_answer_extractor: str | None = field(
        default=None, metadata={"help": "module:function from completion to answer, for maj@k."}
    )

    def __post_init__(self) -> None:
        if self.system_prompt is not None and self.prompt_template is None:
            raise ValueError(
                f"system_prompt={self.system_prompt!r} is not applied without prompt_template: the "
                "column prompt is taken as it is. Set prompt_template, or write it into the data."
            )
        if self.dataset_test_split is None and self.eval_generations:
            raise ValueError(
                f"eval_generations={self.eval_generations} has nothing to evaluate on. Set "
                "dataset_test_split."
            )
        for name in ("eval_answer_extractor", "eval_reward_funcs"):
            if getattr(self, name) is not None and not self.eval_generations:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is not used with eval_generations=0. Set "
                    "eval_generations."
                )
        if self.dataset_filter is not None and "=" not in self.dataset_filter:
            raise ValueError(
                f"dataset_filter={self.dataset_filter!r} names no value. Write column=value."
            )


def methods() -> dict[str, str]:
    """Command of each public trainer, and its class without "Trainer": `"pass-at-k": "PassAtK"`."""
    stems = [name[: -len("Trainer")] for name in trl_ext.__all__ if name.endswith("Trainer")]
    return {CAPITAL.sub("-", stem).lower(): stem for stem in stems}


def load_prompts(run: RunArguments, split: str) -> Dataset:
    """The split with columns `prompt` and `answer`, from the templates where there are some."""
    dataset = load_rows(run, split)
    if run.dataset_filter is not None:
        dataset = matching(dataset, run.dataset_filter)
    for name in ("prompt_template", "answer_template"):
        check_template(name, getattr(run, name), dataset.column_names)
    if run.prompt_template is not None:
        options = {"template": run.prompt_template, "system": run.system_prompt}
        dataset = dataset.map(with_prompt, fn_kwargs=options)
    if run.answer_template is not None:
        dataset = dataset.map(with_answer, fn_kwargs={"template": run.answer_template})
    return dataset


def load_rows(run: RunArguments, split: str) -> Dataset:
    """The split as its source has it."""
    path, files = run.dataset_name, None
    if FUNCTION.fullmatch(path):
        return resolve(path, "dataset_name")(split)
    if Path(path).suffix in (".json", ".jsonl"):
        path, files = "json", run.dataset_name
    return load_dataset(path, run.dataset_config, data_files=files, split=split)


def matching(dataset: Dataset, wanted: str) -> Dataset:
    """The rows whose column has the value, `column=value`."""
    column, _, value = wanted.partition("=")
    if column not in dataset.column_names:
        raise ValueError(
            f"dataset_filter={wanted!r} names no column of the dataset. Write one of "
            f"{', '.join(dataset.column_names)} before the sign."
        )
    return dataset.filter(lambda found: str(found) == value, input_columns=column)


def check_template(name: str, template: str | None, columns: Sequence[str]) -> None:
    """Refuses a template that would give every row the same text."""
    if template is not None and not set(COLUMN.findall(template)) & set(columns):
        raise ValueError(
            f"{name}={template!r} names no column of the dataset, so all rows would be alike. "
            f"Write one of {', '.join(columns)} in braces."
        )


def filled(template: str, row: dict[str, Any]) -> str:
    """The template's text; braces that hold no column's name, as in LaTeX, stay as they are."""
    return COLUMN.sub(lambda found: str(row.get(found[1], found[0])), template)


def with_prompt(row: dict[str, Any], template: str, system: str | None) -> dict[str, Any]:
    """The row's `prompt`."""
    turns = [("system", system), ("user", filled(template, row))]
    return {"prompt": [{"role": role, "content": said} for role, said in turns if said]}


def with_answer(row: dict[str, Any], template: str) -> dict[str, Any]:
    """The row's `answer`."""
    return {"answer": filled(template, row)}


def reward_functions(names: Sequence[str] | None, config: Any) -> list[Any] | None:
    """Functions by their names; what is no `module:function` is the name of a reward model."""
    if names is None:
        names = [] if config.score_name else ["trl_ext.rewards:math_reward"]
    return [resolve(name, "reward_funcs") if ":" in name else name for name in names] or None


def build(stem: str, run: RunArguments, config: GRPOConfig, model: ModelConfig) -> GRPOTrainer:
    """The trainer that the options describe."""
    loading: dict[str, Any] = {
        "dtype": model.dtype,
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
    }
    if isinstance(config.model_init_kwargs, dict):
        loading |= config.model_init_kwargs
    config.model_init_kwargs = loading
    callbacks = []
    if run.eval_generations:
        judges = [resolve(name, "eval_reward_funcs") for name in run.eval_reward_funcs or []]
        extractor = run.eval_answer_extractor
        options = {"num_generations": run.eval_generations, "answer_extractor": extractor}
        callbacks = [trl_ext.GenerationEvaluator(judges or None, None, None, **options)]
    test_split, environment = run.dataset_test_split, run.environment_factory
    if environment is not None:
        environment = resolve(environment, "environment_factory")
    return getattr(trl_ext, f"{stem}Trainer")(
        model=model.model_name_or_path,
        reward_funcs=reward_functions(run.reward_funcs, config),
        args=config,
        train_dataset=load_prompts(run, run.dataset_train_split),
        eval_dataset=None if test_split is None else load_prompts(run, test_split),
        quantization_config=get_quantization_config(model),
        peft_config=get_peft_config(model),
        callbacks=callbacks,
        environment_factory=environment,
    )


def parse(words: Sequence[str]) -> tuple[str, RunArguments, GRPOConfig, ModelConfig]:
    """The trainer's class without "Trainer", and the options of run, trainer and model."""
    known = methods()
    refuse_unknown(words[:1], known, "method")
    stem = known[words[0]]
    types = [RunArguments, getattr(trl_ext, f"{stem}Config"), ModelConfig]
    parser = StrictParser(types, prog=f"trl-ext {words[0]}")
    return stem, *parser.parse_args_and_config(words[1:])


def main(argv: Sequence[str] | None = None) -> GRPOTrainer:
    """Trains, saves and evaluates; returns the trainer."""
    words = list(sys.argv[1:] if argv is None else argv)
    usage = f"usage: trl-ext {{{','.join(methods())}}} [--config run.yaml] [--option value ...]"
    if not words or words[0] in ("-h", "--help"):
        raise SystemExit(f"{usage}\n       trl-ext <method> --help lists its options")
    sys.path.append(os.getcwd())  # a console script does not look there, for `module:function`
    try:
        stem, run, config, model = parse(words)
    except ValueError as error:
        raise SystemExit(f"{usage}\ntrl-ext: error: {error}") from error
    trainer = build(stem, run, config, model)
    trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
    trainer.save_model(config.output_dir)
    if run.dataset_test_split is not None:
        trainer.save_metrics("eval", trainer.evaluate())
    if config.push_to_hub:
        trainer.push_to_hub(dataset_name=run.dataset_name)
    else:
        trainer.create_model_card(dataset_name=run.dataset_name)
    return trainer


def command() -> None:
    """The console script: the returned trainer is not an exit status."""
    main()


if __name__ == "__main__":
    command()
