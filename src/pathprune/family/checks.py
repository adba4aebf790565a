"""Arrays of a path: their shapes, values and checksums."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pathprune.errors import MismatchError
from pathprune.types import Floats

CHECKS = tuple(f"check{dim}" for dim in range(5))  # the weight of a Conv3d has five dimensions


def checks(key: str, array: Floats, symmetric: bool) -> dict[str, npt.NDArray[Any]]:
    """Checksums of the rows of an array, and of its columns.

    Returns:
        ``check<d>/<key>`` -> CRC-32 of each place along dimension d, one of the last two; by expert where an array of
        three dimensions stacks one for each. Of a symmetric one: of each row up to the diagonal, which is all of it.
    """
    if symmetric:
        if not np.array_equal(array, array.T):
            return {}
        rows = [zlib.crc32(row[: at + 1]) for at, row in enumerate(np.ascontiguousarray(array))]
        return {f"check0/{key}": np.array(rows, dtype=np.uint32)}
    return {f"check{dim}/{key}": line_checks(array, dim) for dim in range(max(0, array.ndim - 2), array.ndim)}


def line_checks(array: npt.NDArray[Any], dim: int) -> npt.NDArray[np.uint32]:
    """(..., places), CRC-32 of what stands at each place along ``dim``."""
    ahead = max(0, array.ndim - 2)  # dimensions that stack
    lines = np.ascontiguousarray(np.moveaxis(array, dim, ahead))
    shape = lines.shape[: ahead + 1]
    flat = lines.reshape(int(np.prod(shape)), int(np.prod(lines.shape[ahead + 1 :])))
    return np.array([zlib.crc32(line.data) for line in flat], dtype=np.uint32).reshape(shape)


def check_invertible(what: str, matrices: Floats) -> None:
    try:
        if np.isfinite(np.linalg.inv(matrices)).all():
            return
    except np.linalg.LinAlgError:
        pass
    raise MismatchError(f"{what} has a matrix that cannot be inverted")


def check_array(what: str, array: Floats, shape: Sequence[int]) -> None:
    """Refuse another shape, and values that are not finite.

    Raises:
        MismatchError: it has one or the other.
    """
    if array.shape != tuple(shape):
        raise MismatchError(f"{what} has shape {array.shape}; the model has {tuple(shape)}")
    if not np.isfinite(array).all():
        raise MismatchError(f"{what} has {int((~np.isfinite(array)).sum())} values that are not finite")
