"""What stays of a map, with rotations, scales, fills and reconstruction folded into its weights."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pathprune.family.pairs import Pair, Slot
from pathprune.family.selection import Selection
from pathprune.model.linear import Map
from pathprune.transform.plan import Axis, inner_dim
from pathprune.transform.reconstruction import by_place, constant, folded
from pathprune.transform.weights import WeightSource
from pathprune.types import Floats, Ints


class Moments:
    """What consumers make of all units of their pairs, those that go included: computed from all of their weights.

    Args:
        fill: pair name -> (G, D).
        centre, covariance: pair name -> (N,) and (N, N), of what the consumer reads, where there is reconstruction.
    """

    needs_all = True  # weights, also those of units that go

    def __init__(
        self, fill: Mapping[str, Floats], centre: Mapping[str, Floats], covariance: Mapping[str, Floats]
    ) -> None:
        self.fill, self.centre, self._covariance = fill, centre, covariance

    def constant(self, pair: Pair, weight: Tensor) -> Tensor:
        """(d,), c W: what a consumer with ``weight`` (positions, d) makes of all units' constants."""
        index = pair.consumer.index(pair.groups, pair.width)
        if pair.name not in self.centre:
            return through(self.fill[pair.name], weight, index)
        centre = torch.from_numpy(self.centre[pair.name]).to(weight.device, torch.float64)
        return constant(torch.from_numpy(self.fill[pair.name]), centre) @ _rows(weight, index)

    def covariance(self, pair: Pair, kept: Tensor) -> Tensor:
        """C_KK, (K, K), of those at ``kept`` (K,) in what the consumer reads."""
        array = torch.from_numpy(self._covariance[pair.name])
        return array[kept.cpu()][:, kept.cpu()].to(kept.device, torch.float64)

    def normal(self, pair: Pair, kept: Tensor, weight: Tensor) -> Tensor:
        """(C W)_K, (K, d)."""
        rows = torch.from_numpy(self._covariance[pair.name])[kept.cpu()]
        index = pair.consumer.index(pair.groups, pair.width)
        return rows.to(weight.device, torch.float64) @ _rows(weight, index)


def sliced_map(
    source: WeightSource,
    name: str,
    module: Map,
    axis: Axis,
    slots: list[tuple[Pair, Slot]],
    selection: Selection,
    moments: Moments,
) -> tuple[Tensor, Tensor | None]:
    """What stays of a map's weight and bias, in its own orientation; all that changes numbers is in float64.

    Args:
        name, module: of the map, which need have no weights.
        slots: the pairs that it belongs to, and what it is in them.
    """
    indices, dim = axis.indices()[0], inner_dim(module, axis.side)
    needs_all = moments.needs_all and any(
        pair.name in selection.basis or (slot == pair.consumer and pair.name in selection.fill) for pair, slot in slots
    )

    def read(name: str, dim: int) -> Tensor:
        """Zero where nothing is read."""
        if needs_all:
            return source.whole(name)
        part = source.read(name, dim, indices)
        return part.new_zeros(source.shape(name)).index_copy(dim, torch.from_numpy(indices).to(part.device), part)

    weight = read(f"{name}.weight", dim)
    dtype, weight = weight.dtype, axis_first(weight, module, axis.side)
    bias: Tensor | None = None
    if module.bias is not None:
        bias = read(f"{name}.bias", 0) if axis.side == "out" else source.whole(f"{name}.bias")
    for pair, slot in slots:
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
            fold = reconstruct if pair.name in moments.centre else fill_and_scale
            weight, bias = fold(weight, bias, pair, selection, moments)
            if pair.name in selection.output:
                gain, shift = torch.from_numpy(selection.output[pair.name]).to(weight.device, torch.float64)
                weight, bias = weight * gain, (shift if bias is None else bias * gain + shift)
    kept = torch.from_numpy(indices).to(weight.device)
    if bias is not None:
        bias = (bias[kept] if axis.side == "out" else bias).to(dtype, copy=True)
    return axis_first(weight[kept], module, axis.side).to(dtype).contiguous(), bias


def fill_and_scale(
    weight: Tensor, bias: Tensor | None, pair: Pair, selection: Selection, moments: Moments
) -> tuple[Tensor, Tensor | None]:
    """Fold y' = m y + (1 - m) c, at the consumer's input (for ``qk``, at the keys), into its weight and bias."""
    slot, mask = pair.consumer, pair.by_dim(selection.mask(pair))  # (G, D)
    index = slot.index(pair.groups, pair.width)  # (G, R, D)
    if pair.name in selection.fill:
        added = moments.constant(pair, weight) - through(mask * selection.fill[pair.name], weight, index)
        bias = added if bias is None else bias.double() + added
    if pair.name in selection.scale:
        positions = torch.from_numpy(index.ravel()).to(weight.device)
        factor = by_place(torch.from_numpy(mask), index.size).to(weight.device)
        weight = weight.double().index_copy(0, positions, weight[positions] * factor.unsqueeze(1))
        if slot.side == "out" and bias is not None:
            bias = bias.double().index_copy(0, positions, bias[positions] * factor)
    return weight, bias


def reconstruct(
    weight: Tensor, bias: Tensor | None, pair: Pair, selection: Selection, moments: Moments
) -> tuple[Tensor, Tensor | None]:
    """Fold what stays, and the others' prediction from it, into a consumer (``transform.reconstruction``)."""

    def by_position(by_dim: npt.NDArray[np.generic]) -> Tensor:
        return by_place(torch.from_numpy(by_dim), len(centre)).to(weight.device)

    centre = torch.from_numpy(moments.centre[pair.name]).to(weight.device, torch.float64)
    kept = by_position(pair.by_dim(selection.keep[pair.name])).nonzero()[:, 0]
    scale = by_position(pair.by_dim(selection.mask(pair)))[kept]
    constants = constant(torch.from_numpy(selection.fill[pair.name]), centre)[kept]
    positions = torch.from_numpy(pair.consumer.index(pair.groups, pair.width).ravel()).to(weight.device)[kept]
    rows, covariance = weight[positions].double(), moments.covariance(pair, kept)
    ours, added = folded(covariance, moments.normal(pair, kept, weight), rows, scale, centre[kept], constants)
    added = added + moments.constant(pair, weight)
    return weight.double().index_copy(0, positions, ours), added if bias is None else bias.double() + added


def through(constant: npt.NDArray[np.floating], weight: Tensor, index: Ints) -> Tensor:
    """What a consumer makes of a constant (G, D) at its input: (d,), in float64.

    Args:
        weight: (positions, d).
        index: (G, R, D), of each head's dimensions in ``weight``.
    """
    value = torch.from_numpy(constant).to(weight.device, torch.float64).unsqueeze(1).expand(index.shape).flatten()
    return value @ _rows(weight, index)


def _rows(weight: Tensor, index: Ints) -> Tensor:
    return weight[torch.from_numpy(index.ravel()).to(weight.device)].double()


def axis_first(weight: Tensor, module: Map, side: str) -> Tensor:
    """Turn the weight so that the inner axis comes first, or back."""
    return weight.mT if inner_dim(module, side) else weight


def rotate(tensor: Tensor, basis: npt.NDArray[np.floating], pair: Pair, slot: Slot) -> Tensor:
    """Apply a pair's rotation A, (G, D, D), to the inner axis, the first, of one map's weight or bias; in float64."""
    rotation = torch.from_numpy(basis).double()
    if slot != pair.mask_slot:  # its partner takes A^-T, so that products do not change
        rotation = torch.linalg.inv(rotation).mT
    index = torch.from_numpy(slot.index(pair.groups, pair.width)).to(tensor.device)  # (G, R, D)
    heads = torch.einsum("ged,grd...->gre...", rotation.to(tensor.device), tensor.double()[index])
    return tensor.double().index_copy(0, index.flatten(), heads.flatten(0, 2))
