"""The rectangle rule: from one number per unit to one nested family of shippable shapes.

Tensors are rectangular, so the heads of a layer must be equally wide. The rule walks each
sublayer from full to empty in *removals*, each of which leaves a rectangle behind:

* one whole head (its query-key and its value-output units together),
* the least valuable query-key dimensions of every head that is left, or
* the least valuable value-output dimensions of every head that is left,

always the one whose units are worth least on average, weighted by their parameters; an MLP loses neurons from the least
valuable up. Widths move in steps of ``multiple``. The walks of all sublayers are then merged
into one order by value. A walk may meet a cheap removal behind an expensive one; pooling
adjacent violators gives both their common mean, so that the merged order keeps every walk's
own order. The prefix of the order is the family: nested, and rectangular at every size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from pathprune.errors import SettingError
from pathprune.family.pairs import Pair
from pathprune.types import Floats, Ints

Unit = Literal["mixed", "dim", "shared", "head"]
UNITS: tuple[Unit, ...] = ("mixed", "dim", "shared", "head")


@dataclass(frozen=True)
class Order:
    """The family as a sequence of E removals, the least valuable first.

    Args:
        step: pair name -> (G, U), the removal in which each unit leaves.
        units: (E, pairs), how many units of each pair leave in each removal.
        value: (E,), mean value of the units that leave; never decreases.
    """

    step: dict[str, Ints]
    units: Ints
    value: Floats

    def keep(self, removals: int) -> dict[str, npt.NDArray[np.bool_]]:
        """Masks (G, U) after the first ``removals`` removals."""
        return {name: step >= removals for name, step in self.step.items()}


@dataclass(frozen=True)
class UnitOrder:
    """Where the units of a pair come from, when they are sorted (``transform.sorting``).

    Args:
        heads: (G,), the old group of each new one.
        units: (G, U), the old unit of each new one; by old group.
    """

    heads: Ints
    units: Ints

    def apply(self, array: Floats) -> Floats:
        """Sort a (G, U) array."""
        return np.take_along_axis(array, self.units, axis=1)[self.heads]

    def places(self, inner: int) -> Ints:
        """(N,), the old place of each new one in the N = G R D that the consumer reads."""
        places = np.arange(inner).reshape(len(self.heads), -1, self.units.shape[1])
        found: Ints = np.take_along_axis(places, self.units[:, None], axis=2)[self.heads].ravel()
        return found

    def apply_rows(self, array: Floats) -> Floats:
        """Sort an (N, ...) array."""
        return array[self.places(len(array))]

    def apply_square(self, array: Floats) -> Floats:
        """Sort both axes of an (N, N) array."""
        places = self.places(len(array))
        return array[np.ix_(places, places)]


def check_widths(unit: str, multiple: int) -> None:
    """Refuse what is no rule for widths.

    Raises:
        SettingError: ``unit`` is not one of ``UNITS``, or ``multiple`` no number of units.
    """
    if unit not in UNITS:
        raise SettingError(f"unit={unit!r} is not one of {', '.join(UNITS)}")
    if isinstance(multiple, bool) or not isinstance(multiple, int) or not 1 <= multiple < 2**31:
        raise SettingError(f"multiple={multiple!r} must be at least 1, and an integer below 2**31")


def removal_order(
    pairs: Sequence[Pair], ranking: Mapping[str, Floats], *, unit: Unit = "mixed", multiple: int = 1
) -> Order:
    """Merge the walks of all sublayers into one order.

    Args:
        pairs: the pairs of the model.
        ranking: pair name -> (G, U); a larger number is worth keeping longer.
        unit: what an attention layer may lose: ``"dim"`` dimensions, each head its own;
            ``"shared"`` the same dimensions in every head (the unit of the published SPP code);
            ``"head"`` whole heads; ``"mixed"`` dimensions or heads, whichever is worth less.
        multiple: widths of heads and MLPs are kept at multiples of this many units.

    Raises:
        SettingError: ``unit`` or ``multiple`` is out of range.
    """
    check_widths(unit, multiple)
    blocks: dict[str, list[Pair]] = {}
    for pair in pairs:
        blocks.setdefault(pair.block, []).append(pair)
    index = {pair.name: i for i, pair in enumerate(pairs)}
    unit_params = np.array([pair.unit_params for pair in pairs], dtype=np.int64)

    leaves: dict[str, Ints] = {pair.name: np.zeros(pair.shape, dtype=np.int64) for pair in pairs}
    values: list[Floats] = []
    counts: list[Ints] = []
    offset = 0
    for members in blocks.values():
        walk = _Walk(members, ranking, unit, multiple)
        walk.run()
        for pair in members:
            leaves[pair.name] = walk.leaves[pair.name] + offset
        events = np.zeros((len(walk.value), len(pairs)), dtype=np.int64)
        for pair in members:
            np.add.at(events[:, index[pair.name]], walk.leaves[pair.name].ravel(), 1)
        values.append(_pool(np.array(walk.value), events @ unit_params))
        counts.append(events)
        offset += len(walk.value)

    value, units = np.concatenate(values), np.concatenate(counts)
    merged = np.argsort(value, kind="stable")
    place = np.empty(len(merged), dtype=np.int64)
    place[merged] = np.arange(len(merged))
    return Order({name: place[leave] for name, leave in leaves.items()}, units[merged], value[merged])


class _Walk:
    """One sublayer, from full to empty."""

    def __init__(self, members: list[Pair], ranking: Mapping[str, Floats], unit: Unit, multiple: int) -> None:
        self.members = members
        self.score = {pair.name: np.asarray(ranking[pair.name], dtype=np.float64) for pair in members}
        # Grouped kernels want rows of experts' weights that are multiples of 16 bytes.
        self.multiple = math.lcm(multiple, 8) if members[0].stacked else multiple
        self.unit: Unit = "dim" if members[0].stacked else unit  # experts choose their own neurons, none leaves alone
        self.leaves = {pair.name: np.full(pair.shape, -1, dtype=np.int64) for pair in members}
        self.value: list[float] = []

    def run(self) -> None:
        if self.members[0].kind == "mlp" and self.members[0].groups == 1:
            self._neurons(self.members[0])
        else:
            self._heads()

    def _first(self, width: int) -> int:
        """Units of the first removal, so that all later widths are multiples."""
        return width % self.multiple or self.multiple

    def _neurons(self, pair: Pair) -> None:
        score = self.score[pair.name][0]  # (U,)
        ascending = _ascending(score)
        starts = np.r_[0, np.arange(self._first(pair.units), pair.units, self.multiple)]
        sizes = np.diff(np.r_[starts, pair.units])
        self.leaves[pair.name][0, ascending] = np.repeat(np.arange(len(starts)), sizes)
        self.value = (np.add.reduceat(score[ascending], starts) / sizes).tolist()

    def _heads(self) -> None:
        groups = self.members[0].groups
        alive = np.ones(groups, dtype=bool)
        gone = {pair.name: 0 for pair in self.members}  # units that every surviving head has lost
        ranks: dict[str, Ints] = {}
        held: dict[str, Floats] = {}  # (G, U + 1), worth of what a head would still hold, by units lost
        for pair in self.members:
            score = self.score[pair.name]
            shared = pair.rotary or self.unit == "shared"
            rank = _ascending(np.broadcast_to(score.mean(0), score.shape) if shared else score)
            ranks[pair.name] = rank
            worth = np.take_along_axis(score, rank, axis=1) * pair.unit_params
            held[pair.name] = np.concatenate([worth[:, ::-1].cumsum(1)[:, ::-1], np.zeros((groups, 1))], axis=1)

        while alive.any():
            best: tuple[float, Pair | None, int] | None = None
            for pair in self.members:
                lost = gone[pair.name]
                take = self._first(pair.units - lost)
                if self.unit == "head" or take == pair.units - lost:
                    continue
                drop = (held[pair.name][alive, lost] - held[pair.name][alive, lost + take]).mean()
                value = float(drop / (take * pair.unit_params))
                if best is None or value < best[0]:
                    best = (value, pair, take)
            if best is None or self.unit in ("mixed", "head"):
                worth = np.sum([held[pair.name][:, gone[pair.name]] for pair in self.members], axis=0)
                worth /= sum((pair.units - gone[pair.name]) * pair.unit_params for pair in self.members)
                if self.unit in ("dim", "shared"):  # no head ever leaves alone: the layer's attention goes whole
                    heads, value = np.flatnonzero(alive), float(worth[alive].mean())
                else:
                    weakest = int(_ascending(np.where(alive, worth, np.inf))[0])
                    heads, value = np.array([weakest]), float(worth[weakest])
                if best is None or value < best[0]:
                    best = (value, None, 0)
            event = len(self.value)
            self.value.append(best[0])
            if best[1] is None:
                for pair in self.members:
                    rest = ranks[pair.name][heads, gone[pair.name] :]
                    self._leave(pair, heads, rest, event)
                alive[heads] = False
            else:
                pair, heads = best[1], np.flatnonzero(alive)
                lost = gone[pair.name]
                self._leave(pair, heads, ranks[pair.name][heads, lost : lost + best[2]], event)
                gone[pair.name] = lost + best[2]

    def _leave(self, pair: Pair, heads: Ints, units: Ints, event: int) -> None:
        self.leaves[pair.name][heads[:, None], units] = event


def _ascending(score: Floats) -> Ints:
    """Indices that sort the last axis; of equals the last comes first, so that what stays of them is a prefix."""
    found: Ints = score.shape[-1] - 1 - np.argsort(score[..., ::-1], axis=-1, kind="stable")
    return found


def _pool(value: Floats, weight: Ints) -> Floats:
    """Nearest non-decreasing sequence in weighted least squares (pool adjacent violators)."""
    if (np.diff(value) >= 0).all():
        return value
    pools: list[tuple[float, float, int]] = []  # mean, weight, length
    for mean, total in zip(value.tolist(), weight.tolist(), strict=True):
        pool = (mean, float(total), 1)
        while pools and pools[-1][0] > pool[0]:
            before = pools.pop()
            total = before[1] + pool[1]
            pool = ((before[0] * before[1] + pool[0] * pool[1]) / total, total, before[2] + pool[2])
        pools.append(pool)
    return np.repeat([pool[0] for pool in pools], [pool[2] for pool in pools])
