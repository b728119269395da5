"""The command line: strict options, public trainers, rows made into prompts."""

import json
from dataclasses import dataclass, field

import pytest

import trl_ext
from trl_ext import OnlineDPOConfig, PassAtKConfig, cli
from trl_ext.parser import StrictParser


@dataclass
class Options:
    steps: int = field(default=3, metadata={"help": "steps"})
    rate: float = 1e-3
    name: str | None = None
    mode: str = field(default="fast", metadata={"choices": ["fast", "slow"]})
    verbose: bool = True
    words: list[str] = field(default_factory=lambda: ["a"])


def parsed(tmp_path, yaml_text, *words):
    path = tmp_path / "options.yaml"
    path.write_text(yaml_text, encoding="utf-8")
    return StrictParser([Options]).parse_args_and_config(["--config", str(path), *words])[0]


def test_file_then_command_line_then_default(tmp_path):
    got = parsed(tmp_path, "steps: 5\nrate: 1e-6\nverbose: false\nwords: [b, c]", "--steps=7")
    assert got == Options(steps=7, rate=1e-6, verbose=False, words=["b", "c"])
    same = StrictParser([Options]).parse_args_and_config([f"--config={tmp_path / 'options.yaml'}"])
    assert same[0].steps == 5


@pytest.mark.parametrize(
    ("text", "words", "says"),
    [
        ("stepz: 5", [], "'stepz' (did you mean 'steps'?)"),
        ("qqq: 5\nstepz: 5", [], "'qqq', 'stepz'"),
        ("help: 5", [], "'help'"),
        ("steps: 5", ["--raet", "1"], "'--raet' (did you mean '--rate'?)"),
        ("steps: 5", ["--step", "1"], "'--step' (did you mean '--steps'?)"),
        ("steps: 5", ["stray"], "'stray'"),
        ("steps: 4.5", [], "steps=4.5"),
        ("steps: four", [], "steps='four'"),
        ("steps: true", [], "steps=True"),
        ("mode: fats", [], "choose from fast, slow"),
        ("verbose: maybe", [], "verbose='maybe'"),
    ],
)
def test_what_trl_would_accept_is_refused(tmp_path, text, words, says):
    with pytest.raises(ValueError) as caught:
        parsed(tmp_path, text, *words)
    assert says in str(caught.value)


def test_every_public_trainer_is_a_method():
    some = {"grpo": "GRPO", "majority-vote": "MajorityVote", "pass-at-k": "PassAtK"}
    some |= {"online-dpo": "OnlineDPO", "nash": "Nash"}
    assert some.items() <= cli.methods().items()
    assert {f"{stem}Trainer" for stem in cli.methods().values()} == {
        name for name in trl_ext.__all__ if name.endswith("Trainer")
    }


def test_config_of_the_method_is_parsed():
    words = ["pass-at-k", "--dataset_name", "x", "--output_dir", "o", "--k", "2"]
    words += ["--num_generations=4", "--use_cpu", "--bf16", "false", "--k_schedule", '{"0": 3}']
    stem, run, config, model = cli.parse([*words, "--per_device_train_batch_size=4", "--use_peft"])
    assert stem == "PassAtK" and isinstance(config, PassAtKConfig)
    assert (run.dataset_name, config.k_schedule, model.use_peft) == ("x", {0: 3}, True)


def test_rewards_are_functions_models_or_none():
    options = dict(output_dir="out", use_cpu=True, report_to="none", num_generations=2)
    judged = OnlineDPOConfig(judge="tests.test_cli:parsed", **options)
    rewarded = OnlineDPOConfig(**options)
    assert cli.reward_functions(None, judged) is None
    assert [f.__name__ for f in cli.reward_functions(None, rewarded)] == ["math_reward"]
    given = cli.reward_functions(["someone/reward-model", "tests.test_cli:parsed"], rewarded)
    assert given[0] == "someone/reward-model" and given[1].__name__ == "parsed"


@pytest.mark.parametrize("method", cli.methods())
def test_every_method_has_a_parser(method):
    with pytest.raises(SystemExit) as ended:
        cli.parse([method, "--help"])
    assert ended.value.code == 0


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["pass-at-kk", "--k", "2"], "did you mean 'pass-at-k'?"),
        (["grpo", "--dataset_name=x", "--output_dir=o", "--learning_rte=1"], "--learning_rate"),
        (["grpo", "--dataset_name=x", "--output_dir=o", "--system_prompt=s"], "prompt_template"),
        (["grpo", "--dataset_name=x", "--output_dir=o", "--eval_generations=4"], "test_split"),
        (["grpo", "--dataset_name=x", "--eval_answer_extractor=a:b"], "eval_generations"),
        (["grpo", "--dataset_name=x", "--eval_reward_funcs", "a:b"], "eval_generations"),
        (["grpo", "--dataset_name=x", "--dataset_filter=kind"], "column=value"),
        (["--help"], "pass-at-k"),
        ([], "usage"),
    ],
)
def test_a_bad_command_ends_with_a_sentence(words, says):
    with pytest.raises(SystemExit) as caught:
        cli.main(words)
    assert says in str(caught.value)


def test_template_leaves_latex_alone():
    row = {"question": "1+1?", "answer": "2"}
    made = cli.with_prompt(row, r"{question} Use \boxed{} or \boxed{x}.", "Be brief.")
    assert made["prompt"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": r"1+1? Use \boxed{} or \boxed{x}."},
    ]


def test_a_template_needs_a_column_it_names():
    with pytest.raises(ValueError, match="qestion"):
        cli.check_template("prompt_template", "{qestion}", ["question", "answer"])


def test_local_file_and_slice(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [{"question": f"{n}?", "answer": str(n)} for n in range(4)]
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    run = cli.RunArguments(dataset_name=str(path), prompt_template="Say {question}")
    data = cli.load_prompts(run, "train[1:3]")
    assert data["answer"] == ["1", "2"]
    assert data[0]["prompt"] == [{"role": "user", "content": "Say 1?"}]


def test_answers_are_made_and_rows_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [{"question": f"{n}?", "answer": str(n), "kind": "ab"[n % 2]} for n in range(4)]
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    templates = {"prompt_template": "{question} {answer}", "answer_template": r"\boxed{{answer}}"}
    run = cli.RunArguments(dataset_name=str(path), dataset_filter="kind=b", **templates)
    data = cli.load_prompts(run, "train")
    assert data["answer"] == [r"\boxed{1}", r"\boxed{3}"]
    assert [prompt[0]["content"] for prompt in data["prompt"]] == ["1? 1", "3? 3"]
    for options, says in (
        ({"dataset_filter": "kin=b"}, "dataset_filter='kin=b' names no column"),
        ({"answer_template": "42"}, "answer_template='42' names no column"),
    ):
        with pytest.raises(ValueError, match=says):
            cli.load_prompts(cli.RunArguments(dataset_name=str(path), **options), "train")
