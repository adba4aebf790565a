"""The arrays of a path: one row for each, which validation, saving, loading, sorting and selecting read.

All of them follow the size by one law, ``at_sparsity``.

To add an array, write

1. its row in ``LEARNED``, and a field of its name in ``SolutionPath``: from then on it is validated, saved, loaded and
   sorted;
2. where a size needs it, ``selection`` in the row, and a field of that name in ``Selection``: ``select`` gives it;
3. the pass that measures or trains it, and the hook or the fold that applies it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from pathprune.errors import MismatchError
from pathprune.family.checks import check_array, check_invertible
from pathprune.family.order import UnitOrder
from pathprune.family.pairs import Pair
from pathprune.types import Floats

Arrays = Mapping[str, Mapping[str, Floats]]  # name of the array -> pair name (of a delta: parameter name) -> array

T = TypeVar("T")


def at_sparsity(dense: Any, learned: T, sparsity: float) -> T:
    """What is learned, at the size that keeps a fraction r = 1 - ``sparsity`` of the prunable parameters:
    dense + (1 - r) learned.

    The dense model stays what it was, large sizes stay near it, and small ones may go far.

    Args:
        dense: at the dense model; a number, an array or a tensor.
        learned: array or tensor.
    """
    found: T = dense + sparsity * learned  # type: ignore[operator]
    return found


@dataclass(frozen=True)
class Learned:
    """One array of each pair. Its name is its key in ``LEARNED``, on disk, and its field in ``SolutionPath``.

    Args:
        shape: by pair; ``None`` where the array is of a parameter, and has that one's shape.
        dtype: on disk and in memory. Those of eight bytes are of sorted paths, and let a size do without the weights
            of the units that it lacks, to the last place.
        takes: whether a pair may have it.
        needs: other arrays that a pair with this one must have.
        refusal: what is said of a pair (``{}``) that may not have it.
        check: what is refused beside other shapes and values that are not finite; (name for errors, array) -> None.
        permute: sorts it with its pair's units; ``None`` where they have no place in it.
        until_sorted: sorting folds it into the weights, so that a sorted path has none.
        selection: the field of ``Selection`` that it goes to, if one does.
        dense: what it is there for the dense model, where it follows the size (``at_sparsity``).
        thinned: whether a selection has it of those pairs only that lose units.
        large: of a sorted path it is read by parts, each with checksums of its own (``family.checks.line_checks``);
            what is small is read whole, and has its checksum in path.json.
        symmetric: of two dimensions, of which half has checksums.
    """

    shape: Callable[[Pair], tuple[int, ...]] | None
    dtype: str = "f4"
    takes: Callable[[Pair], bool] = lambda pair: True
    needs: tuple[str, ...] = ()
    refusal: str = "an array for {}, which takes none or is no pair of the model"
    check: Callable[[str, Floats], None] | None = None
    permute: Callable[[UnitOrder, Floats], Floats] | None = None
    until_sorted: bool = False
    selection: str = ""
    dense: Any = None
    thinned: bool = False
    large: bool = False
    symmetric: bool = False


def _by_unit(pair: Pair) -> tuple[int, ...]:
    return pair.shape


def _by_dim(pair: Pair) -> tuple[int, ...]:
    return (pair.groups, pair.width)


def _inner(pair: Pair) -> int:
    """N = G R D, of what the consumer reads of the pair."""
    return pair.groups * pair.consumer.repeat * pair.width


def _of_output(pair: Pair) -> tuple[int, ...]:
    return (pair.consumer.size,)


def _by_place_and_output(pair: Pair) -> tuple[int, ...]:
    return (_inner(pair), pair.consumer.size)


_TAKES_NONE = "a fill, basis or slope for {}, which takes none or is no pair of the model"
_NOT_BOTH = "centre and covariance must name the same pairs, all of them with a fill"
_NO_SUMS = "delta_sum and delta_normal go with fill_sum and normal"

LEARNED: dict[str, Learned] = {
    "ranking": Learned(_by_unit, permute=UnitOrder.apply),
    "fill": Learned(
        _by_dim, takes=attrgetter("fillable"), refusal=_TAKES_NONE, permute=UnitOrder.apply, selection="fill"
    ),
    "basis": Learned(
        lambda pair: (pair.groups, pair.width, pair.width),
        takes=attrgetter("rotatable"),
        refusal=_TAKES_NONE,
        check=check_invertible,
        until_sorted=True,
        selection="basis",
    ),
    "slope": Learned(
        _by_unit,
        takes=attrgetter("scalable"),
        refusal=_TAKES_NONE,
        permute=UnitOrder.apply,
        selection="scale",
        dense=1.0,
    ),
    "output": Learned(
        lambda pair: (2, pair.consumer.size),
        takes=attrgetter("adjustable"),
        needs=("fill",),
        refusal="an output for {}, which has no fill or shares its consumer, or is no pair",
        selection="output",
        dense=((1.0,), (0.0,)),
        thinned=True,
    ),
    "centre": Learned(
        lambda pair: (_inner(pair),),
        needs=("fill", "covariance"),
        refusal=_NOT_BOTH,
        permute=UnitOrder.apply_rows,
        selection="centre",
    ),
    "covariance": Learned(
        lambda pair: (_inner(pair), _inner(pair)),
        needs=("fill", "centre"),
        refusal=_NOT_BOTH,
        permute=UnitOrder.apply_square,
        selection="covariance",
        large=True,
        symmetric=True,
    ),
    # Whether there is such a parameter is seen when the model is there (``transform.delta``). Paths with deltas are
    # sorted, and stay as they are.
    "delta": Learned(None, dtype="f2", selection="delta", large=True),
    "fill_sum": Learned(_of_output, dtype="f8", takes=attrgetter("fillable"), refusal=_TAKES_NONE),
    "normal": Learned(
        _by_place_and_output,
        dtype="f8",
        needs=("covariance",),
        refusal="a sorted path's covariances may not be left out: leave them out, and sort it again",
        permute=UnitOrder.apply_rows,
        large=True,
    ),
    "delta_sum": Learned(_of_output, dtype="f8", needs=("fill_sum",), refusal=_NO_SUMS),
    "delta_normal": Learned(
        _by_place_and_output,
        dtype="f8",
        needs=("normal",),
        refusal=_NO_SUMS,
        permute=UnitOrder.apply_rows,
        large=True,
    ),
}

LARGE = tuple(name for name, row in LEARNED.items() if row.large)


def check_learned(pairs: Iterable[Pair], arrays: Arrays) -> None:
    """Refuse arrays for pairs that take none, of other shapes, or not finite.

    Raises:
        MismatchError: there is such an array.
    """
    by_name = {pair.name: pair for pair in pairs}
    for part, row in LEARNED.items():
        allowed = {name for name, pair in by_name.items() if row.takes(pair)}.intersection(
            *(arrays[other] for other in row.needs)
        )
        if row.shape and (wrong := sorted(set(arrays[part]) - allowed)):
            raise MismatchError(row.refusal.format(wrong[0]))
    for part, row in LEARNED.items():
        for name, array in arrays[part].items():
            check_array(f"{part} of {name}", array, row.shape(by_name[name]) if row.shape else array.shape)
            if row.check:
                row.check(f"{part} of {name}", array)


def selected(arrays: Arrays, keep: Mapping[str, npt.NDArray[np.bool_]], sparsity: float) -> dict[str, Any]:
    """The arrays of a ``Selection`` by its fields, for the size with these masks."""

    def at(row: Learned, array: Floats) -> Floats:
        return array if row.dense is None else at_sparsity(np.asarray(row.dense, array.dtype), array, sparsity)

    return {
        row.selection: {
            name: at(row, array) for name, array in arrays[part].items() if not (row.thinned and keep[name].all())
        }
        for part, row in LEARNED.items()
        if row.selection
    }


def permuted(arrays: Arrays, orders: Mapping[str, UnitOrder]) -> dict[str, Any]:
    """The arrays of a path whose units are sorted, by pair, as ``orders`` has them."""
    return {
        part: {
            name: row.permute(orders[name], array) if row.permute else array
            for name, array in arrays[part].items()
            if not row.until_sorted
        }
        for part, row in LEARNED.items()
    }
