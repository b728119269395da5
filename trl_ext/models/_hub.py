"""The model's own code beside its weights: the folder then loads where `trl_ext` is not installed.

Under `trust_remote_code` transformers fetches a modeling file and, over statements of the form
`from .name import ...` only, its siblings. So the modules that a model needs are found by their
imports and written side by side: `trl_ext.ops.tapa.chunked` as `trl_ext_ops_tapa_chunked.py`.
transformers itself carries them on when a model that was loaded so is saved again.
"""

import ast
from collections.abc import Iterator
from functools import cache
from importlib import metadata, resources
from importlib.resources.abc import Traversable
from pathlib import Path

from transformers import PreTrainedConfig

HEADER = "# Copied by trl_ext {version} from its module {module}; licence: Apache-2.0.\n"


def write_code(config_class: type[PreTrainedConfig], folder: str | Path) -> dict[str, str]:
    """Writes the modules that the model of this configuration needs.

    Args:
        config_class: one of `trl_ext.models`, in `configuration_<name>.py` beside
            `modeling_<name>.py`.
        folder: where `config.json` goes.

    Returns:
        `auto_map`: the class in these files that each Auto class of transformers stands for.
    """
    home = config_class.__module__
    for name, text in _copies(home.replace(".configuration_", ".modeling_")).items():
        (Path(folder) / f"{name}.py").write_text(text, encoding="utf-8")
    configuration, model = _flat(home), config_class.__name__.removesuffix("Config")
    modeling = configuration.replace("configuration_", "modeling_")
    return {
        "AutoConfig": f"{configuration}.{model}Config",
        "AutoModel": f"{modeling}.{model}Model",
        "AutoModelForCausalLM": f"{modeling}.{model}ForCausalLM",
        "AutoModelForSequenceClassification": f"{modeling}.{model}ForSequenceClassification",
    }


@cache
def _copies(modeling: str) -> dict[str, str]:
    """File name to text, of a module and of all that it needs."""
    texts, open_ends = {}, {modeling}
    while open_ends:
        module = open_ends.pop()
        texts[_flat(module)], needed = _copy(module)
        open_ends |= {other for other in needed if _flat(other) not in texts}
    return texts


def _flat(module: str) -> str:
    last = module.rpartition(".")[2]
    return last if last.startswith(("configuration_", "modeling_")) else module.replace(".", "_")


def _copy(module: str) -> tuple[str, set[str]]:
    """The text with siblings in the place of packages, and the modules that it imports."""
    source = _file(module).read_text(encoding="utf-8")
    lines, needed = source.splitlines(keepends=True), set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and f"{node.module}.".startswith("trl_ext."):
            rows = slice(node.lineno - 1, node.end_lineno)
            indent, height = " " * node.col_offset, len(lines[rows])
            imports = dict(_imports(node))
            statement = "".join(f"{indent}{line}\n" for line in imports.values())
            lines[rows] = [statement, *[""] * (height - 1)]  # the other nodes keep their lines
            needed |= imports.keys()
    # An operator's name is the process's: defined by a second copy, it is gone for the first, whose
    # next call crashes. So each copy has names of its own.
    text = "".join(lines).replace('"trl_ext::', 'f"trl_ext_{__name__.encode().hex()}::')
    version = metadata.version("trl_ext")
    return HEADER.format(version=version, module=module) + text, needed


def _imports(node: ast.ImportFrom) -> Iterator[tuple[str, str]]:
    """Each module of a statement, with a statement that imports the same from its sibling."""
    names = []
    for alias in node.names:
        module = f"{node.module}.{alias.name}"
        if _file(module).is_file():
            sibling, name = _flat(module), alias.asname or alias.name
            # transformers overlooks `from . import name`: the first half is for its eyes.
            yield module, f"from .{sibling} import __name__ as _; from . import {sibling} as {name}"
        else:
            names.append(ast.unparse(alias))
    if names:
        yield node.module or "", f"from .{_flat(node.module or '')} import {', '.join(names)}"


def _file(module: str) -> Traversable:
    package, _, path = module.replace(".", "/").partition("/")
    file = resources.files(package).joinpath(f"{path}.py")
    return file if file.is_file() else resources.files(package).joinpath(f"{path}/__init__.py")
