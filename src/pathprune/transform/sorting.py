"""Sort the units of a dense model by importance, so that every size of a path is a prefix of its weights.

Rotations are folded into the weights, and every axis whose places mean nothing is brought into the order in
which its units leave, those that stay longest first: the neurons of an MLP or of an expert, the dimensions of a
head, and the heads of a layer. Places that do mean something stay: dimensions under rotary embedding or a norm, heads
that the layer's code tells apart (position biases), whatever the pair's proof found the code not to follow.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from pathprune.family.learned import permuted
from pathprune.family.order import UnitOrder
from pathprune.family.pair_list import PairList
from pathprune.family.pairs import Pair, Slot
from pathprune.family.path import SolutionPath
from pathprune.model.contexts import M, copied
from pathprune.model.identity import check_base, identify
from pathprune.model.linear import linear_map
from pathprune.transform.attach import own_names
from pathprune.transform.folding import axis_first, rotate, through
from pathprune.transform.reconstruction import constant
from pathprune.types import Floats, Ints


def sort_units(model: M, path: SolutionPath) -> tuple[M, SolutionPath]:
    """A model that computes what ``model`` computes, with its units sorted, and a path of the same family over it.

    The sorted model has the class, configuration and shapes of ``model``, which is untouched; sliced at any
    budget by its own path, which has no rotations, it computes what ``model`` does sliced by ``path``.

    Raises:
        MismatchError: the path belongs to another model.

    Example:
        >>> ordered, sorted_path = pp.sort_units(model, path)
        >>> torch.allclose(ordered(**batches[0])[0], model(**batches[0])[0], atol=1e-4)
        True
    """
    check_base(model, path.pairs)
    if path.delta:  # which ``elastic`` has found, in sorted units
        return copied(model), path
    ordered, orders = copied(model), unit_orders(path)
    with torch.no_grad():
        for pair in path.pairs:
            for slot in pair.slots:
                sort = _sort_stack if slot.parameter else _sort_map
                sort(ordered, pair, slot, orders[pair.name], path.basis.get(pair.name))
    own_names(ordered)
    return ordered, rebased(sorted_path(path, orders), ordered)


def unit_orders(path: SolutionPath) -> dict[str, UnitOrder]:
    """Pair name -> its units by the time at which they leave, the last first."""
    attention: dict[str, list[Pair]] = {}
    for pair in path.pairs:
        if pair.kind != "mlp":
            attention.setdefault(pair.block, []).append(pair)
    orders = {}
    for pair in path.pairs:
        step = path.order.step[pair.name]  # (G, U)
        heads, units = np.arange(pair.groups), np.broadcast_to(np.arange(pair.units), pair.shape)
        members = attention.get(pair.block, []) if pair.kind != "mlp" else []
        if {member.kind for member in members} == {"qk", "vo"} and all(member.fewer for member in members):
            heads = _descending(step.max(axis=1))
        if pair.rotatable or (pair.kind == "mlp" and pair.narrow and not pair.mixing):
            # A path that removes the same dimensions from every head must find them in the same places again.
            units = _descending(np.broadcast_to(step.max(axis=0), pair.shape) if path.unit == "shared" else step)
        orders[pair.name] = UnitOrder(heads, units)
    return orders


def sorted_path(path: SolutionPath, orders: dict[str, UnitOrder]) -> SolutionPath:
    """The same family by new places, without rotations."""
    return replace(path, **permuted(path.arrays, orders))


def rebased(path: SolutionPath, model: nn.Module) -> SolutionPath:
    """A path without rotations as one of a model with the same pairs and other weights."""
    base = path.pairs.base
    here = identify(model, base.macs_per_token, base.macs_per_sequence)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    fill_sum: dict[str, Floats] = {}
    normal: dict[str, Floats] = {}
    delta_sum: dict[str, Floats] = {}
    delta_normal: dict[str, Floats] = {}
    for pair in path.pairs:
        if pair.name not in path.fill:
            continue
        module = linear_map(model, pair.consumer.module)
        parts = [(fill_sum, normal, module.weight.detach())]
        if (name := names[id(module.weight)]) in path.delta:
            parts.append((delta_sum, delta_normal, torch.from_numpy(path.delta[name]).to(module.weight)))
        for sums, equations, weight in parts:
            total, right = _of_all(path, pair, axis_first(weight, module, pair.consumer.side))
            sums[pair.name] = total
            if right is not None:
                equations[pair.name] = right
    pairs = PairList(path.pairs, here, path.pairs.refused)
    return replace(path, pairs=pairs, fill_sum=fill_sum, normal=normal, delta_sum=delta_sum, delta_normal=delta_normal)


def _of_all(path: SolutionPath, pair: Pair, weight: Tensor) -> tuple[Floats, Floats | None]:
    """What a consumer (places, d) makes of all units' constants, (d,), and its normal equations (N, d) where there is
    compensation.
    """
    places = pair.consumer.index(pair.groups, pair.width)
    if pair.name not in path.covariance:
        return through(path.fill[pair.name], weight, places).cpu().numpy(), None
    whole = weight[torch.from_numpy(places.ravel()).to(weight.device)].double()
    fill, centre, covariance = (
        torch.from_numpy(part[pair.name]).to(whole) for part in (path.fill, path.centre, path.covariance)
    )
    return (constant(fill, centre) @ whole).cpu().numpy(), (covariance @ whole).cpu().numpy()


def _descending(step: Ints) -> Ints:
    return np.argsort(-step, axis=-1, kind="stable")


def _sort_map(model: nn.Module, pair: Pair, slot: Slot, order: UnitOrder, basis: Floats | None) -> None:
    """Sort the inner axis of one linear map in place."""
    module = linear_map(model, slot.module)
    places = slot.index(pair.groups, pair.width)  # (G, R, D)
    units = np.broadcast_to(np.arange(pair.width), (pair.groups, pair.width)) if pair.rotary else order.units
    new = torch.from_numpy(places.ravel())
    old = torch.from_numpy(np.take_along_axis(places, units[:, None], axis=2)[order.heads].ravel())

    def sort(tensor: Tensor) -> Tensor:
        if basis is not None:
            tensor = rotate(tensor, basis, pair, slot)
        return tensor.index_copy(0, new.to(tensor.device), tensor[old.to(tensor.device)])

    module.weight.copy_(axis_first(sort(axis_first(module.weight, module, slot.side)), module, slot.side))
    if module.bias is not None and slot.side == "out":
        module.bias.copy_(sort(module.bias))


def _sort_stack(model: nn.Module, pair: Pair, slot: Slot, order: UnitOrder, basis: Floats | None) -> None:
    """Sort the neurons of every expert in place."""
    module = model.get_submodule(slot.module)
    weight: Tensor = getattr(module, slot.parameter)
    size = weight.shape[slot.dim]
    neurons = slot.index(1, pair.width)[0, 0]  # (D,), their places in each expert
    old = np.tile(np.arange(size), (pair.groups, 1))
    old[:, neurons] = neurons[order.units]
    where = torch.from_numpy(old).to(weight.device)
    weight.copy_(torch.take_along_dim(weight, where.unsqueeze(3 - slot.dim), slot.dim))
    if slot.bias and slot.side == "out":
        bias: Tensor = getattr(module, f"{slot.parameter}_bias")
        bias.copy_(torch.take_along_dim(bias, where, 1))
