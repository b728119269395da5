"""What is installed is what is promised: pins, extras, files in the wheel, the command."""

import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import trl_ext
from tests.sources import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def pin(name):
    return next(r for r in map(Requirement, PROJECT["dependencies"]) if r.name == name).specifier


def test_hosts_are_pinned_and_the_installed_ones_fit():
    assert pin("trl").contains("1.16.0") and not pin("trl").contains("1.17.0")
    assert not pin("transformers").contains("5.23.0") and not pin("transformers").contains("6.0.0")
    for requirement in map(Requirement, PROJECT["dependencies"]):
        installed = Version(metadata.version(requirement.name))
        assert requirement.specifier.contains(installed, prereleases=True), requirement


def test_extras():
    extras = PROJECT["optional-dependencies"]
    assert {"vllm", "quant", "liger", "math", "test", "dev"} <= set(extras)
    assert "antlr4_13_2" in extras["math"][0], "math-verify's parser, pinned by its extra"


def test_version_is_said_once():
    assert trl_ext.__version__ == metadata.version("trl-ext")


def test_licence_is_apache():
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert PROJECT["license"] == "Apache-2.0" and "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """File names and the entry points of a wheel built from a copy of the sources."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT / "trl_ext", folder / "trl_ext")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    code = "import sys; from setuptools import build_meta; print(build_meta.build_wheel('.'))"
    build = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert build.returncode == 0, build.stderr
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as archive:
        return {name: archive.read(name).decode(errors="replace") for name in archive.namelist()}


def test_wheel_holds_every_source_and_its_data(wheel):
    sources = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "trl_ext").rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    assert {"trl_ext/py.typed", "trl_ext/cards/model_card.md.jinja"} <= sources
    assert sources <= set(wheel)
    assert not [name for name in wheel if name.startswith(("tests/", "recipes/"))]
    assert [name for name in wheel if name.endswith("LICENSE")]


def test_wheel_has_the_command(wheel):
    entry_points = next(text for name, text in wheel.items() if name.endswith("entry_points.txt"))
    assert "trl-ext = trl_ext.cli:command" in entry_points
