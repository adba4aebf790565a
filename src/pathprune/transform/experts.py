"""Experts whose maps are slices of one stacked parameter: what stays of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from pathprune.errors import MismatchError
from pathprune.family.pairs import Pair, Slot
from pathprune.family.selection import Selection
from pathprune.transform.record import Record
from pathprune.types import Ints


def _stacks(pair: Pair) -> dict[tuple[str, str], list[Slot]]:
    """(module, stacked parameter) -> the maps of the pair that it holds."""
    stacks: dict[tuple[str, str], list[Slot]] = {}
    for slot in pair.slots:
        stacks.setdefault((slot.module, slot.parameter), []).append(slot)
    return stacks


def plan_stack(model: nn.Module, pair: Pair, keep: npt.NDArray[np.bool_], record: Record) -> None:
    if len({int(row.sum()) for row in keep}) > 1:
        raise MismatchError(f"{pair.name}: experts must keep equally many neurons")
    for (name, parameter), slots in _stacks(pair).items():
        shapes = record["parameters"].setdefault(name, {})
        shape = list(getattr(model.get_submodule(name), parameter).shape)
        shape[slots[0].dim] = slots[0].total * int(keep[0].sum())
        shapes[parameter] = shape
        if slots[0].bias and slots[0].side == "out":
            shapes[f"{parameter}_bias"] = [pair.groups, shape[slots[0].dim]]


def check_experts(model: nn.Module, record: Mapping[str, Any]) -> None:
    """Refuse widths of experts that the kernel they are to be computed with cannot read.

    Raises:
        MismatchError: rows are no multiples of 16 bytes, as ``torch.nn.functional.grouped_mm`` wants them.
    """
    for name, shapes in record["parameters"].items():
        module = model.get_submodule(name)
        if getattr(getattr(module, "config", None), "_experts_implementation", None) != "grouped_mm":
            continue
        for parameter, shape in shapes.items():
            dtype = getattr(module, parameter).dtype
            multiple = 16 // dtype.itemsize
            if odd := [size for size in shape[1:] if size % multiple or not size]:
                raise MismatchError(
                    f"{name}.{parameter} would be {odd[0]} wide; grouped_mm, which computes the experts, takes "
                    f"positive multiples of {multiple} in {dtype}. Keep such a multiple of neurons, or choose "
                    'experts_implementation="eager", in from_pretrained or by set_experts_implementation'
                )


@dataclass(frozen=True)
class Stack:
    """One stacked parameter of a pair, sliced.

    Args:
        dim: the dimension that is sliced.
        indices: (experts, kept), what stays of it.
        consumes: whether scales are folded into it.
    """

    name: str
    dim: int
    indices: Ints
    consumes: bool


def stacks(pair: Pair, keep: npt.NDArray[np.bool_]) -> list[Stack]:
    """The stacked parameters of a pair, biases included, and what stays of them."""
    found = []
    for (module, parameter), slots in _stacks(pair).items():
        old = np.concatenate([np.stack([slot.index(1, pair.width)[0, 0][row] for row in keep]) for slot in slots], 1)
        new = np.concatenate([slot.index(1, max(int(keep[0].sum()), 1))[0, 0][: keep[0].sum()] for slot in slots])
        name, indices = f"{module}.{parameter}", old[:, np.argsort(new)]
        found.append(Stack(name, slots[0].dim, indices, pair.consumer in slots))
        if slots[0].bias and slots[0].side == "out":
            found.append(Stack(f"{name}_bias", 1, indices, consumes=False))
    return found


def scaled_stack(kept: Tensor, stack: Stack, pair: Pair, selection: Selection) -> Tensor:
    """Fold the scales of the units that stay into what stays of a stacked parameter."""
    if not stack.consumes or pair.name not in selection.scale:
        return kept
    factor = torch.from_numpy(np.take_along_axis(selection.mask(pair), stack.indices, axis=1)).to(kept.device)
    return (kept * factor.unsqueeze(3 - stack.dim)).to(kept.dtype)
