"""Entries in the tables of packages that are imported after the models, or never."""

import sys
from collections.abc import Callable
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

Action = Callable[[ModuleType], None]


def when_imported(name: str, action: Action) -> None:
    """Calls `action(module)` when the module is imported; at once, if it has been."""
    if module := sys.modules.get(name):
        action(module)
    else:
        sys.meta_path.insert(0, _Watch(name, action))


class _Watch(MetaPathFinder):
    """Finds one module as the finders behind it do, with a loader that acts."""

    def __init__(self, name: str, action: Action) -> None:
        self.name, self.action = name, action

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        behind = sys.meta_path[sys.meta_path.index(self) + 1 :]
        specs = (finder.find_spec(fullname, path, target) for finder in behind)
        spec = next((found for found in specs if found is not None), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _ActingLoader(spec.loader, self.action)
        return spec


class _ActingLoader(Loader):
    """Loads as the loader inside, whose place it gives back, and then acts."""

    def __init__(self, inside: Loader, action: Action) -> None:
        self.inside, self.action = inside, action

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.inside.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self.inside
        if module.__spec__ is not None:
            module.__spec__.loader = self.inside
        self.inside.exec_module(module)
        self.action(module)
