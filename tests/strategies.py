"""What may come in: lists of pairs, rankings, budgets, and selections of a real model's units."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

from pathprune.family.budget import Budget
from pathprune.family.order import UNITS, Order, Unit, removal_order
from pathprune.family.pair_list import BaseModel, PairList
from pathprune.family.pairs import Pair, Rotary, Slot
from pathprune.family.path import SolutionPath
from pathprune.family.selection import Selection
from pathprune.family.trajectory import Trajectory
from pathprune.types import Floats

Masks = dict[str, npt.NDArray[np.bool_]]

HIDDEN = 6


def attention_pairs(block: str, groups: int, units: int, repeat: int, rotary: Rotary, bias: bool = True) -> list[Pair]:
    """The two pairs of an attention layer; ``units`` are the query-key pair's."""
    width = units * (2 if rotary else 1)
    query, key = Slot(f"{block}.q", "out", HIDDEN, repeat, bias), Slot(f"{block}.k", "out", HIDDEN, 1, bias)
    value, output = Slot(f"{block}.v", "out", HIDDEN, 1, bias), Slot(f"{block}.o", "in", HIDDEN, repeat, bias)
    return [
        Pair(f"{block}.qk", "qk", block, groups, width, (query, key), rotary),
        Pair(f"{block}.vo", "vo", block, groups, width, (value, output)),
    ]


def mlp_pair(block: str, units: int, gated: bool = False, bias: bool = True) -> Pair:
    ups = [Slot(f"{block}.{name}", "out", HIDDEN, 1, bias) for name in (("gate", "up") if gated else ("up",))]
    return Pair(f"{block}.mlp", "mlp", block, 1, units, (*ups, Slot(f"{block}.down", "in", HIDDEN, 1, bias)))


def pair_list(pairs: list[Pair], *, outside: int = 0) -> PairList:
    """Pairs of a model that has ``outside`` parameters and MACs beside them."""
    linear = sum(pair.groups * pair.units * pair.unit_macs(0) for pair in pairs)
    params = sum(pair.params for pair in pairs)
    base = BaseModel(
        "Tiny",
        "c" * 64,
        "f" * 64,
        params + outside,
        int(linear) + outside,
        bytes=4 * (params + outside) + 800,
        itemsize=4,
    )
    return PairList(pairs, base, {"x": "a reason"})


@st.composite
def pair_lists(draw: st.DrawFn, max_layers: int = 2) -> PairList:
    pairs: list[Pair] = []
    booleans = st.booleans()
    for layer in range(draw(st.integers(1, max_layers))):
        attention, mlp = draw(st.sampled_from([(True, True), (True, False), (False, True)]))
        if attention:
            groups, units, repeat = (draw(st.integers(1, top)) for top in (4, 6, 3))
            rotary: Any = draw(st.sampled_from(["", "halves", "neighbours"]))
            pairs += attention_pairs(f"layer.{layer}.attn", groups, units, repeat, rotary, draw(booleans))
        if mlp:
            pairs.append(mlp_pair(f"layer.{layer}", draw(st.integers(1, 12)), draw(booleans), draw(booleans)))
    return pair_list(pairs, outside=draw(st.integers(0, 500)))


@st.composite
def rankings(draw: st.DrawFn, pairs: PairList) -> dict[str, Floats]:
    """One number a unit: few distinct values, so that many tie, or any finite float32."""
    any_float = st.floats(-1e6, 1e6, width=32)
    values = draw(st.sampled_from([st.integers(0, 3).map(float), any_float]))
    sizes = {pair.name: pair.groups * pair.units for pair in pairs}
    numbers = {name: draw(st.lists(values, min_size=size, max_size=size)) for name, size in sizes.items()}
    return {pair.name: np.array(numbers[pair.name], np.float32).reshape(pair.shape) for pair in pairs}


@dataclass(frozen=True)
class Family:
    """A merged order, with what it was made from."""

    pairs: PairList
    ranking: dict[str, Floats]
    unit: Unit
    multiple: int

    @property
    def order(self) -> Order:
        return removal_order(self.pairs, self.ranking, unit=self.unit, multiple=self.multiple)


@st.composite
def families(draw: st.DrawFn) -> Family:
    pairs = draw(pair_lists())
    return Family(pairs, draw(rankings(pairs)), draw(st.sampled_from(UNITS)), draw(st.integers(1, 4)))


@st.composite
def paths(draw: st.DrawFn) -> SolutionPath:
    """Paths with constants for some pairs, a trajectory and a configuration."""
    family = draw(families())
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    steps = draw(st.integers(0, 3))

    def floats(*shape: int) -> Floats:
        return rng.normal(size=shape).astype(np.float32)

    some = [pair for pair in family.pairs if draw(st.booleans())]
    slope = {pair.name: floats(*pair.shape) for pair in some if pair.scalable}
    output = {pair.name: floats(2, pair.consumer.size) for pair in some if pair.adjustable and draw(st.booleans())}
    told = {pair.name: moments(pair, rng) for pair in some if pair.fillable and draw(st.booleans())}
    return SolutionPath(
        family.pairs,
        family.ranking,
        unit=family.unit,
        multiple=family.multiple,
        seq_len=draw(st.integers(1, 512)),
        fill={pair.name: floats(pair.groups, pair.width) for pair in some if pair.fillable},
        centre={name: each[0] for name, each in told.items()},
        covariance={name: each[1] for name, each in told.items()},
        basis={pair.name: floats(pair.groups, pair.width, pair.width) for pair in some if pair.rotatable},
        slope=slope,
        output=output,
        trajectory=Trajectory(floats(steps), floats(steps), floats(steps, len(family.pairs))),
        config={"steps": steps, "nested": {"note": draw(st.text(max_size=5))}},
        versions={"pathprune": "0"},
    )


def budgets(dense_params: int, dense_macs: int, dense_bytes: int) -> st.SearchStrategy[Budget]:
    """Every kind, as fractions and as absolute numbers."""
    fractions = st.floats(0, 1, exclude_min=True) | st.sampled_from([1.0, 0.5, 0.25])
    return st.one_of(
        st.builds(Budget, keep=fractions),
        st.builds(Budget, params=fractions),
        st.builds(Budget, macs=fractions),
        st.builds(Budget, params=st.integers(1, dense_params)),
        st.builds(Budget, macs=st.integers(1, dense_macs)),
        st.builds(Budget, bytes=fractions),
        st.builds(Budget, bytes=st.integers(1, dense_bytes)),
    )


CASES = ("full", "uneven", "fewer heads", "no attention", "no mlp", "nothing left", "half of a path")
EXTREMES = ("one head", "one unit", "one unit of one head", "nothing in the last layer")


def selection_of(pairs: PairList, case: str, *, seed: int = 0, constants: bool = True) -> Selection:
    """A selection that no path would make, of a real model's units.

    Args:
        case: one of ``CASES`` (all but the first and the last have unequal query-key and value widths)
            or of ``EXTREMES``.
        constants: with fills, scales and well-conditioned rotations, wherever the pairs allow them, half of the fills
            with compensation, and half of the outputs scaled and shifted.
    """

    rng = np.random.default_rng(seed)
    if case == "half of a path":
        path = SolutionPath.from_scores(pairs, {pair.name: rng.random(pair.shape) for pair in pairs})
        keep = path.select(Budget(keep=0.5)).keep
    else:
        keep = _rectangles(pairs, case, rng)
    fill, basis, scale, output, centre, covariance = {}, {}, {}, {}, {}, {}
    for pair in pairs if constants else []:
        if pair.fillable:
            fill[pair.name] = rng.normal(size=(pair.groups, pair.width)).astype(np.float32)
            if rng.random() < 0.5:
                centre[pair.name], covariance[pair.name] = moments(pair, rng)
        if pair.rotatable:
            q, _ = np.linalg.qr(rng.normal(size=(pair.groups, pair.width, pair.width)))
            basis[pair.name] = (q * rng.uniform(0.5, 2, size=(pair.groups, 1, pair.width))).astype(np.float32)
        if pair.scalable:
            scale[pair.name] = rng.uniform(0.5, 2, size=pair.shape).astype(np.float32)
        if pair.adjustable and rng.random() < 0.5:
            output[pair.name] = rng.normal([[1], [0]], 0.1, size=(2, pair.consumer.size)).astype(np.float32)
    return Selection(
        pairs,
        keep,
        seq_len=16,
        fill=fill,
        basis=basis,
        scale=scale,
        output=output,
        centre=centre,
        covariance=covariance,
    )


def moments(pair: Pair, rng: np.random.Generator) -> tuple[Floats, Floats]:
    """A mean and a covariance of what the pair's consumer reads."""
    inner = pair.groups * pair.consumer.repeat * pair.width
    tokens = rng.normal(size=(inner + 3, inner)) @ rng.normal(size=(inner, inner)) / np.sqrt(inner)
    covariance = np.cov(tokens.T).reshape(inner, inner) + 0.1 * np.eye(inner)
    return rng.normal(size=inner).astype(np.float32), covariance.astype(np.float32)


def _rectangles(pairs: PairList, case: str, rng: np.random.Generator) -> Masks:
    keep: Masks = {}
    alive: dict[tuple[str, bool], npt.NDArray[np.bool_]] = {}  # of each sublayer
    attention = [pair.block for pair in pairs if pair.kind != "mlp"]
    mlps = [pair.block for pair in pairs if pair.kind == "mlp"]
    gone = {
        "no attention": attention[:1],
        "no mlp": mlps[:1],
        "nothing left": attention + mlps,
        "nothing in the last layer": attention[-1:] + mlps[-1:],
    }.get(case, [])
    for pair in pairs:
        sublayer = (pair.block, pair.kind == "mlp")
        if sublayer not in alive:
            alive[sublayer] = np.ones(pair.groups, dtype=bool)
            if pair.kind != "mlp" and case == "fewer heads" and pair.groups > 1:  # not equally many in every layer
                alive[sublayer][rng.permutation(pair.groups)[: 1 + len(alive) % (pair.groups - 1)]] = False
            if pair.kind != "mlp" and case.endswith("one head"):
                alive[sublayer][rng.permutation(pair.groups)[1:]] = False
        heads = alive[sublayer]
        count = int(rng.integers(1, pair.units)) if pair.kind != "vo" else pair.units - 1 - int(rng.integers(3))
        if case == "full":
            count = pair.units
        if case.startswith("one unit"):
            count = 1
        same = rng.permutation(pair.units)[:count]
        mask = np.zeros(pair.shape, dtype=bool)
        for head in np.flatnonzero(heads):
            mask[head, same if pair.rotary else rng.permutation(pair.units)[:count]] = True
        keep[pair.name] = mask & (pair.block not in gone)
    return keep
