"""What is left of a map, with rotations, scales, fills and reconstruction folded into its weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from pathprune.family.pairs import Pair, Slot
from pathprune.family.selection import Selection
from pathprune.model.linear import Map
from pathprune.transform.plan import Axis
from pathprune.transform.reconstruction import by_place, constant, folded
from pathprune.types import Ints

Fold = Callable[[Tensor, "Tensor | None", Pair, Slot, Selection], "tuple[Tensor, Tensor | None]"]


def sliced_map(
    module: Map, axis: Axis, parts: list[tuple[Pair, Slot]], selection: Selection, fold: Fold | None = None
) -> tuple[Tensor, Tensor | None]:
    """What is left of a map's weight and bias, in its own orientation; all that changes numbers is in float64.

    Args:
        fold: puts into a consumer what the pair's other units leave to it; by default from all of their weights.
    """
    weight = axis_first(module.weight.detach(), module, axis.side)
    bias: Tensor | None = None if module.bias is None else module.bias.detach()
    for pair, slot in parts:
        basis = selection.basis.get(pair.name)
        if basis is not None:
            weight = rotate(weight, basis, pair, slot)
            if slot.side == "out" and bias is not None:
                bias = rotate(bias, basis, pair, slot)
        if pair.rescale and pair.kind == "qk" and slot == pair.slots[0]:
            index = torch.from_numpy(slot.index(pair.groups, pair.width).ravel()).to(weight.device)
            factor = math.sqrt(axis.width / pair.width)
            weight = weight.index_copy(0, index, weight[index] * factor)
            if bias is not None:
                bias = bias.index_copy(0, index, bias[index] * factor)
        if slot == pair.consumer and not selection.keep[pair.name].all():
            whole = compensate if pair.name in selection.covariance else plain
            weight, bias = (fold or whole)(weight, bias, pair, slot, selection)
            if pair.name in selection.output:
                gain, shift = torch.from_numpy(selection.output[pair.name]).to(weight.device, torch.float64)
                weight, bias = weight * gain, (shift if bias is None else bias * gain + shift)
    kept = torch.from_numpy(axis.places()[0]).to(weight.device)
    if bias is not None and axis.side == "out":
        bias = bias[kept]
    return axis_first(weight[kept], module, axis.side), bias


def plain(
    weight: Tensor, bias: Tensor | None, pair: Pair, slot: Slot, selection: Selection
) -> tuple[Tensor, Tensor | None]:
    """Fold y' = m y + (1 - m) c, at the consumer's input (for ``qk``, at the keys), into its weight and bias."""
    index = slot.index(pair.groups, pair.width)  # (G, R, D)
    mask = torch.from_numpy(pair.by_dim(selection.mask(pair))).to(weight.device)  # (G, D)
    places = torch.from_numpy(index.ravel()).to(weight.device)
    if pair.name in selection.fill:
        added = through((1 - pair.by_dim(selection.mask(pair))) * selection.fill[pair.name], weight, index)
        bias = added if bias is None else bias.double() + added
    if pair.name in selection.scale:
        factor = mask.unsqueeze(1).expand(index.shape).flatten()
        weight = weight.double().index_copy(0, places, weight[places] * factor.unsqueeze(1))
        if slot.side == "out" and bias is not None:
            bias = bias.double().index_copy(0, places, bias[places] * factor)
    return weight, bias


def compensate(
    weight: Tensor, bias: Tensor | None, pair: Pair, slot: Slot, selection: Selection
) -> tuple[Tensor, Tensor | None]:
    """Fold what stays, and what it tells of the rest, into a consumer (equations in ``transform.reconstruction``)."""

    def array(values: npt.NDArray[Any]) -> Tensor:
        return torch.from_numpy(values).to(weight.device, torch.float64)

    covariance = array(selection.covariance[pair.name])
    centre = array(selection.centre[pair.name])
    left, scale, constants = by_places(pair, selection, centre)
    places = torch.from_numpy(slot.index(pair.groups, pair.width).ravel()).to(weight.device)
    whole, rows = weight[places].double(), covariance[left]
    ours, added = folded(rows[:, left], rows @ whole, whole[left], scale[left], centre[left], constants[left])
    added = added + constants @ whole
    return weight.double().index_copy(0, places[left], ours), added if bias is None else bias.double() + added


def by_places(pair: Pair, selection: Selection, centre: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """By places in what a consumer reads, whose mean is (N,): (K,) those that stay, and (N,) of all m and c."""
    keep, mask = (torch.from_numpy(pair.by_dim(array)) for array in (selection.keep[pair.name], selection.mask(pair)))
    keep, scale = by_place(keep.to(centre.device), len(centre)), by_place(mask.to(centre), len(centre))
    fill = torch.from_numpy(selection.fill[pair.name]).to(centre)
    return keep.nonzero()[:, 0], scale, constant(fill, centre)


def through(constant: npt.NDArray[np.floating], weight: Tensor, places: Ints) -> Tensor:
    """What a consumer makes of a constant (G, D) at its input: (d,), in float64.

    Args:
        weight: (places, d).
        places: (G, R, D), of each head's dimensions in ``weight``.
    """
    value = torch.from_numpy(constant).to(weight.device, torch.float64).unsqueeze(1).expand(places.shape).flatten()
    return value @ weight[torch.from_numpy(places.ravel()).to(weight.device)].double()


def axis_first(weight: Tensor, module: Map, side: str) -> Tensor:
    """Turn the weight so that the inner axis comes first, or back."""
    first = (side == "out") != isinstance(module, Conv1D)
    return weight if first else weight.mT


def rotate(tensor: Tensor, basis: npt.NDArray[np.floating], pair: Pair, slot: Slot) -> Tensor:
    """Apply a pair's rotation A, (G, D, D), to the inner axis, the first, of one map's weight or bias; in float64."""
    rotation = torch.from_numpy(basis).double()
    if slot != pair.mask_slot:  # its partner takes A^-T, so that products do not change
        rotation = torch.linalg.inv(rotation).mT
    index = torch.from_numpy(slot.index(pair.groups, pair.width)).to(tensor.device)  # (G, R, D)
    heads = torch.einsum("ged,grd...->gre...", rotation.to(tensor.device), tensor.double()[index])
    return tensor.double().index_copy(0, index.flatten(), heads.flatten(0, 2))
