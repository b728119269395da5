"""TRL's private methods and its defaults are those that the seam was written against."""

import ast
import copy
import json

import pytest

from tests import contract

NOW = contract.contract()
RECORDED = json.loads(contract.RECORD.read_text(encoding="utf-8"))


def test_the_host_is_as_recorded():
    found = contract.differences(RECORDED, NOW)
    versions = f"recorded with {RECORDED['versions']}, installed {NOW['versions']}"
    assert not found, f"{versions}; then `python -m tests.contract`:\n" + "\n".join(found)


def test_nothing_recorded_is_missing():
    for name, entry in {**RECORDED["members"], **RECORDED["imports"]}.items():
        assert "missing" not in entry and entry.get("assigned in") != "", name


def test_the_collection_sees_each_way_of_use():
    seam = ast.parse(
        "from trl.trainer.utils import pad\n"
        "from trl.trainer import grpo_trainer as host\n"
        "class Trainer(trl.GRPOTrainer):\n"
        "    def _compute_loss(self, model, inputs):\n"
        "        self._step, self._own = self._metrics, host.create_model_from_path\n"
        "        return super().training_step(model, inputs)\n"
        "    def _helper(self): pass\n"
    )
    members = {"__init__", "_compute_loss", "_step", "_metrics", "training_step"}
    assert contract.used_members(seam) == members
    imports = {("trl.trainer.utils", "pad"), ("trl.trainer.grpo_trainer", "create_model_from_path")}
    assert contract.used_imports(seam) == imports


@pytest.mark.parametrize(
    ("section", "name", "change", "says"),
    [
        ("members", "_compute_loss", {"signature": "(self)"}, "adapt the seam"),
        ("members", "_compute_loss", {"source": "0"}, "re-read"),
        ("members", "_step", {"assigned in": ""}, "was"),
        ("defaults", "use_bias_correction_kl", "False", "set it explicitly"),
        ("defaults", "beta", None, "new"),
    ],
)
def test_a_change_is_named(section, name, change, says):
    other = copy.deepcopy(NOW)
    if change is None:
        del other[section][name]
    else:
        old = other[section][name]
        other[section][name] = {**old, **change} if isinstance(old, dict) else change
    found = contract.differences(other, NOW)
    assert len(found) == 1 and name in found[0] and says in found[0]


def commented(a, b=2):
    """Docstring."""
    return a + b  # comment


def bare(a, b=2):
    return a + b


def other(a, b=2):
    return a - b


def test_the_hash_sees_code_and_nothing_else():
    assert contract.signature(commented) == contract.signature(bare) == "(a, b=2)"
    hashes = [contract.source_hash(f) for f in (commented, bare, other)]
    renamed = [contract.shape(ast.parse("def f(a, b=2): return a + b"))]
    assert renamed == [contract.shape(ast.parse('def f(a, b=2):\n  "d"\n  return a+b # c'))]
    assert len(set(hashes)) == 3, "the name is part of the code"
