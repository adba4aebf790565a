"""Sorted units: every size is a prefix, and neither the model nor the family changes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given

import pathprune as pp
from conftest import Subject, run_model, snapshot, tiny_model
from pathprune.family.order import UNITS, UnitOrder
from pathprune.family.pairs import Pair
from pathprune.family.path import SolutionPath
from pathprune.transform.sorting import sorted_path, unit_orders
from strategies import moments, paths


def path_of(subject: Any, unit: Any = "mixed") -> SolutionPath:
    """A path with fills, slopes, outputs and rotations wherever pairs take them, and compensation in some blocks."""
    rng = np.random.default_rng(0)
    pairs = subject.pairs
    told = {pair.name: moments(pair, rng) for pair in pairs if pair.fillable and ".0." in pair.name}
    return SolutionPath(
        pairs,
        {pair.name: rng.normal(size=pair.shape) for pair in pairs},
        unit=unit,
        fill={pair.name: rng.normal(size=(pair.groups, pair.width)) for pair in pairs if pair.fillable},
        basis={pair.name: rng.normal(size=(pair.groups, pair.width, pair.width)) for pair in pairs if pair.rotatable},
        slope={pair.name: rng.uniform(-0.5, 0.5, pair.shape) for pair in pairs if pair.scalable},
        output={pair.name: rng.uniform(-0.5, 0.5, (2, pair.consumer.size)) for pair in pairs if pair.adjustable},
        centre={name: each[0] for name, each in told.items()},
        covariance={name: each[1] for name, each in told.items()},
    )


def is_prefix(kept: Any) -> bool:
    return bool((np.diff(kept.astype(int)) <= 0).all())


def movable(pair: Pair) -> bool:
    return pair.rotatable or pair.kind == "mlp"


@given(paths())
def test_the_sorted_path_is_the_same_family_in_prefixes(path: SolutionPath) -> None:
    orders = unit_orders(path)
    again = sorted_path(path, orders)
    np.testing.assert_array_equal(again.order.units, path.order.units)
    for pair in path.pairs:
        step = again.order.step[pair.name]
        np.testing.assert_array_equal(step, orders[pair.name].apply(path.order.step[pair.name].astype(float)))
        for removals in range(len(path.order.units) + 1):
            keep = step >= removals
            assert is_prefix(keep.any(axis=1)) or pair.kind == "mlp"
            if movable(pair):
                assert all(is_prefix(row) for row in keep)
    # What is sorted stays where it is.
    for name, order in unit_orders(again).items():
        pair = next(pair for pair in path.pairs if pair.name == name)
        np.testing.assert_array_equal(order.heads, np.arange(pair.groups))
        np.testing.assert_array_equal(order.units, np.broadcast_to(np.arange(pair.units), pair.shape))


def test_a_unit_goes_with_its_head() -> None:
    order = UnitOrder(heads=np.array([1, 0]), units=np.array([[2, 0, 1], [0, 1, 2]]))
    np.testing.assert_array_equal(order.apply(np.array([[1, 2, 3], [4, 5, 6]])), [[4, 5, 6], [3, 1, 2]])


@pytest.mark.parametrize("unit", UNITS)
def test_neither_the_model_nor_any_size_changes(subject: Subject, unit: str) -> None:
    path = path_of(subject, unit)
    before = snapshot(subject.model)
    ordered, again = pp.sort_units(subject.model, path)
    assert snapshot(subject.model) == before
    assert type(ordered) is type(subject.model)
    assert ordered.config.to_dict() == subject.model.config.to_dict()
    expected = subject.output()
    assert (subject.output(ordered) - expected).abs().max() < 1e-10 * expected.abs().max()
    assert not again.basis
    for budget in (pp.Budget(keep=0.8), pp.Budget(keep=0.5), pp.Budget(params=0.6), pp.Budget(macs=0.5)):
        small, theirs = (
            pp.slice_model(*of) for of in ((ordered, again.select(budget)), (subject.model, path.select(budget)))
        )
        expected = subject.output(theirs)
        assert (subject.output(small) - expected).abs().max() < 1e-9 * expected.abs().max()
        shapes = [{name: p.shape for name, p in model.named_parameters()} for model in (small, theirs)]
        assert shapes[0] == shapes[1]
        with pp.masked(ordered, again.select(budget)):
            assert (subject.output(ordered) - expected).abs().max() < 1e-9 * expected.abs().max()


def test_neurons_are_a_prefix_of_the_rows(subjects: dict[str, Subject]) -> None:
    subject = subjects["bert"]
    path = replace(path_of(subject), slope={}, fill={}, output={}, centre={}, covariance={})
    ordered, again = pp.sort_units(subject.model, path)
    selection = again.select(pp.Budget(keep=0.5))
    small = pp.slice_model(ordered, selection)
    pair = next(pair for pair in again.pairs if pair.kind == "mlp")
    kept = selection.kept(pair)
    assert 0 < kept < pair.width
    up, down = (dict(small.named_parameters())[f"{slot.module}.weight"] for slot in pair.slots)
    whole_up, whole_down = (dict(ordered.named_parameters())[f"{slot.module}.weight"] for slot in pair.slots)
    assert torch.equal(up, whole_up[:kept])
    assert torch.equal(down, whole_down[:, :kept])


def test_another_model_s_path_is_refused(subjects: dict[str, Subject]) -> None:
    with pytest.raises(pp.MismatchError, match="belongs to another model"):
        pp.sort_units(tiny_model("bert", seed=5), path_of(subjects["bert"]))


def test_the_sorted_path_belongs_to_the_sorted_model_only(subjects: dict[str, Subject]) -> None:
    subject = subjects["llama"]
    ordered, again = pp.sort_units(subject.model, path_of(subject))
    assert run_model(pp.slice_model(ordered, again.select(pp.Budget(keep=0.5))), subject.inputs).isfinite().all()
    with pytest.raises(pp.MismatchError, match="belongs to another model"):
        pp.slice_model(subject.model, again.select(pp.Budget(keep=0.5)))
