"""Paths survive the disk, and say what is wrong with those that did not."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings

from pathprune.errors import ArtifactError, MismatchError, SettingError
from pathprune.family.artifact import read_artifact, write_artifact
from pathprune.family.budget import Budget
from pathprune.family.pair_list import PairList
from pathprune.family.path import FORMAT, SolutionPath
from pathprune.family.trajectory import Trajectory
from pathprune.types import Floats
from strategies import attention_pairs, mlp_pair, pair_list, paths


def assert_equal(one: SolutionPath, other: SolutionPath) -> None:
    assert list(one.pairs) == list(other.pairs)
    assert (one.pairs.base, one.pairs.refused) == (other.pairs.base, other.pairs.refused)
    for name in ("unit", "multiple", "seq_len", "config", "versions"):
        assert getattr(one, name) == getattr(other, name), name
    for name in ("ranking", "fill", "basis", "slope", "output"):
        arrays, others = getattr(one, name), getattr(other, name)
        assert arrays.keys() == others.keys()
        for key, array in arrays.items():
            np.testing.assert_array_equal(array, others[key], err_msg=f"{name} of {key}")
    for name in ("loss", "level", "gamma_l1"):
        np.testing.assert_array_equal(getattr(one.trajectory, name), getattr(other.trajectory, name), err_msg=name)
    for pair in one.pairs:
        np.testing.assert_array_equal(one.order.step[pair.name], other.order.step[pair.name])


@settings(max_examples=25)
@given(paths())
def test_round_trip(path: SolutionPath) -> None:
    with TemporaryDirectory() as folder:
        path.save(folder)
        first = {file.name: file.read_bytes() for file in Path(folder).iterdir()}
        loaded = SolutionPath.load(folder)
        assert_equal(loaded, path)
        loaded.save(folder)
        assert {file.name: file.read_bytes() for file in Path(folder).iterdir()} == first


@pytest.fixture
def pairs() -> PairList:
    return pair_list([*attention_pairs("a", 2, 3, 2, rotary="halves"), mlp_pair("b", 4)], outside=10)


@pytest.fixture
def path(pairs: PairList) -> SolutionPath:
    rng = np.random.default_rng(0)
    return SolutionPath.from_scores(pairs, {pair.name: rng.random(pair.shape) for pair in pairs})


@pytest.mark.parametrize(
    "convert",
    [
        pytest.param(lambda a: a, id="numpy"),
        pytest.param(lambda a: a.tolist(), id="list"),
        pytest.param(lambda a: a.astype(np.int32), id="integers"),
        pytest.param(lambda a: torch.from_numpy(a), id="torch"),
        pytest.param(lambda a: torch.nn.Parameter(torch.from_numpy(a)), id="parameter"),
        pytest.param(lambda a: torch.from_numpy(a).half(), id="float16"),
        pytest.param(lambda a: torch.from_numpy(a).bfloat16(), id="bfloat16"),
    ],
)
def test_any_score_makes_a_path(pairs: PairList, convert: Callable[[Any], Any]) -> None:
    scores = {pair.name: np.arange(pair.groups * pair.units, dtype=np.float64).reshape(pair.shape) for pair in pairs}
    path = SolutionPath.from_scores(pairs, {name: convert(score) for name, score in scores.items()})
    for name, score in scores.items():
        assert path.ranking[name].dtype == np.float32
        np.testing.assert_array_equal(path.ranking[name], score)
    assert {"pathprune", "torch", "transformers"} <= path.versions.keys()


def ones(pairs: PairList) -> dict[str, Any]:
    return {pair.name: np.ones(pair.shape, np.float32) for pair in pairs}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("b.mlp"), r"missing \['b.mlp'\], unknown \[\]"),
        (lambda s: s.update(c=np.ones(3)), r"missing \[\], unknown \['c'\]"),
        (lambda s: s.update({"b.mlp": np.ones(4)}), r"ranking of b.mlp has shape \(4,\); the model has \(1, 4\)"),
        (lambda s: s.update({"a.qk": np.ones((2, 6))}), r"ranking of a.qk has shape \(2, 6\); the model has \(2, 3\)"),
        (lambda s: s["a.vo"].__setitem__((0, 0), np.nan), r"ranking of a.vo has 1 values that are not finite"),
        (lambda s: s["a.vo"].__setitem__((0, slice(2)), -np.inf), r"ranking of a.vo has 2 values that are not finite"),
    ],
)
def test_scores_of_other_pairs_are_refused(pairs: PairList, change: Callable[[Any], object], message: str) -> None:
    scores = ones(pairs)
    change(scores)
    with pytest.raises(MismatchError, match=message):
        SolutionPath.from_scores(pairs, scores)


@pytest.mark.parametrize(
    ("fill", "output", "message"),
    [
        (
            {"b.mlp": np.zeros((1, 4))},
            {"b.mlp": np.zeros((2, 9))},
            r"output of b.mlp has shape \(2, 9\); the model has",
        ),
        ({}, {"b.mlp": np.zeros((2, 8))}, "an output for b.mlp, which has no fill"),
        ({}, {"a.qk": np.zeros((2, 8))}, "an output for a.qk, which has no fill"),
    ],
)
def test_outputs_that_do_not_fit_are_refused(pairs: PairList, fill: Any, output: Any, message: str) -> None:
    with pytest.raises(MismatchError, match=message):
        SolutionPath(pairs, ones(pairs), fill=fill, output=output)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"unit": "row"}, r"unit='row' is not one of mixed, dim, shared, head"),
        ({"multiple": 0}, r"multiple=0"),
        ({"multiple": 2.5}, r"multiple=2.5"),
        ({"seq_len": 0}, r"seq_len=0"),
        ({"seq_len": float("nan")}, r"seq_len=nan"),
        ({"seq_len": 2**31}, r"seq_len=2147483648 must be at least 1, and an integer"),
        ({"multiple": 10**30}, rf"multiple={10**30} must be at least 1, and an integer"),
    ],
)
def test_settings_are_checked(pairs: PairList, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        SolutionPath.from_scores(pairs, ones(pairs), **settings)


def test_the_family_does_not_depend_on_having_been_saved(pairs: PairList, tmp_path: Path) -> None:
    """Differences that float32 cannot hold order nothing, before saving as after."""
    rng = np.random.default_rng(0)
    ranking: dict[str, Floats] = {pair.name: 1 + 1e-10 * rng.random(pair.shape) for pair in pairs}
    path = SolutionPath(pairs, ranking)
    path.save(tmp_path)
    assert_equal(SolutionPath.load(tmp_path), path)


def edit_description(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        file = folder / "path.json"
        meta = json.loads(file.read_text())
        del meta["sha256"]  # as 0.1.0 wrote it
        change(meta)
        file.write_text(json.dumps(meta))

    return damage


def edit_tensors(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Rewritten with a fresh hash, as a faulty tool would."""

    def damage(folder: Path) -> None:
        meta, tensors = read_artifact(folder, "path", FORMAT)
        del meta["tensors"]
        change(tensors)
        write_artifact(folder, "path", meta, tensors)

    return damage


def description(key: str, value: Any) -> Callable[[Path], None]:
    return edit_description(lambda meta: meta.update({key: value}))


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "format": (description("format", FORMAT + 1), r"this pathprune reads format"),
    "no unit": (edit_description(lambda m: m.pop("unit")), r"KeyError\('unit'\)"),
    "unknown unit": (description("unit", "row"), r"unit='row' is not one of"),
    "text for a number": (description("seq_len", "long"), r"not a valid path"),
    "text for pairs": (description("pairs", "none"), r"not a valid path"),
    "no pairs": (description("pairs", []), r"not a valid path"),
    "unknown field of a pair": (edit_description(lambda m: m["pairs"][0].update(zeal=1)), r"zeal"),
    "missing field of a pair": (edit_description(lambda m: m["pairs"][0].pop("kind")), r"kind"),
    "unknown kind": (edit_description(lambda m: m["pairs"][0].update(kind="kv")), r"not a valid path"),
    "no slots": (edit_description(lambda m: m["pairs"][0].update(slots=[])), r"not a valid path"),
    "negative size": (edit_description(lambda m: m["pairs"][0]["slots"][0].update(size=-4)), r"not a valid path"),
    "text for a size": (edit_description(lambda m: m["pairs"][0]["slots"][0].update(size="4")), r"not a valid path"),
    "the same pair twice": (edit_description(lambda m: m["pairs"].append(m["pairs"][0])), r"not a valid path"),
    "another width": (edit_description(lambda m: m["pairs"][0].update(width=8)), r"has shape"),
    "no base": (description("base", {}), r"not a valid path"),
    "no configuration": (description("config", None), r"not a valid path"),
    "an unknown part": (edit_tensors(lambda t: t.update({"extra/x": np.ones(1)})), r"extra"),
    "no ranking": (edit_tensors(lambda t: t.pop("ranking/b.mlp")), r"missing \['b.mlp'\]"),
    "shape": (edit_tensors(lambda t: t.update({"ranking/b.mlp": np.ones((2, 2), np.float32)})), r"has shape \(2, 2\)"),
    "NaN": (edit_tensors(lambda t: t["ranking/b.mlp"].fill(np.nan)), r"4 values that are not finite"),
    "shape of a fill": (
        edit_tensors(lambda t: t.update({"fill/b.mlp": np.ones((1, 3), np.float32)})),
        r"fill of b.mlp",
    ),
    "fill of no pair": (edit_tensors(lambda t: t.update({"fill/c": np.ones((1, 3), np.float32)})), r"not a valid path"),
    "NaN in a basis": (
        edit_tensors(lambda t: t.update({"basis/a.vo": np.full((2, 6, 6), np.nan, np.float32)})),
        r"basis of a.vo has 72 values",
    ),
    "unknown trajectory": (edit_tensors(lambda t: t.update({"trajectory/x": np.ones(1)})), r"not a valid path"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_malformed_path_is_refused_with_a_remedy(path: SolutionPath, tmp_path: Path, name: str) -> None:
    damage, message = DAMAGES[name]
    path.save(tmp_path)
    damage(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(ArtifactError, match=message) as error:
        SolutionPath.load(tmp_path)
    assert "search again" in str(error.value) or "Copy it again" in str(error.value)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"path\.json does not exist; .* holds no complete path"):
        SolutionPath.load(tmp_path / "nowhere")


def test_a_path_is_opened_and_cut_without_torch_or_transformers(
    path: SolutionPath, tmp_path: Path, python: Callable[..., Any]
) -> None:
    path.save(tmp_path)
    done = python(
        "import sys\n"
        "from pathprune import Budget, SolutionPath\n"
        "selection = SolutionPath.load(sys.argv[1]).select(Budget(keep=0.5))\n"
        "loaded = {'torch', 'transformers', 'timm'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
        "print(selection.pair_params)\n",
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == path.select(Budget(keep=0.5)).pair_params


def filled(pairs: PairList, seed: int = 0) -> SolutionPath:
    """A path with arrays of every kind that a search gives."""
    rng = np.random.default_rng(seed)
    scores: dict[str, Floats] = {pair.name: rng.random(pair.shape) for pair in pairs}
    fill: dict[str, Floats] = {pair.name: rng.random((pair.groups, pair.width)) for pair in pairs if pair.fillable}
    trajectory = Trajectory(loss=rng.random(3).astype(np.float32))
    return SolutionPath(pairs, scores, fill=fill, trajectory=trajectory, config={"seed": seed})


def test_what_is_alike_is_equal_and_has_one_hash(pairs: PairList, tmp_path: Path) -> None:
    path, again, other = filled(pairs), filled(pairs), filled(pairs, seed=1)
    path.save(tmp_path)
    budget = Budget(keep=0.5)
    loaded = SolutionPath.load(tmp_path)
    assert path.order  # what is computed once is no content
    for one, two, third in (
        (path, again, other),
        (path, loaded, other),
        (path.trajectory, again.trajectory, other.trajectory),
        (path.select(budget), loaded.select(budget), other.select(budget)),
        (path.select(budget), again.select(budget), path.select(Budget(keep=0.25))),
    ):
        assert one == two
        assert hash(one) == hash(two)
        assert one != third
        assert len({one, two, third}) == 2
        assert one != "something else"


@pytest.mark.parametrize("change", [{"unit": "dim"}, {"multiple": 2}, {"seq_len": 9}, {"config": {}}, {"fill": {}}])
def test_paths_differ_in_every_part(pairs: PairList, change: dict[str, Any]) -> None:
    assert filled(pairs) != dataclasses.replace(filled(pairs), **change)


def test_pairs_of_two_models_differ(pairs: PairList) -> None:
    same, base = PairList(list(pairs), pairs.base), dataclasses.replace(pairs.base, fingerprint="b-c")
    assert pairs == same
    assert (pairs != same) is False
    assert pairs != PairList(list(pairs), base)
    assert (pairs == PairList(list(pairs), base)) is False
    assert pairs == list(pairs)
    assert filled(pairs) != filled(PairList(list(pairs), base))
    with pytest.raises(TypeError, match="unhashable"):
        hash(pairs)


def test_types_are_shipped() -> None:
    assert resources.files("pathprune").joinpath("py.typed").is_file()
