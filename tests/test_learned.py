"""The table of a path's arrays: each is validated, kept on disk, sorted, and follows the size, by its row alone."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pathprune.errors import ArtifactError, MismatchError
from pathprune.family.artifact import read_artifact
from pathprune.family.budget import Budget
from pathprune.family.learned import LEARNED, Learned, at_sparsity
from pathprune.family.order import UnitOrder
from pathprune.family.pair_list import PairList
from pathprune.family.path import FORMAT, SolutionPath
from pathprune.family.selection import Selection
from pathprune.transform.delta import moved
from pathprune.transform.sorting import sorted_path
from pathprune.types import Floats
from strategies import attention_pairs, mlp_pair, pair_list

# Of the value-output pair below: two groups, three units each, which two heads read; the consumer puts out six.
SHAPES: dict[str, tuple[int, ...]] = {
    "ranking": (2, 3),
    "fill": (2, 3),
    "basis": (2, 3, 3),
    "slope": (2, 3),
    "output": (2, 6),
    "centre": (12,),
    "covariance": (12, 12),
    "delta": (6, 12),
    "fill_sum": (6,),
    "normal": (12, 6),
    "delta_sum": (6,),
    "delta_normal": (12, 6),
}
KEYS = {name: "a.o.weight" if name == "delta" else "a.vo" for name in SHAPES}
LARGE = {"covariance", "delta", "normal", "delta_normal"}

ORDER = UnitOrder(heads=np.array([1, 0]), units=np.array([[2, 0, 1], [0, 2, 1]]))
UNITS = [(1, 0), (1, 2), (1, 1), (0, 2), (0, 0), (0, 1)]  # by new place, the old group and unit
PLACES = [6, 8, 7, 9, 11, 10, 2, 0, 1, 5, 3, 4]  # the same of the two heads of each group, in what the consumer reads


@pytest.fixture
def pairs() -> PairList:
    return pair_list([*attention_pairs("a", 2, 3, 2, ""), mlp_pair("b", 4)], outside=10)


@pytest.fixture
def path(pairs: PairList) -> SolutionPath:
    """With every array of the table for the value-output pair."""
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {name: {KEYS[name]: rng.normal(size=shape)} for name, shape in SHAPES.items()}
    square = arrays["covariance"]["a.vo"]
    arrays["covariance"]["a.vo"] = square @ square.T
    arrays["ranking"] |= {pair.name: rng.normal(size=pair.shape) for pair in pairs if pair.name != "a.vo"}
    arrays["slope"]["b.mlp"] = rng.normal(size=(1, 4))
    return SolutionPath(pairs, **arrays)


def test_the_table_is_what_these_tests_look_at(path: SolutionPath) -> None:
    assert SHAPES.keys() == LEARNED.keys() == path.arrays.keys()


def altered(path: SolutionPath, name: str, key: str, array: Floats) -> SolutionPath:
    change: dict[str, Any] = {name: {**getattr(path, name), key: array}}
    return replace(path, **change)


@pytest.mark.parametrize("name", SHAPES)
def test_every_array_survives_the_disk(path: SolutionPath, name: str, tmp_path: Path) -> None:
    path.save(tmp_path)
    array = getattr(SolutionPath.load(tmp_path), name)[KEYS[name]]
    np.testing.assert_array_equal(array, getattr(path, name)[KEYS[name]])
    precision = {"delta": "f2", "fill_sum": "f8", "normal": "f8", "delta_sum": "f8", "delta_normal": "f8"}
    assert array.dtype == precision.get(name, "f4")
    meta, tensors = read_artifact(tmp_path, "path", FORMAT)
    key = f"{name}/{KEYS[name]}"
    assert (key in meta["checksums"]) == (name not in LARGE)
    checked = [check for check in ("check0", "check1") if f"{check}/{key}" in tensors]
    assert checked == (["check0"] if name == "covariance" else ["check0", "check1"] if name in LARGE else [])
    if name in LARGE:
        row = array[3, :4] if name == "covariance" else array[3]  # up to the diagonal
        assert tensors[f"check0/{key}"][3] == zlib.crc32(row.tobytes())
    else:
        assert meta["checksums"][key] == zlib.crc32(array.tobytes())


@pytest.mark.parametrize("name", [name for name in SHAPES if name != "delta"])
def test_another_shape_is_refused(path: SolutionPath, name: str) -> None:
    shape = SHAPES[name]
    wrong = (*shape[:-1], shape[-1] + 1)
    with pytest.raises(MismatchError) as error:
        altered(path, name, "a.vo", np.ones(wrong))
    assert str(error.value) == f"{name} of a.vo has shape {wrong}; the model has {shape}"


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("value", [np.nan, np.inf, 1e300])
def test_what_is_not_finite_is_refused(path: SolutionPath, name: str, value: float) -> None:
    array = np.ones(SHAPES[name])
    array.flat[:2] = value
    if value == 1e300 and LEARNED[name].dtype == "f8":
        assert getattr(altered(path, name, KEYS[name], array), name)[KEYS[name]].flat[0] == value
        return
    with pytest.raises(MismatchError) as error:
        altered(path, name, KEYS[name], array)
    assert str(error.value) == f"{name} of {KEYS[name]} has 2 values that are not finite"


def test_a_basis_that_cannot_be_inverted_is_refused(path: SolutionPath) -> None:
    with pytest.raises(MismatchError, match=r"basis of a.vo has a matrix that cannot be inverted"):
        altered(path, "basis", "a.vo", np.ones((2, 3, 3)))


NONE = "a fill, basis or slope for {}, which takes none or is no pair of the model"
OUTPUT = "an output for {}, which has no fill or shares its consumer, or is no pair"
MOMENTS = "centre and covariance must name the same pairs, all of them with a fill"
NORMAL = "a sorted path's covariances may not be left out: leave them out, and sort it again"
SUMS = "delta_sum and delta_normal go with fill_sum and normal"
RANKING = "the ranking does not name the model's pairs: missing [], unknown ['no pair']"


@pytest.mark.parametrize(
    ("name", "key", "message"),
    [
        ("ranking", "no pair", RANKING),
        ("fill", "a.qk", NONE),  # scores are not linear in what a query lacks
        ("fill_sum", "a.qk", NONE),
        ("basis", "b.mlp", NONE),  # a nonlinearity
        ("slope", "no pair", NONE),
        ("output", "a.qk", OUTPUT),
        ("output", "b.mlp", OUTPUT),  # it has no fill
        ("centre", "a.qk", MOMENTS),
        ("covariance", "b.mlp", MOMENTS),
        ("normal", "b.mlp", NORMAL),
        ("delta_sum", "b.mlp", SUMS),
        ("delta_normal", "b.mlp", SUMS),
    ],
)
def test_a_pair_that_takes_none_is_refused(path: SolutionPath, name: str, key: str, message: str) -> None:
    with pytest.raises(MismatchError) as error:
        altered(path, name, key, np.ones(SHAPES[name]))
    assert str(error.value) == message.format(key)


@pytest.mark.parametrize(
    ("without", "message"),
    [
        (["fill"], OUTPUT.format("a.vo")),
        (["fill", "output"], MOMENTS),
        (["centre"], MOMENTS),
        (["covariance"], MOMENTS),
        (["centre", "covariance"], NORMAL),
        (["normal"], SUMS),
        (["fill_sum"], SUMS),
    ],
)
def test_what_an_array_needs_must_be_there(path: SolutionPath, without: list[str], message: str) -> None:
    change: dict[str, Any] = {name: {} for name in without}
    with pytest.raises(MismatchError) as error:
        replace(path, **change)
    assert str(error.value) == message


@pytest.mark.parametrize("name", SHAPES)
def test_every_array_is_sorted_with_its_units(path: SolutionPath, name: str) -> None:
    still = UnitOrder(np.arange(1), np.arange(4)[None])
    orders = {"a.vo": ORDER, "a.qk": UnitOrder(np.arange(2), np.tile(np.arange(3), (2, 1))), "b.mlp": still}
    array, found = getattr(path, name)[KEYS[name]], getattr(sorted_path(path, orders), name)
    if name == "basis":  # folded into the weights
        assert found == {}
        return
    expected = array
    if SHAPES[name] == (2, 3):
        expected = np.array([array[place] for place in UNITS]).reshape(2, 3)
    elif name == "covariance":
        expected = np.array([array[place] for place in product(PLACES, PLACES)]).reshape(12, 12)
    elif SHAPES[name][0] == 12:
        expected = np.array([array[place] for place in PLACES])
    np.testing.assert_array_equal(found[KEYS[name]], expected)


def test_a_size_has_what_is_learned_by_what_it_lacks(path: SolutionPath) -> None:
    cut = path.select(Budget(keep=0.6))
    assert not cut.keep["a.vo"].all()
    params = {pair.name: pair.unit_params for pair in path.pairs}
    kept = sum(int(cut.keep[name].sum()) * count for name, count in params.items())
    r = kept / path.pairs.prunable_params
    assert 0 < r <= 0.6
    assert cut.sparsity == 1 - r
    for name, slope in path.slope.items():
        np.testing.assert_allclose(cut.scale[name], 1 + (1 - r) * slope, rtol=1e-6)
    gain, shift = path.output["a.vo"]
    np.testing.assert_allclose(cut.output["a.vo"], [1 + (1 - r) * gain, (1 - r) * shift], rtol=1e-6)
    for name in ("fill", "basis", "centre", "covariance", "delta"):
        np.testing.assert_array_equal(getattr(cut, name)[KEYS[name]], getattr(path, name)[KEYS[name]])

    whole = path.select(Budget(keep=1.0))
    assert whole.sparsity == 0
    np.testing.assert_array_equal(whole.scale["a.vo"], np.ones((2, 3)))
    assert whole.output == {}  # only where a pair loses units


def test_the_law_is_one_for_numbers_arrays_and_weights() -> None:
    assert at_sparsity(1.0, 0.5, 0.25) == 1.125
    np.testing.assert_array_equal(at_sparsity(1, np.array([2.0, -4.0]), 0.25), [1.5, 0])
    weight = moved(torch.tensor([1.0, 2.0], dtype=torch.bfloat16), torch.tensor([4.0, 8.0]).half(), 0.25)
    assert weight.dtype == torch.bfloat16
    assert weight.tolist() == [2, 4]


@dataclass(frozen=True, eq=False)
class TiltedPath(SolutionPath):
    """A path with one more array."""

    tilt: dict[str, Floats] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class TiltedSelection(Selection):
    """A size that has it, too."""

    lean: dict[str, Floats] = field(default_factory=dict)


@pytest.fixture
def tilted(path: SolutionPath, monkeypatch: pytest.MonkeyPatch) -> Callable[..., TiltedPath]:
    """Paths with a row in the table, and a field of path and selection, that are not ours."""
    row = Learned(
        lambda pair: (pair.groups, pair.width),
        dtype="f8",
        takes=lambda pair: pair.kind == "vo",
        needs=("slope",),
        refusal="no tilt for {}",
        permute=UnitOrder.apply,
        selection="lean",
        dense=3.0,
        thinned=True,
    )
    monkeypatch.setitem(LEARNED, "tilt", row)
    monkeypatch.setattr("pathprune.family.path.Selection", TiltedSelection)
    rest = {name: getattr(path, name) for name in SHAPES}
    return lambda tilt, **changes: TiltedPath(path.pairs, **{**rest, **changes}, tilt=tilt)


def test_one_more_array_is_a_row_of_the_table(tilted: Callable[..., TiltedPath], tmp_path: Path) -> None:
    array = np.arange(1.0, 7).reshape(2, 3) / 7
    path = tilted({"a.vo": array})

    for wrong, message in (
        ({"a.vo": array[:1]}, r"tilt of a.vo has shape \(1, 3\); the model has \(2, 3\)"),
        ({"a.vo": array * np.inf}, r"tilt of a.vo has 6 values that are not finite"),
        ({"b.mlp": np.ones((1, 4))}, "no tilt for b.mlp"),
    ):
        with pytest.raises(MismatchError, match=message):
            tilted(wrong)
    with pytest.raises(MismatchError, match=r"no tilt for a.vo"):
        tilted({"a.vo": array}, slope={})

    path.save(tmp_path)
    loaded = TiltedPath.load(tmp_path)
    assert loaded == path
    np.testing.assert_array_equal(loaded.tilt["a.vo"], array)
    assert loaded.tilt["a.vo"].dtype == np.float64
    assert "tilt/a.vo" in read_artifact(tmp_path, "path", FORMAT)[0]["checksums"]

    orders = {
        pair.name: UnitOrder(np.arange(pair.groups), np.tile(np.arange(pair.units), (pair.groups, 1)))
        for pair in path.pairs
    }
    ordered = sorted_path(path, {**orders, "a.vo": ORDER})
    assert isinstance(ordered, TiltedPath)
    np.testing.assert_array_equal(ordered.tilt["a.vo"], np.array([[4, 6, 5], [3, 1, 2]]) / 7)

    cut, whole = (path.select(Budget(keep=keep)) for keep in (0.6, 1.0))
    assert isinstance(cut, TiltedSelection)
    assert isinstance(whole, TiltedSelection)
    np.testing.assert_allclose(cut.lean["a.vo"], 3 + (1 - cut.fraction) * array, rtol=1e-15)
    assert whole.lean == {}


def test_without_its_row_an_array_is_refused(tilted: Callable[..., TiltedPath], tmp_path: Path) -> None:
    tilted({"a.vo": np.ones((2, 3))}).save(tmp_path)
    del LEARNED["tilt"]
    with pytest.raises(ArtifactError, match=r"KeyError\(.tilt.\)"):
        SolutionPath.load(tmp_path)
