"""Modules under the names that they had in 0.1.0: they work, with a DeprecationWarning."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

MOVED = {
    "artifact": "family.artifact",
    "basis": "ranking.basis",
    "budget": "family.budget",
    "compensation": "ranking.covariance",
    "dynamics": "ranking.dynamics",
    "hub": "checkpoint.hf",
    "inclusion": "ranking.inclusion",
    "masks": "transform.masks",
    "order": "family.order",
    "pairs": "family.pairs",
    "partial": "checkpoint.load_slice",
    "path": "family.path",
    "searching": "ranking.run",
    "slicing": "transform.slicing",
    "sorting": "transform.sorting",
}


class _Finder(MetaPathFinder, Loader):
    """Finds what no file has: it stands last among the finders."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        package, _, module = name.partition(".")
        return ModuleSpec(name, self) if package == "pathprune" and module in MOVED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        new = f"pathprune.{MOVED[spec.name.partition('.')[2]]}"
        warnings.warn(f"{spec.name} is {new} now; the old name goes in 1.0", DeprecationWarning, stacklevel=2)
        module = ModuleType(spec.name)
        module.__dict__.update({name: value for name, value in vars(import_module(new)).items() if name[:2] != "__"})
        return module

    def exec_module(self, module: ModuleType) -> None:
        pass


def install() -> None:
    """Once a process, and again where pathprune is imported anew."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if type(finder).__name__ != _Finder.__name__] + [_Finder()]
