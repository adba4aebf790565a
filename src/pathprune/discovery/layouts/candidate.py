"""A candidate for a proof, and what layouts share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn

from pathprune.family.pairs import Pair, Slot
from pathprune.model.linear import features, is_map, linear_map


@dataclass(frozen=True)
class Candidate:
    """A sublayer that may hold pairs.

    Args:
        block: the module to prove it on, which holds all maps.
        choices: the pairs under each layout that the maps may have, likeliest first.
    """

    block: str
    choices: tuple[tuple[Pair, ...], ...]

    @property
    def modules(self) -> set[str]:
        return {slot.module for pair in self.choices[0] for slot in pair.slots}


class Layout(Protocol):
    """Recognises one kind of sublayer."""

    def __call__(self, model: nn.Module, name: str, module: nn.Module, order: Mapping[str, int]) -> Candidate | None:
        """The candidate that a module is, or ``None``.

        Args:
            model: the whole model.
            name, module: of the sublayer that is looked at; every module of the model is.
            order: map -> when it was first called in a forward pass.

        Raises:
            Misfit: its maps have the right names and do not fit together.
        """


def is_within(name: str, other: str) -> bool:
    """Whether a module is another or inside it."""
    return name == other or name.startswith(f"{other}.")


class Misfit(Exception):
    """Maps with the right names do not fit together; says why."""


def shapes_meet(model: nn.Module, maps: list[str]) -> bool:
    *ups, down = (features(linear_map(model, m)) for m in maps)
    wide = {up[1] for up in ups}
    return wide == {down[0]} or (len(ups) == 1 and wide == {2 * down[0]})


def linear_slot(model: nn.Module, name: str, repeat: int = 1, side: Any = "out") -> Slot:
    module = linear_map(model, name)
    size = features(module)[0 if side == "out" else 1]
    return Slot(name, side, size, repeat, module.bias is not None)


def child_name(model: nn.Module, name: str, child: str) -> str | None:
    """Full name of a child that is a linear map."""
    full = f"{name}.{child}" if name else child
    try:
        return full if is_map(model.get_submodule(full)) else None
    except AttributeError:
        return None


def common_parent(names: list[str]) -> str:
    """Deepest module that holds all of ``names``."""
    parts: list[str] = []
    for step in zip(*(name.split(".")[:-1] for name in names), strict=False):
        if len(set(step)) > 1:
            break
        parts.append(step[0])
    return ".".join(parts)


def parameter_ids(module: nn.Module) -> set[int]:
    return {id(parameter) for parameter in module.parameters(recurse=False)}
