"""What the seam and the models take for granted of TRL and transformers, collected and recorded.

`python -m tests.contract` rewrites `contract.json`; run it after you have re-read what the failing
test names, never before.
"""

import ast
import dataclasses
import hashlib
import importlib
import inspect
import json
import re
import textwrap
from pathlib import Path
from typing import Any

import transformers
import trl

from tests.sources import DECODER, SEAM, docstring_node

RECORD = Path(__file__).with_name("contract.json")
HOST = trl.GRPOTrainer
HOSTS = ("trl.", "transformers.")


def contract() -> dict[str, Any]:
    """All that is recorded, as it is in the installed versions."""
    seam, decoder = (ast.parse(path.read_text(encoding="utf-8")) for path in (SEAM, DECODER))
    inside = used_imports(seam) | used_imports(decoder)
    return {
        "versions": {"trl": trl.__version__, "transformers": transformers.__version__},
        "members": {name: member(name) for name in sorted(used_members(seam))},
        "imports": {f"{m}.{n}": imported(m, n) for m, n in sorted(inside)},
        "defaults": defaults(),
    }


def used_members(seam: ast.Module) -> set[str]:
    """Names of the host's trainer that the seam overrides or reads from an instance."""
    defined, read = set(), set()
    for node in ast.walk(seam):
        if isinstance(node, ast.ClassDef):
            defined |= {n.name for n in node.body if isinstance(n, ast.FunctionDef)}
        if isinstance(node, ast.Attribute):
            on_super = ast.unparse(node.value) == "super()"
            on_trainer = ast.unparse(node.value) in ("self", "trainer")
            if on_super or (on_trainer and node.attr.startswith("_")):
                read.add(node.attr)
    overridden = {name for name in defined if hasattr(HOST, name) and not hasattr(object, name)}
    return {"__init__"} | overridden | {n for n in read if hasattr(HOST, n) or assigned_in(n)}


def used_imports(source: ast.Module) -> set[tuple[str, str]]:
    """Names imported from inside a host, and what is reached through an imported module of it."""
    found, modules = set(), {}
    for node in ast.walk(source):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(HOSTS):
            for alias in node.names:
                if inspect.ismodule(resolve(node.module, alias.name)):
                    modules[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                else:
                    found.add((node.module, alias.name))
    for node in ast.walk(source):
        home = modules.get(getattr(getattr(node, "value", None), "id", ""))
        if home and isinstance(node, ast.Attribute):
            found.add((home, node.attr))
    return found


def resolve(module: str, name: str) -> Any:
    """The named attribute or submodule, None if it is gone."""
    try:
        home = importlib.import_module(module)
        return getattr(home, name, None) or importlib.import_module(f"{module}.{name}")
    except ImportError:
        return None


def assigned_in(name: str) -> str:
    """The host's class whose source assigns `self.name`, or an empty string."""
    for owner in HOST.__mro__[:-1]:
        if re.search(rf"self\.{name}\b[^=\n(]*=[^=]", inspect.getsource(owner)):
            return f"{owner.__module__}.{owner.__name__}"
    return ""


def member(name: str) -> dict[str, str]:
    """Owner, signature and source hash of a method; the assigning class of an attribute."""
    if not hasattr(HOST, name):
        return {"assigned in": assigned_in(name)}
    owner = next(c for c in HOST.__mro__ if name in vars(c))
    value = inspect.getattr_static(owner, name)
    return {"owner": f"{owner.__module__}.{owner.__name__}", **described(value)}


def imported(module: str, name: str) -> dict[str, str]:
    return described(resolve(module, name))


def described(value: Any) -> dict[str, str]:
    if value is None:
        return {"missing": "yes"}
    value = value.fget if isinstance(value, property) else value
    value = getattr(value, "__func__", value)
    if not callable(value):
        return {"value": repr(value)}
    return {"signature": signature(value), "source": source_hash(value)}


def signature(function: Any) -> str:
    """Names, kinds and defaults of the parameters; annotations may be rephrased freely."""
    plain = inspect.signature(function)
    bare = [p.replace(annotation=p.empty) for p in plain.parameters.values()]
    return str(plain.replace(parameters=bare, return_annotation=plain.empty))


def source_hash(value: Any) -> str:
    """Hash of the syntax tree, blind to comments, docstrings and layout."""
    parsed = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(value))))
    return hashlib.sha256(repr(shape(parsed)).encode()).hexdigest()[:16]


def shape(node: Any) -> Any:
    """The tree as tuples without empty fields, of which each Python version has others."""
    if isinstance(node, list):
        return tuple(shape(item) for item in node)
    if not isinstance(node, ast.AST):
        return node
    docstring = docstring_node(node)
    code = []
    for name, value in ast.iter_fields(node):
        kept = [v for v in value if v is not docstring] if isinstance(value, list) else value
        if kept not in (None, []):
            code.append((name, shape(kept)))
    return type(node).__name__, *code


def defaults() -> dict[str, str]:
    """Default of each option of TRL's configuration, inherited ones included."""
    found = {}
    for field in dataclasses.fields(trl.GRPOConfig):
        factory = field.default_factory
        found[field.name] = repr(field.default if factory is dataclasses.MISSING else factory())
    return found


def differences(recorded: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """One sentence for each thing that is not as recorded."""
    found = []
    for section in ("members", "imports"):
        for name in sorted(recorded[section].keys() | now[section].keys()):
            was, is_ = recorded[section].get(name), now[section].get(name)
            found += [sentence(name, was, is_)] if was != is_ else []
    for name in sorted(recorded["defaults"].keys() | now["defaults"].keys()):
        was, is_ = recorded["defaults"].get(name), now["defaults"].get(name)
        if was != is_:
            found.append(option_sentence(name, was, is_))
    return found


def option_sentence(name: str, was: str | None, is_: str | None) -> str:
    if was is None:
        return f"option {name} is new, default {is_}: decide whether our trainers support it"
    if is_ is None:
        return f"option {name} is gone: remove what we say of it"
    return f"option {name}: the default was {was} and is {is_}: set it explicitly in our configs"


def sentence(name: str, was: dict[str, str] | None, is_: dict[str, str] | None) -> str:
    if was is None:
        return f"{name} is used and not recorded: read it, then record"
    if is_ is None:
        return f"{name} is recorded, but no longer used, or the host lost it"
    home = is_.get("owner", is_.get("assigned in", ""))
    if was.get("signature") != is_.get("signature"):
        change = f"signature {was.get('signature')} became {is_.get('signature')}"
        return f"{home} {name}: {change}: adapt the seam"
    if was.get("source") != is_.get("source"):
        return f"{home} {name}: its body changed: re-read it against our override"
    return f"{home} {name}: was {was}, is {is_}"


if __name__ == "__main__":
    RECORD.write_text(json.dumps(contract(), indent=1, sort_keys=True) + "\n", encoding="utf-8")
