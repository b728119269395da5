"""The house rules of the package, read off its sources and its public names."""

import ast
import dataclasses
import inspect
import re
import subprocess
import sys
import textwrap

import pytest
import trl
from transformers import PreTrainedConfig
from trl.trainer import grpo_trainer

import trl_ext
from tests.sources import (
    PACKAGE,
    ROOT,
    SEAM,
    SOURCES,
    docstring_node,
    imports,
    label,
    module_name,
    tree,
)

PRIVATE = r"(?:self\.|super\(\)\.|def )(_[a-z]\w*)"  # methods and attributes
CARD = {"_name", "_tag_names", "_paper"}  # TRL's model-card attributes are public in all but name
HOST = set(re.findall(PRIVATE, inspect.getsource(grpo_trainer))) - CARD
MOST_LINES = 40

ANYWHERE = {
    *("trl_ext.adapters", "trl_ext.completions", "trl_ext.judges", "trl_ext.modes"),
    "trl_ext.resolve",
}
# Floor -> what it may import; the standard library is free. "inside:" only inside a function.
FLOORS = {
    "objectives": {"torch", "trl_ext.objectives"},
    "ops": {"torch", "trl_ext.ops"},
    "models": {"torch", "transformers", "huggingface_hub", "trl_ext.ops", "trl_ext.models"},
    "rollouts": {"torch", "transformers", "trl_ext.rollouts", "inside:vllm"},
    "rewards": {
        *("torch", "datasets", "trl_ext.rewards"),
        *("inside:math_verify", "inside:latex2sympy2_extended"),
    },
    "data": {"torch", "datasets", "trl_ext.data"},
    "variants": {"torch", "trl_ext.objectives", "trl_ext.variants"},
    "runtime": {
        *("torch", "transformers", "huggingface_hub", "safetensors", "packaging", "pyarrow"),
        "trl_ext.runtime",
    },
    "cards": {"transformers", "huggingface_hub", "safetensors", "trl_ext.cards"},
    "trainers": {
        *("torch", "transformers", "trl", "accelerate", "datasets", "peft"),
        *("trl_ext.objectives", "trl_ext.variants", "trl_ext.rollouts", "trl_ext.runtime"),
        *("trl_ext.cards", "trl_ext.trainers"),
    },
    "evals": {
        *("torch", "transformers", "accelerate", "datasets", "numpy", "tqdm"),
        *("trl_ext.objectives", "trl_ext.rewards", "trl_ext.data", "trl_ext.rollouts"),
        "trl_ext.evals",
    },
}
PUBLIC_FLOORS = {f"trl_ext.{floor}" for floor in FLOORS} | {"trl_ext"}

# Tests plant a token that says of itself that it is a canary.
SECRET = (
    r"hf_(?!CANARY)[A-Za-z0-9]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}"
    r"|sk-[A-Za-z0-9_-]{20,}"
)
TEXTS = [
    path
    for folder in ("trl_ext", "recipes", "tests", ".ci")
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in (".py", ".yaml", ".yml", ".md", ".jinja", "") and path.is_file()
]


@pytest.mark.parametrize("path", [p for p in SOURCES if p != SEAM], ids=label)
def test_only_the_seam_knows_trl_privates(path):
    for node in ast.walk(tree(path)):
        names = [getattr(node, "attr", None), getattr(node, "name", None)]
        if isinstance(node, ast.Call) and getattr(node.func, "id", "").endswith("attr"):
            names += [a.value for a in node.args if isinstance(a, ast.Constant)]
        for name in names:
            where = f"{label(path)}:{getattr(node, 'lineno', 0)}"
            assert name not in HOST, f"{where}: `{name}` belongs in trainers/_seam.py"


@pytest.mark.parametrize("path", SOURCES, ids=label)
def test_trl_is_imported_by_its_public_names(path):
    for name, line, _ in imports(path):
        if name.split(".")[0] != "trl":
            continue
        if "experimental" in name and path.name == "bench_online_dpo.py":
            continue  # which only compares
        where = f"{label(path)}:{line}: `{name}`"
        assert "experimental" not in name, f"{where} may change in any release"
        if path != SEAM:
            from_the_top = name.count(".") < 2 and "._" not in name
            public = from_the_top or name.startswith("trl.rewards.")
            assert public, f"{where} belongs in trainers/_seam.py"


def lines_of(node):
    """Lines from `def` or `class` to the last one, without docstrings; decorators do not count."""
    docstrings = [found for child in ast.walk(node) if (found := docstring_node(child))]
    return 1 + node.end_lineno - node.lineno - sum(d.end_lineno - d.lineno + 1 for d in docstrings)


@pytest.mark.parametrize("path", [p for p in SOURCES if p.name != "triton.py"], ids=label)
def test_functions_and_trainers_are_small(path):
    for node in ast.walk(tree(path)):
        function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        trainer = isinstance(node, ast.ClassDef) and node.name.endswith("Trainer") and path != SEAM
        if function or trainer:
            where = f"{label(path)}:{node.lineno} `{node.name}`"
            assert lines_of(node) <= MOST_LINES, f"{where} has {lines_of(node)} lines: split it"


def allowed_on(path):
    """What this file may import, and what only inside a function."""
    floor = path.relative_to(PACKAGE).parts[0] if path.is_relative_to(PACKAGE) else "recipes"
    if floor not in FLOORS:
        return None, set()
    inside = {name.removeprefix("inside:") for name in FLOORS[floor] if name[:7] == "inside:"}
    kernels = {"triton"} if floor == "ops" and path.name == "triton.py" else set()
    return FLOORS[floor] | ANYWHERE | kernels, inside


def within(name, packages):
    return any(name == package or name.startswith(f"{package}.") for package in packages)


@pytest.mark.parametrize("path", SOURCES, ids=label)
def test_imports_point_down(path):
    allowed, inside_only = allowed_on(path)
    for name, line, inside in imports(path):
        where = f"{label(path)}:{line}: import of `{name}`"
        assert not name.startswith("."), f"{where} is relative: write it in full"
        if name.split(".")[0] in sys.stdlib_module_names:
            continue
        if allowed is None:  # the top: everything public
            assert "._" not in name, f"{where} is private"
        else:
            fits = within(name, allowed) or (inside and within(name, inside_only))
            assert fits, f"{where} is not on the list of its floor (FLOORS)"


def test_every_floor_has_a_row():
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert folders <= set(FLOORS), f"give {folders - set(FLOORS)} a row in FLOORS"


def run_python(code, *arguments):
    """Standard output of a fresh interpreter in the repository's root."""
    command = [sys.executable, "-c", textwrap.dedent(code), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_objectives_are_pure():
    code = """
        import importlib, sys
        for name in sys.argv[1:]:
            importlib.import_module(name)
        print(*sorted({"trl", "transformers", "datasets", "accelerate"} & set(sys.modules)))
    """
    names = [module_name(path) for path in (PACKAGE / "objectives").glob("*.py")]
    assert names
    assert run_python(code, "trl_ext", *names) == ""


def test_bare_import_is_cheap():
    code = """
        import time, torch
        start = time.perf_counter()
        import trl_ext
        print(time.perf_counter() - start)
    """
    assert float(run_python(code)) < 0.3, "it takes about a millisecond while it is lazy"


def test_public_names_need_no_extra():
    code = """
        import sys
        for extra in sys.argv[1:]:
            sys.modules[extra] = None  # an import of it raises ImportError
        import trl_ext
        for name in trl_ext.__all__:
            getattr(trl_ext, name)
        import trl_ext.rewards
        print("done")
    """
    extras = ("vllm", "bitsandbytes", "liger_kernel", "math_verify")
    assert run_python(code, *extras).endswith("done")


@pytest.mark.parametrize("path", TEXTS, ids=label)
def test_no_secret_no_remote_code_no_open_port(path):
    text = path.read_text(encoding="utf-8")
    remote_code = r"trust_remote_code[\"']?\s*[=:]\s*" + "(?i:true|yes|1)"
    open_port = r"0\.0" + r"\.0\.0"
    for pattern in (SECRET, remote_code, open_port):
        assert not re.search(pattern, text), f"{label(path)} matches {pattern}"


def public_names(suffix):
    return [name for name in trl_ext.__all__ if name.endswith(suffix)]


@pytest.mark.parametrize("name", public_names("Trainer"))
def test_trainers_take_the_arguments_of_grpo(name):
    ours = inspect.signature(getattr(trl_ext, name).__init__).parameters.values()
    host = inspect.signature(trl.GRPOTrainer.__init__).parameters.values()
    assert [(p.name, p.kind, p.default) for p in ours] == [
        (p.name, p.kind, p.default) for p in host
    ]


@pytest.mark.parametrize("name", public_names("Trainer"))
def test_trainers_name_themselves_on_the_card(name):
    trainer = getattr(trl_ext, name)
    assert trainer._tag_names[:2] == ["trl", "trl_ext"] and len(trainer._tag_names) > 2
    inherited = trainer._name == trl.GRPOTrainer._name
    assert name == "GRPOTrainer" or not inherited, f"{name} would be called {trainer._name!r}"
    assert set(trainer._paper) == {"title", "id", "citation"}


TRAINERS = {name.removesuffix("Trainer") for name in public_names("Trainer")}
CONFIGS = [name for name in public_names("Config") if name.removesuffix("Config") in TRAINERS]
MODEL_CONFIGS = [name for name in public_names("Config") if name not in CONFIGS]


@pytest.mark.parametrize("name", CONFIGS)
def test_added_options_explain_themselves(name):
    config = getattr(trl_ext, name)
    assert issubclass(config, trl.GRPOConfig)
    host = {field.name for field in dataclasses.fields(trl.GRPOConfig)}
    for field in dataclasses.fields(config):
        if field.name not in host:
            text = field.metadata.get("help", "")
            source = re.search(r"\d{4}\.\d{5}|[Ss]ection \d|[Ee]q(\.|uation) ?\(?\d", text)
            assert source, f"{name}.{field.name}: the help names no paper, section or equation"


@pytest.mark.parametrize("name", MODEL_CONFIGS)
def test_model_options_explain_themselves(name):
    config = getattr(trl_ext, name)
    assert issubclass(config, PreTrainedConfig)
    shared = {field.name for field in dataclasses.fields(config.__mro__[1])}
    own = {field.name for field in dataclasses.fields(config)} - shared
    assert own and all(f" {field}: " in config.__doc__ for field in own), own
    assert re.search(r"Source: arXiv:\d{4}\.\d{5}", config.__doc__)


def test_readme_is_true():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#:\s]+)\)", readme)
    paths = re.findall(r"`((?:\w+/)+[\w.]*|\w+\.(?:py|md|yaml|toml))`", readme)
    assert links or paths, "the README names no file: its table of papers is missing"
    for path in {*links, *paths}:
        bases = (ROOT, PACKAGE, ROOT / "tests")
        assert any((base / path).exists() for base in bases), f"README names {path}: no such file"
    missing = [name for name in trl_ext.__all__ if name[0] != "_" and f"`{name}" not in readme]
    assert not missing, f"the README does not mention {missing}"
