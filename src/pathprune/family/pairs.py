"""Pairs of linear maps that share an inner axis, and the index layout of their units.

A *unit* is one removable slice of the shared axis: taking it out makes every map of the
pair smaller and leaves all outer shapes as they were (ALGORITHM: SPP section 3.1).

Notation, used throughout the package:

    G   groups: key/value heads of an attention layer; 1 for an MLP
    R   repeat: query heads that share one group (grouped-query attention); 1 otherwise
    D   width: inner dimensions of one head, or hidden neurons of an MLP
    U   units of one group: D, or D/2 where rotary embedding ties dimensions in couples
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from pathprune.errors import SettingError
from pathprune.types import Ints

Kind = Literal["qk", "vo", "mlp"]


Side = Literal["out", "in"]


Layout = Literal["blocks", "heads", "turns", "dims", "rows"]


Rotary = Literal["", "halves", "neighbours"]


LIMIT = 2**31  # of every size: products of two fit into 64 bits


def whole(*values: Any) -> bool:
    """Whether all are integers from 1 to below ``LIMIT``."""
    return all(isinstance(n, int) and not isinstance(n, bool) and 0 < n < LIMIT for n in values)


def check_fields(what: str, types: Mapping[type, tuple[Any, ...]]) -> None:
    """Refuse values that are not of their type: they may come from a file."""
    for kind, values in types.items():
        for value in values:
            if not isinstance(value, kind):
                raise SettingError(f"{what}: {value!r} is not a {kind.__name__}")


@dataclass(frozen=True)
class Slot:
    """One linear map of a pair, or the part of a fused one that is.

    Where maps are fused (query, key and value in one weight, or gate and up), the axis holds
    ``total`` heads a group, of which this map's are ``repeat``, after ``start`` others:

    ======== ================================================= =======================================
    layout   the axis, outermost first                         head r of group g has dimension d at
    ======== ================================================= =======================================
    blocks   one block a map, each (group, head, dimension)     (start G + g repeat + r) D + d
    heads    (group, head of any map, dimension)                (g total + start + r) D + d
    turns    (group, head, map, dimension)                      ((g repeat + r) total / repeat + start) D + d
    dims     (group, head, dimension, map)                      ((g repeat + r) D + d) total + start
    rows     heads of unequal parts; in dimensions, not heads   g total + start + d
    ======== ================================================= =======================================

    Args:
        module: dotted name of the map inside the model.
        side: whether the inner axis is the map's output (``"out"``) or its input (``"in"``).
        size: length of the map's other axis, in features.
        repeat: R, heads of this map that share the units of one group.
        bias: whether the map has a bias vector.
        start, total, layout: where the map lies on a fused axis.
        parameter: name of the stacked weight (experts, out, in) that holds one such map an expert,
            the expert being the group; empty where ``module`` itself is the map.
        transposed: whether that weight is (experts, in, out).

    Example:
        >>> slot = pp.Slot("attention.query", "out", size=32, repeat=1, bias=True)
        >>> slot.index(groups=4, width=8).shape  # G, R, D
        (4, 1, 8)
    """

    module: str
    side: Side
    size: int
    repeat: int = 1
    bias: bool = False
    start: int = 0
    total: int = 0
    layout: Layout = "blocks"
    parameter: str = ""
    transposed: bool = False

    def __post_init__(self) -> None:
        names, flags = (self.module, self.side, self.layout, self.parameter), (self.bias, self.transposed)
        check_fields(f"a map {self.module!r}", {str: names, bool: flags})
        if not self.total:
            object.__setattr__(self, "total", self.repeat)
        if self.side not in ("out", "in") or self.layout not in get_args(Layout):
            raise SettingError(f"{self.module}: side={self.side!r}, layout={self.layout!r} make no slot")
        whole_sizes = whole(self.size, self.repeat, self.total) and isinstance(self.start, int)
        if not whole_sizes or not 0 <= self.start <= self.total - self.repeat:
            raise SettingError(
                f"{self.module}: size={self.size!r}, repeat={self.repeat!r}, start={self.start!r}, "
                f"total={self.total!r} make no slot"
            )

    @property
    def dim(self) -> int:
        """The stacked weight's dimension that is the inner axis."""
        return 1 if (self.side == "out") != self.transposed else 2

    @property
    def fused(self) -> bool:
        """Whether the axis holds other maps, too."""
        return self.total > self.repeat

    def index(self, groups: int, width: int) -> Ints:
        """Places (G, R, D) on the axis, for ``groups`` groups of heads ``width`` wide."""
        g, r, d = np.ogrid[:groups, : self.repeat, :width]
        if self.layout == "blocks":
            return (self.start * groups + g * self.repeat + r) * width + d
        if self.layout == "heads":
            return (g * self.total + self.start + r) * width + d
        if self.layout == "turns":
            return ((g * self.repeat + r) * (self.total // self.repeat) + self.start) * width + d
        if self.layout == "dims":
            return ((g * self.repeat + r) * width + d) * self.total + self.start
        return g * self.total + self.start + d + 0 * r

    @property
    def unit_params(self) -> int:
        """Parameters that one inner dimension of one group owns in this map."""
        return self.repeat * (self.size + (self.bias and self.side == "out"))


@dataclass(frozen=True)
class Pair:
    """Linear maps that lose the same units together (a dependency group).

    Args:
        name: unique in the model, ``<block>.<kind>``.
        kind: ``qk``, ``vo`` or ``mlp``.
        block: the sublayer that the pair belongs to; the ``qk`` and ``vo`` pairs of one
            attention layer share it, because a removed head leaves both.
        groups: G.
        width: D.
        slots: the maps. ``qk``: query, key. ``vo``: value, output projection.
            ``mlp``: up, (gate,) down.
        rotary: rotary embedding stands between query and key and turns dimensions i and i + D/2
            (``"halves"``) or 2i and 2i + 1 (``"neighbours"``) into one another: they are one unit,
            and every head of the layer must keep the same ones (they share the cos/sin columns).
        mixing: something else stands between the maps that a missing dimension would change (a
            norm, a gate, a rotary embedding of part of the head): units are masked at every map.
        narrow: the layer's code follows a smaller width; otherwise kept dimensions stay where
            they are, with zeros in place of the others between the maps.
        fewer: the attention's code follows a smaller number of heads; otherwise likewise.
        rescale: the attention's code takes its scale from the width that it sees, and queries
            make up for it.
        calls: positions that one group sees for each token: 1, or more where layers share the
            maps, or less where each expert sees a part of the tokens.
        once: ``calls`` is for each sequence (a pooler, the image beside a text).

    Example:
        >>> up, down = pp.Slot("up", "out", 32), pp.Slot("down", "in", 32)
        >>> pair = pp.Pair("block.mlp", "mlp", "block", groups=1, width=48, slots=(up, down))
        >>> pair.shape, pair.unit_params
        ((1, 48), 64)
    """

    name: str
    kind: Kind
    block: str
    groups: int
    width: int
    slots: tuple[Slot, ...]
    rotary: Rotary = ""
    mixing: bool = False
    narrow: bool = True
    fewer: bool = True
    rescale: bool = False
    calls: float = 1
    once: bool = False

    def __post_init__(self) -> None:
        flags = (self.mixing, self.narrow, self.fewer, self.rescale, self.once)
        check_fields(f"a pair {self.name!r}", {str: (self.name, self.kind, self.block, self.rotary), bool: flags})
        if self.rotary not in ("", "halves", "neighbours"):
            raise SettingError(f"{self.name}: rotary={self.rotary!r} is not '', 'halves' or 'neighbours'")
        if self.kind not in ("qk", "vo", "mlp") or len(self.slots) < 2:
            raise SettingError(f"{self.name}: kind={self.kind!r} with {len(self.slots)} maps makes no pair")
        if not whole(self.groups, self.width) or self.width % self.dims_per_unit:
            raise SettingError(
                f"{self.name}: groups={self.groups!r} and width={self.width!r} must be at least 1, and below 2^31; "
                "a width with rotary embedding is even"
            )
        sides = [slot.side for slot in self.slots]
        if sides != ["out"] * (len(sides) - 1) + ["out" if self.kind == "qk" else "in"]:
            raise SettingError(f"{self.name}: maps with the sides {', '.join(sides)} make no pair of kind {self.kind}")
        if (self.rotary and self.kind != "qk") or (self.rescale and (self.kind == "mlp" or not self.narrow)):
            raise SettingError(
                f"{self.name}: rotary={self.rotary!r}, rescale={self.rescale} and narrow={self.narrow} do not go with "
                f"kind={self.kind!r}"
            )
        if len({bool(slot.parameter) for slot in self.slots}) > 1 or (self.stacked and self.kind != "mlp"):
            raise SettingError(f"{self.name}: only experts' maps are stacked, and all of a pair's together")
        if isinstance(self.calls, bool) or not isinstance(self.calls, int | float) or not 0 < self.calls < LIMIT:
            raise SettingError(f"{self.name}: calls={self.calls!r} must be positive, and below 2^31")

    @property
    def dims_per_unit(self) -> int:
        return 2 if self.rotary else 1

    @property
    def units(self) -> int:
        """U, units of one group."""
        return self.width // self.dims_per_unit

    @property
    def shape(self) -> tuple[int, int]:
        """(G, U): the shape of every per-unit tensor of this pair."""
        return (self.groups, self.units)

    @property
    def unit_params(self) -> int:
        """Parameters that leave the model with one unit."""
        return self.dims_per_unit * sum(slot.unit_params for slot in self.slots)

    @property
    def params(self) -> int:
        """Prunable parameters of the pair."""
        return self.groups * self.units * self.unit_params

    def unit_macs(self, seq_len: int) -> float:
        """Multiply-accumulates per token that leave with one unit.

        Linear maps, plus for attention the unit's share of QK^T or of PV over ``seq_len`` keys.
        """
        linear = self.dims_per_unit * sum(slot.repeat * slot.size for slot in self.slots)
        return linear * self._calls(seq_len) + self.unit_attention_macs(seq_len)

    def unit_attention_macs(self, seq_len: int) -> float:
        """The part of ``unit_macs`` that is not in the linear maps."""
        if self.kind == "mlp":
            return 0
        heads = self.dims_per_unit * max(slot.repeat for slot in self.slots)
        return heads * (self.calls if self.once else seq_len) * self._calls(seq_len)

    def _calls(self, seq_len: int) -> float:
        """Positions that a group of the pair sees, per token."""
        return self.calls / seq_len if self.once else self.calls

    @property
    def fillable(self) -> bool:
        """Whether a constant in a removed dimension's place can be folded into the consumer's bias, which a
        consumer without one is given.

        For ``vo`` this holds because attention weights sum to one; the proof of the pair would show it if not.
        """
        return self.kind != "qk" and not self.mixing and not self.stacked

    @property
    def fill_params(self) -> int:
        """Parameters that a fill adds to the sliced model: the bias of a consumer that had none."""
        return 0 if self.consumer.bias else self.consumer.size

    @property
    def rotatable(self) -> bool:
        """Whether nothing but the product stands between the two maps, so that a head may be rotated."""
        return self.kind != "mlp" and not self.rotary and not self.mixing

    @property
    def scalable(self) -> bool:
        """Whether a unit's activation may be multiplied by a number, which is folded into the consumer's weights."""
        return not self.mixing

    @property
    def adjustable(self) -> bool:
        """Whether what the consumer puts out may be scaled and shifted: it has a bias, and reads nothing else."""
        return self.fillable and not self.consumer.fused

    @property
    def stacked(self) -> bool:
        """Whether the maps are those of many experts in one parameter each."""
        return bool(self.slots[0].parameter)

    @property
    def mask_slot(self) -> Slot:
        """The one map at which masking is enough to switch units off (where nothing mixes them):
        key, value, or the MLP's down.
        """
        return self.slots[1] if self.kind == "qk" else self.slots[0] if self.kind == "vo" else self.slots[-1]

    @property
    def mask_slots(self) -> tuple[Slot, ...]:
        """The maps at which units are masked."""
        return self.slots if self.mixing else (self.mask_slot,)

    @property
    def consumer(self) -> Slot:
        """The map that reads the inner axis: output projection or down; for ``qk``, the key."""
        return self.slots[-1]

    def by_dim(self, by_unit: Any) -> Any:
        """From (..., G, U) to (..., G, D), array or tensor."""
        if not self.rotary:
            return by_unit
        return by_unit[..., self.unit_of]

    @property
    def unit_of(self) -> list[int]:
        """(D,), the unit of each dimension."""
        if self.rotary == "neighbours":
            return [d // 2 for d in range(self.width)]
        return [d % self.units for d in range(self.width)]

    def positions(self, slot: Slot, keep: npt.NDArray[np.bool_]) -> Ints:
        """Places on ``slot``'s inner axis that survive ``keep`` (G, U): by group, head and dimension."""
        kept = np.broadcast_to(self.by_dim(keep)[:, None], (self.groups, slot.repeat, self.width))
        return slot.index(self.groups, self.width)[kept]
