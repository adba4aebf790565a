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

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

Kind = Literal["qk", "vo", "mlp"]
Side = Literal["out", "in"]


@dataclass(frozen=True)
class Slot:
    """One linear map of a pair.

    Args:
        module: dotted name of the map inside the model.
        side: whether the inner axis is the map's output (``"out"``) or its input (``"in"``).
        repeat: R, consecutive heads on the axis that share the units of one group.
        size: length of the map's other axis, in features.
        bias: whether the map has a bias vector.
    """

    module: str
    side: Side
    size: int
    repeat: int = 1
    bias: bool = False

    def __post_init__(self) -> None:
        if self.side not in ("out", "in") or not all(isinstance(n, int) and n > 0 for n in (self.size, self.repeat)):
            raise ValueError(
                f"{self.module}: side={self.side!r}, size={self.size!r}, repeat={self.repeat!r} make no slot"
            )

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
        rotary: rotary embedding stands between query and key, so that dimension i and
            i + D/2 are one unit, and every head of the layer must keep the same ones
            (they share the cos/sin columns).
    """

    name: str
    kind: Kind
    block: str
    groups: int
    width: int
    slots: tuple[Slot, ...]
    rotary: bool = False

    def __post_init__(self) -> None:
        if self.kind not in ("qk", "vo", "mlp") or len(self.slots) < 2:
            raise ValueError(f"{self.name}: kind={self.kind!r} with {len(self.slots)} maps makes no pair")
        if not all(isinstance(n, int) and n > 0 for n in (self.groups, self.width)):
            raise ValueError(f"{self.name}: groups={self.groups!r} and width={self.width!r} must be at least 1")

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

    def unit_macs(self, seq_len: int) -> int:
        """Multiply-accumulates per token that leave with one unit.

        Linear maps, plus for attention the unit's share of QK^T or of PV over ``seq_len`` keys.
        """
        linear = sum(slot.repeat * slot.size for slot in self.slots)
        heads = max(slot.repeat for slot in self.slots)
        return self.dims_per_unit * (linear + (0 if self.kind == "mlp" else heads * seq_len))

    @property
    def fillable(self) -> bool:
        """Whether a constant in a removed dimension's place can be folded into the consumer's bias.

        For ``vo`` this holds because attention weights sum to one; the proof of the pair would show it if not.
        """
        return self.kind != "qk" and self.consumer.bias

    @property
    def rotatable(self) -> bool:
        """Whether nothing but the product stands between the two maps, so that a head may be rotated."""
        return self.kind != "mlp" and not self.rotary

    @property
    def mask_slot(self) -> Slot:
        """The one map at which masking is enough to switch units off: key, value, or the MLP's down."""
        return self.slots[1] if self.kind == "qk" else self.slots[0] if self.kind == "vo" else self.slots[-1]

    @property
    def consumer(self) -> Slot:
        """The map that reads the inner axis: output projection or down; for ``qk``, the key."""
        return self.slots[-1]

    def dims(self, keep: npt.NDArray[np.bool_]) -> list[npt.NDArray[np.int64]]:
        """Kept dimensions of every surviving head, ascending; a group that keeps nothing is left out."""
        wide = np.concatenate([keep] * self.dims_per_unit, axis=1)  # (G, D)
        return [np.flatnonzero(row) for row in wide if row.any()]

    def positions(self, slot: Slot, keep: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
        """Indices on ``slot``'s inner axis that survive ``keep`` (G, U), ascending."""
        wide = np.concatenate([keep] * self.dims_per_unit, axis=1)  # (G, D)
        return np.flatnonzero(np.repeat(wide, slot.repeat, axis=0))


@dataclass(frozen=True)
class BaseModel:
    """Identity and size of the model that the pairs were found in.

    Args:
        architecture: class name.
        config_hash: SHA-256 of the configuration without what loading or saving adds.
        fingerprint: SHA-256 of parameter names, shapes and a sample of the values.
        params: parameters of the whole model.
        macs_per_token: multiply-accumulates of the linear maps that run at every token, per token of input.
        macs_per_sequence: of those that run once a sequence (poolers, classification heads).
    """

    architecture: str
    config_hash: str
    fingerprint: str
    params: int
    macs_per_token: int
    macs_per_sequence: int = 0


class PairList(list[Pair]):
    """The pairs of one model: a list, with the model's identity and what was refused.

    Args:
        pairs: in forward order.
        base: the model they were found in.
        refused: sublayer name -> why it offers no pair.
    """

    def __init__(self, pairs: Iterable[Pair], base: BaseModel, refused: dict[str, str] | None = None) -> None:
        super().__init__(pairs)
        self.base = base
        self.refused = dict(refused or {})

    @property
    def prunable_params(self) -> int:
        """Parameters that belong to some pair."""
        return sum(pair.params for pair in self)
