"""The rectangle rule: every prefix of the removals is a model that can ship."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given

from pathprune.family.order import UNITS, Order, removal_order
from pathprune.family.pairs import Pair
from pathprune.types import Floats
from strategies import Family, attention_pairs, families, mlp_pair, pair_list


def blocks(pairs: list[Pair]) -> list[list[Pair]]:
    found: dict[str, list[Pair]] = {}
    for pair in pairs:
        found.setdefault(pair.block, []).append(pair)
    return list(found.values())


def assert_same(one: Order, other: Order) -> None:
    assert one.step.keys() == other.step.keys()
    for name, step in one.step.items():
        np.testing.assert_array_equal(step, other.step[name], err_msg=name)
    np.testing.assert_array_equal(one.units, other.units)


@given(families())
def test_every_prefix_leaves_rectangles(family: Family) -> None:
    order = family.order
    for removals in range(len(order.units) + 1):
        keep = order.keep(removals)
        for members in blocks(family.pairs):
            heads = [keep[pair.name].any(axis=1) for pair in members]
            assert all((other == heads[0]).all() for other in heads), "query-key and value-output keep the same heads"
            for pair in members:
                kept = keep[pair.name][heads[0]]
                widths = set(kept.sum(axis=1).tolist())
                assert len(widths) <= 1, "heads are equally wide"
                assert all(width % family.multiple == 0 or width == pair.units for width in widths)
                if pair.kind != "mlp" and (pair.rotary or family.unit == "shared"):
                    assert (kept == kept[:1]).all(), "every head keeps the same dimensions"
                if pair.kind != "mlp" and family.unit == "head":
                    assert kept.all(), "only whole heads leave"
                if family.unit in ("dim", "shared"):
                    assert heads[0].all() or not heads[0].any(), "no head leaves alone"


@given(families())
def test_every_unit_leaves_exactly_once_and_is_counted(family: Family) -> None:
    order = family.order
    for i, pair in enumerate(family.pairs):
        step = order.step[pair.name]
        assert step.shape == pair.shape
        np.testing.assert_array_equal(np.bincount(step.ravel(), minlength=len(order.units)), order.units[:, i])
    assert (order.units.sum(axis=1) > 0).all(), "every removal removes something"


@given(families())
def test_selections_are_nested_from_everything_to_nothing(family: Family) -> None:
    order = family.order
    masks = [order.keep(removals) for removals in range(len(order.units) + 1)]
    assert all(keep.all() for keep in masks[0].values())
    assert not any(keep.any() for keep in masks[-1].values())
    for larger, smaller in itertools.pairwise(masks):
        assert all((smaller[name] <= larger[name]).all() for name in larger)


@given(families())
def test_value_never_decreases_and_is_a_mean_of_scores(family: Family) -> None:
    value = family.order.value
    assert (np.diff(value) >= 0).all()
    scores = np.concatenate([score.ravel() for score in family.ranking.values()]).astype(np.float64)
    slack = 1e-6 * max(1.0, float(np.abs(scores).max()))
    assert scores.min() - slack <= value[0]
    assert value[-1] <= scores.max() + slack


@given(families())
def test_a_more_valuable_unit_of_a_head_never_leaves_first(family: Family) -> None:
    order = family.order
    for pair in family.pairs:
        if pair.kind != "mlp" and (pair.rotary or family.unit == "shared"):
            score = np.broadcast_to(family.ranking[pair.name].mean(0, dtype=np.float64), pair.shape)
        else:
            score = family.ranking[pair.name]
        for values, steps in zip(score, order.step[pair.name], strict=True):
            assert (np.diff(steps[::-1][np.argsort(values[::-1], kind="stable")]) >= 0).all()


@given(families())
def test_the_order_depends_on_nothing_but_the_numbers(family: Family) -> None:
    order = family.order
    before = {name: score.copy() for name, score in family.ranking.items()}
    layouts: dict[str, Floats] = {
        name: np.asfortranarray(score.astype(np.float64)) for name, score in family.ranking.items()
    }
    doubled = {name: score * 2 for name, score in family.ranking.items()}
    assert_same(order, family.order)
    assert_same(order, replace(family, ranking=layouts).order)
    assert_same(order, replace(family, ranking=doubled).order)
    for name, score in family.ranking.items():
        np.testing.assert_array_equal(score, before[name])


@pytest.mark.parametrize("unit", UNITS)
def test_of_equals_the_last_leaves_first(unit: str) -> None:
    pairs = [*attention_pairs("a", 3, 4, 2, rotary=""), mlp_pair("b", 5)]
    order = removal_order(pairs, {pair.name: np.ones(pair.shape) for pair in pairs}, unit=unit)  # type: ignore[arg-type]
    np.testing.assert_array_equal(np.argsort(order.step["b.mlp"][0]), np.arange(5)[::-1])
    for pair in pairs[:2]:
        assert (np.diff(order.step[pair.name], axis=1) <= 0).all()
        assert (np.diff(order.step[pair.name], axis=0) <= 0).all()


def test_distinct_neurons_leave_from_the_least_valuable_up() -> None:
    score = np.array([[3.0, 1.0, 2.0, 5.0, 4.0]])
    order = removal_order([mlp_pair("b", 5)], {"b.mlp": score})
    np.testing.assert_array_equal(order.step["b.mlp"], [[2, 0, 1, 4, 3]])
    np.testing.assert_array_equal(order.value, [1, 2, 3, 4, 5])


def test_a_cheap_removal_behind_a_dear_one_is_pooled_with_it() -> None:
    """The last value-output dimension to go alone is worth 5, what is then left of the layer 2 and 6."""
    pairs = [*attention_pairs("a", 1, 3, 1, rotary=""), mlp_pair("b", 2)]
    qk, vo, _ = (pair.unit_params for pair in pairs)
    pooled = (5 * vo + 2 * qk + 6 * vo) / (2 * vo + qk)
    ranking = {
        "a.qk": np.array([[0.0, 2.0, 0.5]]),
        "a.vo": np.array([[1.0, 6.0, 5.0]]),
        "b.mlp": np.array([[pooled + 0.01, pooled - 0.01]]),
    }
    order = removal_order(pairs, ranking, unit="dim")
    np.testing.assert_allclose(order.value, [0, 0.5, 1, pooled - 0.01, pooled, pooled, pooled + 0.01])
    assert order.step["b.mlp"].tolist() == [[6, 3]]
    assert order.step["a.qk"].tolist() == [[0, 5, 1]]
    assert order.step["a.vo"].tolist() == [[2, 5, 4]]


def test_mixed_takes_whichever_is_worth_less() -> None:
    """One worthless head, and one worthless dimension in every other."""
    pairs = attention_pairs("a", 3, 3, 1, rotary="")
    score = np.ones((3, 3))
    score[0] = 0.1
    score[1:, 2] = 0.3
    order = removal_order(pairs, {"a.qk": score, "a.vo": score})
    first, second = order.keep(1), order.keep(2)
    for name in ("a.qk", "a.vo"):
        assert first[name].tolist() == [[False] * 3, [True] * 3, [True] * 3]
    assert sorted(int(second[name].sum()) for name in second) == [4, 6]
    narrow = min(second.values(), key=np.sum)
    assert narrow.tolist() == [[False] * 3, [True, True, False], [True, True, False]]


@pytest.mark.parametrize(("units", "multiple", "widths"), [(10, 4, [10, 8, 4, 0]), (3, 8, [3, 0]), (8, 8, [8, 0])])
def test_widths_step_by_multiples(units: int, multiple: int, widths: list[int]) -> None:
    order = removal_order([mlp_pair("b", units)], {"b.mlp": np.arange(units, dtype=float)[None]}, multiple=multiple)
    assert [int(order.keep(i)["b.mlp"].sum()) for i in range(len(order.units) + 1)] == widths


@given(families())
def test_neurons_with_distinct_scores_may_be_renumbered(family: Family) -> None:
    pairs = pair_list([pair for pair in family.pairs if pair.kind == "mlp"])
    if not pairs:
        return
    rng = np.random.default_rng(0)
    ranking = {pair.name: rng.permutation(pair.units)[None] + 0.5 for pair in pairs}
    shuffle = {pair.name: rng.permutation(pair.units) for pair in pairs}
    there = removal_order(pairs, ranking, multiple=family.multiple)
    shuffled = {name: score[:, shuffle[name]] for name, score in ranking.items()}
    back = removal_order(pairs, shuffled, multiple=family.multiple)
    for name, step in there.step.items():
        np.testing.assert_array_equal(step[:, shuffle[name]], back.step[name])
