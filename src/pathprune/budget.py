"""How large a model may be, and what a solution path selects for it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pathprune.errors import BudgetError
from pathprune.pairs import Pair, PairList

if TYPE_CHECKING:
    from pathprune.path import SolutionPath


@dataclass(frozen=True)
class Budget:
    """A limit on size; exactly one of the three is given.

    Args:
        keep: fraction in (0, 1] of the prunable parameters (those that belong to a pair).
        params: parameters of the whole model; a ``float`` in (0, 1] is a fraction of the dense
            model's, an ``int`` an absolute number.
        macs: multiply-accumulates of the whole model per token at the path's sequence length;
            fraction or absolute number likewise.

    Raises:
        BudgetError: none or several are given, or the value is out of range.
    """

    keep: float | None = None
    params: float | int | None = None
    macs: float | int | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("keep", "params", "macs") if getattr(self, name) is not None]
        if len(given) != 1:
            raise BudgetError(f"a budget takes exactly one of keep=, params= or macs=; got {given or 'none'}")
        value = self.value
        if isinstance(value, bool) or not isinstance(value, Real):
            raise BudgetError(f"{self.kind}={value!r} is not a number")
        if isinstance(value, Integral) and self.kind != "keep":
            if value <= 0:
                raise BudgetError(f"{self.kind}={value} must be positive")
        elif not 0 < value <= 1:
            raise BudgetError(
                f"{self.kind}={value} is not in (0, 1]; a float is the fraction kept"
                + ("" if self.kind == "keep" else ", an int an absolute number")
            )

    @property
    def kind(self) -> str:
        """``"keep"``, ``"params"`` or ``"macs"``."""
        return "keep" if self.keep is not None else "params" if self.params is not None else "macs"

    @property
    def value(self) -> float | int:
        value = getattr(self, self.kind)
        assert value is not None
        return value

    def __str__(self) -> str:
        return f"{self.kind}={self.value}"


@dataclass(frozen=True, eq=False)
class Selection:
    """An architecture on the path: which units stay.

    Args:
        pairs: the pairs of the base model.
        keep: pair name -> (G, U) bool.
        fill: pair name -> (G, D), the constant that takes a removed dimension's place; it is
            folded into the consumer's bias when the model is sliced. Pairs without one are absent.
        basis: pair name -> (G, D, D), rotation of the pair's heads before units are counted
            (``pathprune.basis``). Pairs without one are absent.
        scale: pair name -> (G, U), what the activation of a unit that stays is multiplied by (its distance from
            the centre, else from the fill, where there is one); folded into the consumer's weights. Counts only
            where a pair loses units; 1 for pairs without one.
        output: pair name -> (2, d), what the consumer puts out is multiplied by the one and shifted by the other, where
            the pair loses units; folded into the consumer's weight and bias.
        centre, covariance: pair name -> (N,) and (N, N), N = G R D, of what the consumer reads, in the basis; what
            leaves is told from what stays by them (``pathprune.compensation``). Only pairs with a fill have them.
        delta: parameter name -> array of its shape; one minus the fraction kept of it is added
            (``pathprune.delta``).
        budget: what was asked for.
        removals: how far along the path's order this selection lies.
        seq_len: sequence length, in tokens, at which ``macs`` is counted.
    """

    pairs: PairList
    keep: dict[str, npt.NDArray[np.bool_]]
    budget: Budget | None = None
    removals: int = 0
    seq_len: int = 128
    fill: Mapping[str, npt.NDArray[np.floating]] = field(default_factory=dict)
    basis: Mapping[str, npt.NDArray[np.floating]] = field(default_factory=dict)
    scale: Mapping[str, npt.NDArray[np.floating]] = field(default_factory=dict)
    output: Mapping[str, npt.NDArray[np.floating]] = field(default_factory=dict)
    centre: Mapping[str, npt.NDArray[np.floating]] = field(default_factory=dict)
    covariance: Mapping[str, npt.NDArray[np.floating]] = field(default_factory=dict)
    delta: Mapping[str, npt.NDArray[np.floating]] = field(default_factory=dict)

    def __eq__(self, other: object) -> bool:
        return same(self, other) if isinstance(other, Selection) else NotImplemented

    def __hash__(self) -> int:
        return hash((self.pairs.base, tuple(sorted(self.keep)), self.budget, self.removals, self.seq_len))

    def mask(self, pair: Pair) -> npt.NDArray[np.float64]:
        """(G, U), what each unit of ``pair`` is multiplied by: zero, or its scale."""
        mask = self.keep[pair.name].astype(np.float64)
        if pair.name in self.scale and not mask.all():
            mask *= self.scale[pair.name]
        return mask

    def kept(self, pair: Pair) -> int:
        """Units of ``pair`` that stay."""
        return int(self.keep[pair.name].sum())

    def widths(self, pair: Pair) -> tuple[int, int]:
        """(heads, dimensions of each) that stay."""
        heads = int(self.keep[pair.name].any(axis=1).sum())
        return heads, self.kept(pair) * pair.dims_per_unit // max(heads, 1)

    @property
    def pair_params(self) -> int:
        """Prunable parameters that stay."""
        return sum(self.kept(pair) * pair.unit_params for pair in self.pairs)

    @property
    def fraction(self) -> float:
        """Fraction of the prunable parameters that stays."""
        return self.pair_params / self.pairs.prunable_params

    @property
    def params(self) -> int:
        """Parameters of the whole sliced model, with the biases that fills need."""
        thinned = [pair for pair in self.pairs if not self.keep[pair.name].all()]
        biases = sum(pair.fill_params for pair in thinned if pair.name in self.fill)
        return self.pairs.base.params - self.pairs.prunable_params + self.pair_params + biases

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the whole sliced model, per token at ``seq_len``."""
        gone = sum((pair.groups * pair.units - self.kept(pair)) * pair.unit_macs(self.seq_len) for pair in self.pairs)
        return round(dense_macs(self.pairs, self.seq_len) - gone)

    def to_dict(self) -> dict[str, Any]:
        """Sizes and widths as plain numbers, for JSON."""
        base = self.pairs.base
        return {
            "budget": str(self.budget) if self.budget else None,
            "prunable_params_kept": self.pair_params,
            "prunable_params_kept_fraction": self.fraction,
            "params": self.params,
            "params_fraction_of_whole_model": self.params / base.params,
            "macs_per_token": self.macs,
            "macs_fraction_of_whole_model": self.macs / dense_macs(self.pairs, self.seq_len),
            "seq_len": self.seq_len,
            "widths": {pair.name: list(self.widths(pair)) for pair in self.pairs},
        }

    def __str__(self) -> str:
        facts = self.to_dict()
        return (
            f"{facts['prunable_params_kept_fraction']:.1%} of the prunable parameters "
            f"({self.pair_params:,} of {self.pairs.prunable_params:,}), "
            f"{facts['params_fraction_of_whole_model']:.1%} of the whole model's parameters, "
            f"{facts['macs_fraction_of_whole_model']:.1%} of its MACs at {self.seq_len} tokens"
        )


def same(one: Any, other: Any) -> bool:
    """Whether two things are alike in content: arrays by value, mappings by key, dataclasses by field."""
    if is_dataclass(one):
        return type(one) is type(other) and all(
            same(getattr(one, part.name), getattr(other, part.name)) for part in fields(one)
        )
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, np.ndarray) or isinstance(other, np.ndarray):
        return np.array_equal(one, other, equal_nan=True)
    return bool(one == other)


def dense_macs(pairs: PairList, seq_len: int) -> int:
    """Multiply-accumulates of the dense model per token: its linear maps, and attention over ``seq_len`` keys."""
    attention = sum(pair.groups * pair.units * pair.unit_attention_macs(seq_len) for pair in pairs)
    return round(pairs.base.macs_per_token + pairs.base.macs_per_sequence / seq_len + attention)


def select(path: SolutionPath, budget: Budget) -> Selection:
    """The largest architecture of ``path`` within ``budget``.

    The budget is never exceeded, and the selection falls short of it by less than the cost of
    the next removal on the path. Selections of one path are nested, whatever their budgets.

    Raises:
        BudgetError: even the path's smallest architecture is larger, or the dense model is
            smaller than an absolute budget (naming a larger number is taken for a slip).
    """
    pairs, order = path.pairs, path.order
    if budget.kind == "macs":
        unit_cost: list[float] = [pair.unit_macs(path.seq_len) for pair in pairs]
        dense = dense_macs(pairs, path.seq_len)
    else:
        unit_cost = [pair.unit_params for pair in pairs]
        dense = pairs.prunable_params if budget.kind == "keep" else pairs.base.params
    costs = order.units @ np.array(unit_cost, dtype=np.float64)  # (E,)
    if budget.kind == "params":
        for i, pair in enumerate(pairs):
            if pair.name in path.fill:
                costs[np.flatnonzero(order.units[:, i])[0]] -= pair.fill_params
    sizes = np.rint(dense - np.concatenate([[0.0], np.cumsum(costs)]))

    absolute = isinstance(budget.value, Integral) and budget.kind != "keep"
    limit = budget.value if absolute else budget.value * dense
    if absolute and limit > dense:
        raise BudgetError(f"{budget} is more than the dense model's {dense:,}; ask for at most that")
    if limit < (smallest := sizes.min()):
        # Rounded up from a little more, so that the fraction times the dense size is enough in floating point.
        least = int(smallest) if absolute else min(1.0, math.ceil(smallest / dense * 1e4 + 1e-6) / 1e4)
        raise BudgetError(
            f"{budget} allows {limit:,.0f}, but the path's smallest model, with every pair removed, has "
            f"{smallest:,.0f} of {dense:,}; ask for {budget.kind}={least} or more"
        )
    removals = int(np.argmax(sizes <= limit))
    selection = Selection(
        pairs,
        order.keep(removals),
        budget,
        removals,
        path.seq_len,
        path.fill,
        path.basis,
        centre=path.centre,
        covariance=path.covariance,
        delta=path.delta,
    )
    gone = 1 - selection.fraction
    return replace(
        selection,
        scale={name: 1 + gone * slope for name, slope in path.slope.items()},
        output={
            name: np.stack([1 + gone * gain, gone * shift])
            for name, (gain, shift) in path.output.items()
            if not selection.keep[name].all()
        },
    )
