"""Named things that other packages may add to: objectives, layouts, dynamics, budget kinds, exporters."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from importlib import import_module, metadata
from operator import attrgetter
from typing import Any, Generic, TypeVar

from pathprune.errors import SettingError

T = TypeVar("T")


class Registry(Mapping[str, T], Generic[T]):
    """Names and what they stand for, imported when it is first asked for.

    A package adds to it by an entry point in the group ``pathprune.<group>``, a program by ``register``.

    Args:
        what: one of them, in the singular, for messages.
        group: of entry points.
        builtin: name -> ``"module:attribute"``.

    Example:
        >>> from pathprune.registry import Registry
        >>> numbers = Registry("number", "numbers", {"pi": "math:pi"})
        >>> round(numbers["pi"], 2)
        3.14
        >>> numbers.register("e", 2.72)
        2.72
    """

    def __init__(self, what: str, group: str, builtin: Mapping[str, str]) -> None:
        self.what, self.group = what, f"pathprune.{group}"
        self._places: dict[str, str] = dict(builtin)
        self.ours = len(builtin)  # names that stand first
        self._values: dict[str, T] = {}
        self._asked = False  # installed packages are looked through once, and only where a name is not ours

    def register(self, name: str, value: T) -> T:
        """Add ``value`` under ``name``.

        Raises:
            SettingError: the name is taken.
        """
        if name in self and self._values.get(name) is not value:
            raise SettingError(f"the {self.what} {name!r} is there already; choose another name")
        self._values[name] = value
        return value

    def __getitem__(self, name: str) -> T:
        if name not in self._values:
            if name not in self._places:
                self._installed()
            if name not in self._values:
                if name not in self._places:
                    raise SettingError(self._unknown(name))
                module, _, attribute = self._places[name].partition(":")
                value: Any = attrgetter(attribute)(import_module(module))
                self._values[name] = value
        return self._values[name]

    def _installed(self) -> None:
        if self._asked:
            return
        self._asked = True
        for point in metadata.entry_points(group=self.group):
            self._places.setdefault(point.name, point.value)

    def _unknown(self, name: str) -> str:
        return f"{self.what} {name!r} is not one of {', '.join(self)}{self.hint(name)}"

    def hint(self, name: str) -> str:
        """What was meant, as the end of a sentence; empty where nothing is near."""
        close = difflib.get_close_matches(str(name), [*self], 1)
        return f"; did you mean {close[0]!r}?" if close else ""

    def __contains__(self, name: object) -> bool:
        if name not in self._places and name not in self._values:
            self._installed()
        return name in self._places or name in self._values

    def __iter__(self) -> Iterator[str]:
        self._installed()
        return iter({**self._places, **self._values})

    def __len__(self) -> int:
        return len(list(iter(self)))


# All that may be added to. What the values must be like stands with the first of each.
BUDGETS: Registry[Any] = Registry(  # ``pathprune.family.costs.Cost``
    "budget",
    "budgets",
    {name: f"pathprune.family.costs:{name.upper()}" for name in ("keep", "params", "macs", "bytes")},
)
OBJECTIVES: Registry[Any] = Registry(  # a function of a model that gives a ``pathprune.objectives.base.Objective``
    "objective",
    "objectives",
    {
        "embedding": "pathprune.objectives.embedding:EmbeddingObjective.of",
        "hidden": "pathprune.objectives.embedding:HiddenObjective.of",
        "logits": "pathprune.objectives.logits:LogitsObjective.of",
        "task": "pathprune.objectives.task:TaskObjective.of",
    },
)
DYNAMICS: Registry[Any] = Registry(  # ``pathprune.ranking.dynamics.Driver``
    "dynamics",
    "dynamics",
    {
        "sampled": "pathprune.ranking.dynamics:Sampled",
        "lbi": "pathprune.ranking.dynamics:Lbi",
        "spp-released": "pathprune.ranking.dynamics:Released",
    },
)
EXPORTERS: Registry[Any] = Registry(  # ``pathprune.export.base.Exporter``
    "exporter", "exporters", {"auto": "pathprune.export.auto:export"}
)
LAYOUTS: Registry[Any] = Registry(  # ``pathprune.discovery.layouts.candidate.Layout``, asked in this order
    "layout",
    "layouts",
    {
        "latent-attention": "pathprune.discovery.layouts.attention:find_latent_attention",
        "attention": "pathprune.discovery.layouts.attention:find_attention",
        "mlp": "pathprune.discovery.layouts.mlp:find_mlp",
        "experts": "pathprune.discovery.layouts.experts:find_experts",
    },
)
