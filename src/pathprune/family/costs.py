"""What sizes cost: each kind of budget is a cost of every prefix of the order of removals.

A cost is a function of a ``Family`` that gives (E + 1,) numbers, the dense model's first. It need not be a sum over
units: a bias that appears with a pair's first removal, or a latency, is a cost like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pathprune.errors import BudgetError
from pathprune.family.order import Order
from pathprune.family.pair_list import PairList
from pathprune.family.pairs import Pair

Sizes = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Family:
    """All sizes of a model.

    Args:
        pairs: the pairs of the dense model.
        order: E removals.
        seq_len: sequence length, in tokens, at which MACs are counted.
        filled: names of the pairs that have a fill, whose consumers are given a bias.
        itemsize: bytes of a weight as it is saved; ``None`` is the dense model's.
    """

    pairs: PairList
    order: Order
    seq_len: int
    filled: frozenset[str] = frozenset()
    itemsize: int | None = None

    def less(self, dense: float, by_unit: Sequence[float], on_first: Sequence[float] | None = None) -> Sizes:
        """(E + 1,), ``dense`` less what leaves.

        Args:
            by_unit: (pairs,), what leaves with one unit.
            on_first: (pairs,), what is added when a filled pair loses its first units.
        """
        costs = self.order.units @ np.array(by_unit, dtype=np.float64)
        for i, added in enumerate(on_first or ()):
            if self.pairs[i].name in self.filled:
                costs[np.flatnonzero(self.order.units[:, i])[0]] -= added
        sizes: Sizes = np.rint(dense - np.concatenate([[0.0], np.cumsum(costs)]))
        return sizes


@dataclass(frozen=True)
class Cost:
    """One kind of budget.

    Args:
        sizes: (E + 1,) of a family; see the module.
        absolute: whether a limit may be an absolute number, too, and not only a share of the dense model's.
    """

    sizes: Callable[[Family], Sizes]
    absolute: bool = True


def _prunable(family: Family) -> Sizes:
    return family.less(family.pairs.prunable_params, [pair.unit_params for pair in family.pairs])


def _params(family: Family) -> Sizes:
    pairs = family.pairs
    return family.less(pairs.base.params, [p.unit_params for p in pairs], [p.fill_params for p in pairs])


def _macs(family: Family) -> Sizes:
    dense = dense_macs(family.pairs, family.seq_len)
    return family.less(dense, [pair.unit_macs(family.seq_len) for pair in family.pairs])


def _bytes(family: Family) -> Sizes:
    pairs, base = family.pairs, family.pairs.base
    if not base.bytes:
        raise BudgetError(
            "the path does not say how many bytes its model has, as it was written before paths did; search again, or "
            "ask for params="
        )
    size = family.itemsize or base.itemsize
    dense = base.bytes + base.params * (size - base.itemsize)
    return family.less(dense, [pair.unit_params * size for pair in pairs], [fill_bytes(pair, size) for pair in pairs])


def fill_bytes(pair: Pair, itemsize: int) -> int:
    """What a fill adds to a file: the bias of a consumer that had none, and its name in the header."""
    return pair.fill_params * itemsize + len(pair.consumer.module) + BIAS_ENTRY if pair.fill_params else 0


BIAS_ENTRY = 120  # bytes that a tensor takes in a safetensors header beside its name, at the most

KEEP, PARAMS, MACS, BYTES = Cost(_prunable, absolute=False), Cost(_params), Cost(_macs), Cost(_bytes)


def dense_macs(pairs: PairList, seq_len: int) -> int:
    """Multiply-accumulates of the dense model per token: its linear maps, and attention over ``seq_len`` keys."""
    attention = sum(pair.groups * pair.units * pair.unit_attention_macs(seq_len) for pair in pairs)
    return round(pairs.base.macs_per_token + pairs.base.macs_per_sequence / seq_len + attention)
