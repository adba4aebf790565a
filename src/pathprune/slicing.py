"""Make the modules of a model physically smaller.

A sliced model is its dense model with smaller linear maps and nothing else: no attention code
is replaced. Where the layer's own code wants more than the small maps give, zeros are put in
*between* the linear maps, so that the model's own ``view(..., -1, head_dim)``, its
cache and every attention kernel work unchanged, while the parameters stay small:

* heads narrower on one side of the attention are padded to the other side's width;
* where the code does not follow a smaller width or number of heads (``Pair.narrow``,
  ``Pair.fewer``), what is kept stays in its dense place, with zeros around it;
* a layer that lost its attention has zero heads.

Here is what is left of the weights; modules of those shapes are made in ``pathprune.shapes``, stacked experts
are in ``pathprune.experts``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pathprune.budget import Selection
from pathprune.compensation import by_place, constant, folded
from pathprune.delta import at_size
from pathprune.errors import MismatchError
from pathprune.experts import check_experts, plan_stack, sliced_stacks
from pathprune.modes import copied
from pathprune.pairs import Ints, Pair, Slot
from pathprune.shapes import (
    HEADS,
    KEY_HEADS,
    KEY_TOTALS,
    SCALES,
    TOTALS,
    WIDTHS,
    Map,
    Record,
    attention_of,
    features,
    linear_map,
    shape_attention,
    sized_map,
)

Fold = Callable[[Tensor, "Tensor | None", Pair, Slot, Selection], "tuple[Tensor, Tensor | None]"]


@dataclass
class Axis:
    """The sliced axis of one linear map: which dense places are kept, and where they are seen."""

    side: str
    dense: int
    size: int
    width: int  # of a head, as seen
    old: list[Ints] = field(default_factory=list)
    new: list[Ints] = field(default_factory=list)
    left: npt.NDArray[np.bool_] = field(init=False)

    def __post_init__(self) -> None:
        self.left = np.ones(self.dense, dtype=bool)  # dense places of no pair

    def places(self) -> tuple[Ints, Ints]:
        """(kept dense places, where they are seen), in the order of the latter."""
        rest = np.flatnonzero(self.left)
        old, new = np.concatenate([*self.old, rest]), np.concatenate([*self.new, rest])
        order = np.argsort(new)
        return old[order], new[order]


def slice_model(model: nn.Module, selection: Selection) -> nn.Module:
    """A new, physically smaller model; ``model`` is untouched.

    In exact arithmetic its outputs are those of ``masked(model, selection)``.
    Its configuration carries the widths, so that ``save_pretrained`` and ``from_pretrained`` work as for any
    model of ``transformers`` (``pathprune.hub``).

    Raises:
        MismatchError: the selection belongs to another model, or to other weights of it; or the widths of experts are
            such that their kernel cannot read them.
    """
    from pathprune.discovery import check_base
    from pathprune.hub import attach_record

    check_base(model, selection.pairs)
    small, record = slice_modules(model, selection)
    attach_record(small, record, selection)
    return small


def slice_modules(model: nn.Module, selection: Selection) -> tuple[nn.Module, Record]:
    """Slice any module tree that holds the selection's pairs; no identity is checked or recorded."""
    with at_size(model, selection):
        return _slice_modules(model, selection)


def _slice_modules(model: nn.Module, selection: Selection) -> tuple[nn.Module, Record]:
    axes, record = plan(model, selection)
    check_experts(model, record)
    memo: dict[int, Any] = {}
    parts: dict[str, list[tuple[Pair, Slot]]] = {}
    for pair in selection.pairs:
        for slot in pair.slots:
            parts.setdefault(slot.module, []).append((pair, slot))
    for name, axis in axes.items():
        old = linear_map(model, name)
        weight, bias = sliced_map(old, axis, parts[name], selection)
        new = sized_map(old, record["modules"][name], old.weight.device)
        new.weight.data.copy_(weight)
        new.weight.requires_grad_(old.weight.requires_grad)
        if new.bias is not None and bias is not None:
            new.bias.data.copy_(bias)
            new.bias.requires_grad_(old.weight.requires_grad if old.bias is None else old.bias.requires_grad)
        new.train(old.training)
        memo[id(old)] = new  # the copy of the model takes the small map in place of a copy of the large one
    for pair in selection.pairs:
        if pair.stacked and not selection.keep[pair.name].all():
            memo |= sliced_stacks(model, pair, selection)
    small = copied(model, memo)
    shape_attention(small, record)
    return small, record


def plan(model: nn.Module, selection: Selection) -> tuple[dict[str, Axis], Record]:
    """What ``selection`` leaves of every map's axis, and the shapes of the sliced model."""
    record: Record = {"modules": {}, "parameters": {}, "attributes": {}, "rotary": {}}
    axes: dict[str, Axis] = {}
    blocks: dict[str, list[Pair]] = {}
    for pair in selection.pairs:
        blocks.setdefault(pair.block if pair.kind != "mlp" else pair.name, []).append(pair)
    for members in blocks.values():
        if all(selection.keep[pair.name].all() for pair in members):
            continue
        if members[0].stacked:
            plan_stack(model, members[0], selection.keep[members[0].name], record)
        elif members[0].kind == "mlp":
            pair, kept = members[0], selection.kept(members[0])
            _place(model, pair, selection.keep[pair.name], axes, 1, kept if pair.narrow else pair.width)
        else:
            _plan_attention(model, selection, members, axes, record)
    for name, axis in axes.items():
        record["modules"][name] = _shape(linear_map(model, name), axis)
    for pair in selection.pairs:
        if pair.name in selection.fill and not selection.keep[pair.name].all():
            record["modules"][pair.consumer.module]["bias"] = True
    return axes, record


def _plan_attention(
    model: nn.Module, selection: Selection, members: list[Pair], axes: dict[str, Axis], record: Record
) -> None:
    _check_rectangles(selection, members)
    first = members[0]
    count = selection.widths(first)[0]
    widths = [selection.widths(pair)[1] for pair in members]
    attention_name = attention_of(model, first)
    attention = model.get_submodule(attention_name)
    groups, width = first.groups, first.width
    if first.narrow:
        width = max(widths)
        if any(pair.rotary for pair in members):
            width += width % 2  # rotary embedding turns an even number of dimensions
    if first.fewer:
        groups = count
        if count == 0:
            # Zero heads of the old width: view(..., -1, head_dim) of nothing stays defined. A decoder's cache
            # counts positions by its first layer's keys, and is shown one thin head of zeros instead.
            groups = int(bool(getattr(attention, "is_causal", False)))
            width = first.width if not (groups and first.narrow) else min(8, first.width)
    elif first.narrow and count == 0:
        width = min(8, first.width)
    for pair in members:
        seen = width if pair.narrow else pair.width
        _place(model, pair, selection.keep[pair.name], axes, groups, seen)
        if pair.rotary and pair.narrow and groups:
            record["rotary"][attention_name] = _columns(pair, selection.keep[pair.name], width)
    if first.narrow or first.fewer:
        record["attributes"][attention_name] = _sizes(attention, members, groups, width)


def _check_rectangles(selection: Selection, members: list[Pair]) -> None:
    heads = {selection.keep[pair.name].any(axis=1).tobytes() for pair in members}
    if len(heads) > 1:
        raise MismatchError(f"{members[0].block}: query-key and value-output must keep the same heads")
    for pair in members:
        rows = [row for row in selection.keep[pair.name] if row.any()]
        if len({int(row.sum()) for row in rows}) > 1:
            raise MismatchError(f"{pair.name}: heads must keep equally many dimensions")
        if pair.rotary and len({row.tobytes() for row in rows}) > 1:
            raise MismatchError(f"{pair.name}: heads must keep the same dimensions, as they share the rotary embedding")


def _place(
    model: nn.Module, pair: Pair, keep: npt.NDArray[np.bool_], axes: dict[str, Axis], groups: int, width: int
) -> None:
    """Add the places of one pair's kept dimensions to its maps' axes, seen as ``groups`` x ``width``."""
    dims = pair.by_dim(keep)  # (G, D)
    rank = (np.cumsum(keep, axis=1) - 1)[:, pair.unit_of]  # of the kept unit in its head
    d = np.broadcast_to(np.arange(pair.width), dims.shape)
    if pair.narrow:
        d = 2 * rank + d % 2 if pair.rotary == "neighbours" else rank + d // pair.units * (width // 2)
    g = np.arange(pair.groups)[:, None]
    if pair.fewer:
        g = (np.cumsum(keep.any(axis=1)) - 1)[:, None]
    for slot in pair.slots:
        dense = features(linear_map(model, slot.module))[slot.side == "out"]
        whole = (pair.narrow and width != pair.width) or (pair.fewer and groups != pair.groups)
        size = slot.total * groups * width if whole else dense
        axis = axes.setdefault(slot.module, Axis(slot.side, dense, size, width))
        if (axis.side, axis.size) != (slot.side, size):
            raise MismatchError(f"{slot.module}: two pairs see the map differently")
        here = slot.index(pair.groups, pair.width)
        axis.left[here] = False
        axis.old.append(pair.positions(slot, keep))
        kept = np.broadcast_to(dims[:, None], here.shape)
        seen = slot.index(max(groups, 1), max(width, 1))
        heads = (g[..., None], np.arange(slot.repeat)[:, None], d[:, None])
        axis.new.append(seen[tuple(np.broadcast_to(x, here.shape)[kept] for x in heads)])


def _columns(pair: Pair, keep: npt.NDArray[np.bool_], width: int) -> list[int]:
    """Columns of cos and sin for a head ``width`` wide."""
    kept = np.flatnonzero(keep.any(axis=0)).tolist()
    kept += [0] * (width // 2 - len(kept))  # a padded column turns zeros; any angle will do
    if pair.rotary == "neighbours":
        return [column for unit in kept for column in (2 * unit, 2 * unit + 1)]
    return kept + [unit + pair.units for unit in kept]


def _sizes(attention: nn.Module, members: list[Pair], groups: int, width: int) -> dict[str, int | float]:
    """Values of the attention module's own size attributes."""
    first = members[0]
    repeat = max(slot.repeat for pair in members for slot in pair.slots)
    now: dict[str, int | float] = {}
    for names, dense, value in (
        (WIDTHS, first.width, width),
        (KEY_HEADS, first.groups, groups),
        (HEADS, first.groups * repeat, groups * repeat),
        (TOTALS, first.groups * repeat * first.width, groups * repeat * width),
        (KEY_TOTALS, first.groups * first.width, groups * width),
    ):
        now |= {name: value for name in names if getattr(attention, name, None) == dense}
    if any(pair.rescale for pair in members):
        now |= {name: width**-0.5 for name in SCALES if getattr(attention, name, None) == first.width**-0.5}
    return now


def _shape(module: Map, axis: Axis) -> Record:
    new = axis.places()[1]
    sizes = list(features(module))
    sizes[axis.side == "out"] = len(new)
    pad: Record | None = None
    if len(new) and (len(new) != axis.size or (np.diff(new) != 1).any()):
        pad = {"side": axis.side, **(_blocks(new, axis.size) or {"positions": new.tolist(), "size": axis.size})}
    elif len(new) != axis.size:
        pad = {"side": axis.side, "positions": [], "size": axis.size}
    return {"in_features": sizes[0], "out_features": sizes[1], "bias": module.bias is not None, "pad": pad}


def _blocks(new: Ints, size: int) -> Record | None:
    """The places as equal blocks at equal distances, where they are that."""
    starts = new[np.r_[True, np.diff(new) != 1]]
    width = len(new) // len(starts)
    padded = size // len(starts)
    regular = np.arange(len(starts))[:, None] * padded + np.arange(width)
    if padded * len(starts) != size or not np.array_equal(regular.ravel(), new):
        return None
    return {"blocks": len(starts), "width": width, "padded": padded}


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
    """Fold what stays, and what it tells of the rest, into a consumer (equations in ``pathprune.compensation``)."""

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
