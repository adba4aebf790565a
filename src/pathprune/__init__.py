"""One search on a pretrained transformer gives the whole family: a model of any size."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

import wrapt

from pathprune import _moved
from pathprune._version import __version__ as __version__

if TYPE_CHECKING:
    from pathprune import data as data
    from pathprune import errors as errors
    from pathprune import evaluation as evaluation
    from pathprune import objectives as objectives
    from pathprune import report as report
    from pathprune.checkpoint.load_slice import load_slice as load_slice
    from pathprune.checkpoint.other_libraries import load_model as load_model
    from pathprune.checkpoint.save import save_model as save_model
    from pathprune.discovery.discover import find_pairs as find_pairs
    from pathprune.errors import ArtifactError as ArtifactError
    from pathprune.errors import BudgetError as BudgetError
    from pathprune.errors import DataError as DataError
    from pathprune.errors import MismatchError as MismatchError
    from pathprune.errors import PathpruneError as PathpruneError
    from pathprune.errors import SettingError as SettingError
    from pathprune.errors import UnsupportedModelError as UnsupportedModelError
    from pathprune.evaluation import fidelity as fidelity
    from pathprune.evaluation import latency as latency
    from pathprune.family.budget import Budget as Budget
    from pathprune.family.pair_list import PairList as PairList
    from pathprune.family.pairs import Pair as Pair
    from pathprune.family.pairs import Slot as Slot
    from pathprune.family.path import SolutionPath as SolutionPath
    from pathprune.family.selection import Selection as Selection
    from pathprune.objectives.base import Objective as Objective
    from pathprune.objectives.targets import Targets as Targets
    from pathprune.ranking.callback import SearchCallback as SearchCallback
    from pathprune.ranking.config import SearchConfig as SearchConfig
    from pathprune.ranking.covariance import compensate as compensate
    from pathprune.ranking.run import search as search
    from pathprune.ranking.stepping import Search as Search
    from pathprune.recovery import recover as recover
    from pathprune.recovery.nested import elastic as elastic
    from pathprune.transform.masks import masked as masked
    from pathprune.transform.slicing import slice_model as slice_model
    from pathprune.transform.sorting import sort_units as sort_units


_HOME = {
    "ArtifactError": "errors",
    "Budget": "family.budget",
    "BudgetError": "errors",
    "DataError": "errors",
    "MismatchError": "errors",
    "Objective": "objectives.base",
    "Pair": "family.pairs",
    "PairList": "family.pair_list",
    "PathpruneError": "errors",
    "Search": "ranking.stepping",
    "SearchCallback": "ranking.callback",
    "SearchConfig": "ranking.config",
    "Selection": "family.selection",
    "SettingError": "errors",
    "Slot": "family.pairs",
    "SolutionPath": "family.path",
    "Targets": "objectives.targets",
    "UnsupportedModelError": "errors",
    "compensate": "ranking.covariance",
    "elastic": "recovery.nested",
    "fidelity": "evaluation",
    "find_pairs": "discovery.discover",
    "latency": "evaluation",
    "load_model": "checkpoint.other_libraries",
    "load_slice": "checkpoint.load_slice",
    "masked": "transform.masks",
    "recover": "recovery",
    "save_model": "checkpoint.save",
    "search": "ranking.run",
    "slice_model": "transform.slicing",
    "sort_units": "transform.sorting",
}

__all__ = sorted(_HOME)

_MODULES = ("data", "errors", "evaluation", "objectives", "report")  # of which users call more than is above

_moved.install()

# Sliced models load by plain `from_pretrained` once transformers knows us. Importing it here would
# cost seconds, so it is told when it is imported, or at once if it already is.
wrapt.register_post_import_hook(lambda module: import_module("pathprune.checkpoint.hf"), "transformers.quantizers.auto")


def __getattr__(name: str) -> Any:
    if name in _MODULES or name in _moved.MOVED:
        return import_module(f"pathprune.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'pathprune' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"pathprune.{_HOME[name]}"), name)
    return value


def __dir__() -> list[str]:
    return [*__all__, *_MODULES, "__version__"]
