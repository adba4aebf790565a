"""What a selection keeps of every map's axis, and the shapes of the sliced model."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from torch import nn
from transformers.pytorch_utils import Conv1D

from pathprune.errors import MismatchError
from pathprune.family.pairs import Pair
from pathprune.family.selection import Selection
from pathprune.model.attention import HEADS, KEY_HEADS, KEY_TOTALS, SCALES, TOTALS, WIDTHS, attention_of
from pathprune.model.linear import Map, features, linear_map
from pathprune.transform.experts import plan_stack
from pathprune.transform.record import Record
from pathprune.types import Ints


@dataclass
class Axis:
    """The sliced axis of one linear map: which indices of the dense axis are kept, and where the code around the map
    has them, among zeros.
    """

    side: str
    dense: int
    size: int  # as the code around the map has it
    width: int  # of a head, likewise
    kept: list[Ints] = field(default_factory=list)
    positions: list[Ints] = field(default_factory=list)
    unpaired: npt.NDArray[np.bool_] = field(init=False)

    def __post_init__(self) -> None:
        self.unpaired = np.ones(self.dense, dtype=bool)  # indices of no pair

    def indices(self) -> tuple[Ints, Ints]:
        """(kept indices of the dense axis, their positions), in the order of the latter."""
        rest = np.flatnonzero(self.unpaired)
        kept, positions = np.concatenate([*self.kept, rest]), np.concatenate([*self.positions, rest])
        order = np.argsort(positions)
        return kept[order], positions[order]


def inner_dim(module: Map, side: str) -> int:
    """The dimension of a map's weight that is its axis on that side."""
    return int((side == "in") != isinstance(module, Conv1D))


def plan(model: nn.Module, selection: Selection) -> tuple[dict[str, Axis], Record]:
    """What ``selection`` keeps of every map's axis, and the shapes of the sliced model."""
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
            _add(model, pair, selection.keep[pair.name], axes, 1, kept if pair.narrow else pair.width)
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
        _add(model, pair, selection.keep[pair.name], axes, groups, width if pair.narrow else pair.width)
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


def _add(
    model: nn.Module, pair: Pair, keep: npt.NDArray[np.bool_], axes: dict[str, Axis], groups: int, width: int
) -> None:
    """Add one pair's kept dimensions to its maps' axes, which the code around them has as ``groups`` x ``width``."""
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
        index = slot.index(pair.groups, pair.width)
        axis.unpaired[index] = False
        axis.kept.append(pair.positions(slot, keep))
        kept = np.broadcast_to(dims[:, None], index.shape)
        positions = slot.index(max(groups, 1), max(width, 1))
        heads = (g[..., None], np.arange(slot.repeat)[:, None], d[:, None])
        axis.positions.append(positions[tuple(np.broadcast_to(x, index.shape)[kept] for x in heads)])


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
    positions = axis.indices()[1]
    sizes = list(features(module))
    sizes[axis.side == "out"] = len(positions)
    pad: Record | None = None
    if len(positions) and (len(positions) != axis.size or (np.diff(positions) != 1).any()):
        pad = {
            "side": axis.side,
            **(_blocks(positions, axis.size) or {"positions": positions.tolist(), "size": axis.size}),
        }
    elif len(positions) != axis.size:
        pad = {"side": axis.side, "positions": [], "size": axis.size}
    return {"in_features": sizes[0], "out_features": sizes[1], "bias": module.bias is not None, "pad": pad}


def _blocks(positions: Ints, size: int) -> Record | None:
    """The positions as equal blocks at equal distances, where they are that."""
    starts = positions[np.r_[True, np.diff(positions) != 1]]
    width = len(positions) // len(starts)
    padded = size // len(starts)
    regular = np.arange(len(starts))[:, None] * padded + np.arange(width)
    if padded * len(starts) != size or not np.array_equal(regular.ravel(), positions):
        return None
    return {"blocks": len(starts), "width": width, "padded": padded}
