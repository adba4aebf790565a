"""One search on a pretrained transformer gives the whole family: a model of any size."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

import wrapt

if TYPE_CHECKING:
    from pathprune import data as data
    from pathprune import errors as errors
    from pathprune import evaluation as evaluation
    from pathprune import hub as hub
    from pathprune import objectives as objectives
    from pathprune import report as report
    from pathprune.budget import Budget as Budget
    from pathprune.budget import Selection as Selection
    from pathprune.compensation import compensate as compensate
    from pathprune.discovery import find_pairs as find_pairs
    from pathprune.errors import ArtifactError as ArtifactError
    from pathprune.errors import BudgetError as BudgetError
    from pathprune.errors import DataError as DataError
    from pathprune.errors import MismatchError as MismatchError
    from pathprune.errors import PathpruneError as PathpruneError
    from pathprune.errors import SettingError as SettingError
    from pathprune.errors import UnsupportedModelError as UnsupportedModelError
    from pathprune.hub import load_model as load_model
    from pathprune.hub import save_model as save_model
    from pathprune.masks import masked as masked
    from pathprune.pairs import Pair as Pair
    from pathprune.pairs import PairList as PairList
    from pathprune.pairs import Slot as Slot
    from pathprune.partial import load_slice as load_slice
    from pathprune.path import SolutionPath as SolutionPath
    from pathprune.recovery import recover as recover
    from pathprune.recovery.nested import elastic as elastic
    from pathprune.searching import search as search
    from pathprune.slicing import slice_model as slice_model
    from pathprune.sorting import sort_units as sort_units

__version__ = "0.1.0"

_HOME = {
    "ArtifactError": "errors",
    "Budget": "budget",
    "BudgetError": "errors",
    "DataError": "errors",
    "MismatchError": "errors",
    "Pair": "pairs",
    "PairList": "pairs",
    "PathpruneError": "errors",
    "Selection": "budget",
    "SettingError": "errors",
    "Slot": "pairs",
    "SolutionPath": "path",
    "UnsupportedModelError": "errors",
    "compensate": "compensation",
    "elastic": "recovery.nested",
    "find_pairs": "discovery",
    "load_model": "hub",
    "load_slice": "partial",
    "masked": "masks",
    "recover": "recovery",
    "save_model": "hub",
    "search": "searching",
    "slice_model": "slicing",
    "sort_units": "sorting",
}

__all__ = sorted(_HOME)

_MODULES = ("data", "errors", "evaluation", "hub", "objectives", "report")  # of which users call more than is above

# Sliced models load by plain `from_pretrained` once transformers knows us. Importing it here would
# cost seconds, so it is told when it is imported, or at once if it already is.
wrapt.register_post_import_hook(lambda module: import_module("pathprune.hub"), "transformers.quantizers.auto")


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"pathprune.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'pathprune' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"pathprune.{_HOME[name]}"), name)
    return value


def __dir__() -> list[str]:
    return [*__all__, *_MODULES, "__version__"]
