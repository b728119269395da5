"""A saved folder carries its code: it loads without `trl_ext`, and beside it."""

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Trainer,
    TrainingArguments,
    dynamic_module_utils,
)
from transformers.dynamic_module_utils import (
    get_class_from_dynamic_module,
    get_imports,
    get_relative_import_files,
)
from transformers.utils import hub

from tests.models.variants import BOTH, CLASSIFIER, gradients, tiny, tokens
from trl_ext.models import StickBreakingConfig, TapaConfig

CHILD = Path(__file__).with_name("load_from_folder.py")
# In a process whose imports of these packages fail.
WITHOUT = """
import runpy, sys
sys.modules.update(trl_ext=None, triton=None)
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
LANGUAGE_MODELS = ["tapa", "tapa_linear", "stickbreaking", "stickbreaking_current"]
CLASSIFIERS = ["tapa_classifier", "stickbreaking_classifier"]
AUTO_CLASSES = {
    "AutoConfig",
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoModelForSequenceClassification",
}


def texts(folder):
    return {path.name: path.read_text() for path in folder.glob("*.py")}


def in_a_fresh_process(folders, onward, cache):
    """What the child says of the folders."""
    caches = {"HF_MODULES_CACHE": str(cache / "modules"), "HF_HUB_CACHE": str(cache / "hub")}
    environment = {**os.environ, **caches, "PYTHONPATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, str(CHILD), str(folders), str(onward)],
        capture_output=True,
        text=True,
        cwd=folders,
        env=environment,
        stdin=subprocess.DEVNULL,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder for each model, with what it said when it was saved."""
    root = tmp_path_factory.mktemp("saved")
    ids = tokens(2, 12)
    with torch.no_grad():
        for name in LANGUAGE_MODELS:
            model = tiny(name)
            model.save_pretrained(root / name)
            said = {"ids": ids, "logits": model(ids).logits, "hidden": model.model(ids)[0]}
            said["generated"] = model.generate(ids, max_new_tokens=8, do_sample=False)
            torch.save(said, root / name / "said.pt")
        for name in CLASSIFIERS:
            model = tiny(name.removesuffix("_classifier"), classes=CLASSIFIER, num_labels=3)
            model.save_pretrained(root / name)
            torch.save({"ids": ids, "logits": model(ids).logits}, root / name / "said.pt")
    return root


@pytest.fixture(scope="module")
def elsewhere(saved, tmp_path_factory):
    """Facts from a fresh process, and where it saved the models on."""
    root = tmp_path_factory.mktemp("elsewhere")
    repository, commit = root / "cache" / "hub" / "models--someone--tapa", "0" * 40
    shutil.copytree(saved / "tapa", repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    return in_a_fresh_process(saved, root / "onward", root / "cache"), root / "onward"


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_a_folder_loads_where_the_package_is_not(elsewhere, name):
    facts = elsewhere[0][name]
    assert facts["refused without trust"]
    assert facts["logits"] == 0 and facts["hidden"] == 0 and facts["generated"]


def test_a_repository_of_the_hub_loads_as_a_folder_does(elsewhere):
    assert elsewhere[0]["from the Hub"] == 0


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_classifier_loads_where_the_package_is_not(elsewhere, name):
    assert elsewhere[0][name]["logits"] == 0


def test_peft_knows_the_models_though_they_do_not_import_it(elsewhere):
    assert elsewhere[0]["imported"] == []
    assert elsewhere[0]["adapted"] == ["q_proj", "v_proj"]


@pytest.mark.parametrize("name", [*LANGUAGE_MODELS, *CLASSIFIERS])
def test_saving_on_keeps_code_and_entries(saved, elsewhere, name):
    """A folder whose files and entries are those of the first loads as the first."""
    first, onward = saved / name, elsewhere[1] / name
    assert texts(onward) == texts(first) != {}
    entries = json.loads((onward / "config.json").read_text())["auto_map"]
    assert entries == json.loads((first / "config.json").read_text())["auto_map"]
    assert set(entries) == AUTO_CLASSES


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_what_was_saved_on_in_shards_comes_home(elsewhere, name):
    onward = elsewhere[1] / name
    assert len(list(onward.glob("model-*.safetensors"))) > 1
    said = torch.load(onward / "said.pt")
    model = AutoModelForCausalLM.from_pretrained(onward)
    assert type(model).__module__.startswith("trl_ext.models.")
    assert torch.equal(model(said["ids"]).logits, said["logits"])


@pytest.mark.parametrize("name", BOTH)
def test_transformers_finds_each_file_and_asks_for_no_other_package(saved, name):
    modeling = saved / name / f"modeling_{name}.py"
    found = {Path(path) for path in get_relative_import_files(modeling)}
    files = set((saved / name).glob("*.py"))
    assert files == found | {modeling}
    wanted = {package for file in files for package in get_imports(file)}
    assert wanted - sys.stdlib_module_names == {"torch", "transformers", "huggingface_hub"}


@pytest.mark.parametrize("name", BOTH)
def test_the_copies_are_the_sources_but_for_imports_and_operators(saved, name):
    """What a reader of the Hub reviews is what is tested here."""
    flat = (saved / name / f"modeling_{name}.py").read_text()
    ours = sys.modules[f"trl_ext.models.{name}.modeling_{name}"].__file__
    assert ours is not None

    def definitions(source):
        body = ast.parse(source).body
        return [ast.unparse(node) for node in body if not isinstance(node, ast.ImportFrom)]

    assert definitions(flat) == definitions(Path(ours).read_text())
    assert flat.startswith("# Copied by trl_ext ") and "Apache-2.0" in flat.splitlines()[0]


@pytest.mark.parametrize("name", [*BOTH, "tapa_classifier"])
def test_the_installed_classes_come_first(saved, name):
    """No trust is asked for, and none makes the copies run."""
    for trust in ({}, {"trust_remote_code": bool("given")}):
        config = AutoConfig.from_pretrained(saved / name, **trust)
        assert type(config) in (TapaConfig, StickBreakingConfig)
        model = AutoModelForCausalLM.from_pretrained(saved / name, **trust)
        assert type(model).__module__.startswith("trl_ext.models.")


@pytest.fixture
def modules_cache(tmp_path, monkeypatch):
    """The host's folder of remote code, for this test alone."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        del sys.modules[name]


@pytest.mark.parametrize("name", BOTH)
def test_copies_work_beside_the_package_and_each_other(saved, name, tmp_path, modules_cache):
    """An operator's name belongs to the process: a copy must not take the package's away."""
    shutil.copytree(saved / name, tmp_path / "other name (1)")
    folders = [saved / name, tmp_path / "other name (1)"]
    class_name = json.loads((saved / name / "config.json").read_text())["architectures"][0]
    models = [tiny(name)]
    for folder in folders:
        copied = get_class_from_dynamic_module(f"modeling_{name}.{class_name}", folder)
        assert copied.__module__.startswith("transformers_modules.")
        models.append(copied.from_pretrained(folder))
    assert len({type(model) for model in models}) == 3
    ids = tokens(2, 12)
    found = [gradients(model, model(ids, labels=ids).loss) for model in [*models, models[0]]]
    assert found[0].abs().max() > 0
    assert all(torch.equal(one, found[0]) for one in found)


class Uploads:
    """Stands for `HfApi`: remembers the names of the files that would go to the Hub."""

    def __init__(self):
        self.files = set()

    def create_repo(self, repo_id, **_):
        self.repo_id = repo_id
        return self

    def create_commit(self, operations, **_):
        self.files |= {operation.path_in_repo for operation in operations}


@pytest.fixture
def uploads(monkeypatch):
    api = Uploads()
    monkeypatch.setattr(hub, "hf_api", lambda: api)
    monkeypatch.setattr("transformers.modeling_utils.hf_api", lambda: api)
    monkeypatch.setattr("transformers.configuration_utils.hf_api", lambda: api)
    card = hub.ModelCard("---\nlibrary_name: transformers\n---\n")
    monkeypatch.setattr(hub, "create_and_tag_model_card", lambda *_, **__: card)
    return api


@pytest.mark.parametrize("what", ["model", "model.save", "config", "config.save"])
def test_what_is_pushed_carries_its_code(what, uploads, saved, tmp_path):
    model = tiny("tapa")
    owner = model if what.startswith("model") else model.config
    if what.endswith("save"):
        owner.save_pretrained(tmp_path / "pushed", push_to_hub=True, repo_id="someone/pushed")
    else:
        owner.push_to_hub("someone/pushed")
    assert uploads.repo_id == "someone/pushed"
    assert uploads.files >= {path.name for path in (saved / "tapa").glob("*.py")} | {"config.json"}


def test_a_checkpoint_of_the_trainer_carries_its_code(tmp_path, saved):
    model = tiny("tapa")
    rows = [{"input_ids": row, "labels": row} for row in tokens(4, 8)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=1, save_steps=1, report_to=[], use_cpu=True
    )
    Trainer(model, arguments, train_dataset=rows).train()
    written = {path.name for path in (tmp_path / "checkpoint-1").glob("*.py")}
    assert written == {path.name for path in (saved / "tapa").glob("*.py")}


class Mine(TapaConfig):
    """A user's own configuration, in a module of the user's."""


def test_a_users_subclass_is_not_passed_off_as_ours(tmp_path):
    config = Mine()
    config.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    assert "auto_map" not in (tmp_path / "config.json").read_text()
