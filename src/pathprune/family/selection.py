"""An architecture on the path: which units stay, and what stands in for the others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pathprune.family.budget import Budget
from pathprune.family.costs import dense_macs, fill_bytes
from pathprune.family.pair_list import PairList
from pathprune.family.pairs import Pair


@dataclass(frozen=True, eq=False)
class Selection:
    """An architecture on the path: which units stay.

    Args:
        pairs: the pairs of the base model.
        keep: pair name -> (G, U) bool.
        fill: pair name -> (G, D), the constant that takes a removed dimension's place; it is
            folded into the consumer's bias when the model is sliced. Pairs without one are absent.
        basis: pair name -> (G, D, D), rotation of the pair's heads before units are counted
            (``pathprune.ranking.basis``). Pairs without one are absent.
        scale: pair name -> (G, U), what the activation of a unit that stays is multiplied by (its distance from
            the centre, else from the fill, where there is one); folded into the consumer's weights. Counts only
            where a pair loses units; 1 for pairs without one.
        output: pair name -> (2, d), what the consumer puts out is multiplied by the one and shifted by the other, where
            the pair loses units; folded into the consumer's weight and bias.
        centre, covariance: pair name -> (N,) and (N, N), N = G R D, of what the consumer reads, in the basis; what
            leaves is told from what stays by them (``transform.reconstruction``). Only pairs with a fill have them.
        delta: parameter name -> array of its shape; one minus the fraction kept of it is added
            (``pathprune.transform.delta``).
        budget: what was asked for.
        removals: how far along the path's order this selection lies.
        seq_len: sequence length, in tokens, at which ``macs`` is counted.

    Example:
        >>> half = path.select(pp.Budget(keep=0.5))
        >>> half.fraction <= 0.5
        True
        >>> heads, width = half.widths(path.pairs[0])
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
    def sparsity(self) -> float:
        """Fraction of the prunable parameters that leaves: 1 - ``fraction``."""
        return 1 - self.fraction

    @property
    def params(self) -> int:
        """Parameters of the whole sliced model, with the biases that fills need."""
        thinned = [pair for pair in self.pairs if not self.keep[pair.name].all()]
        biases = sum(pair.fill_params for pair in thinned if pair.name in self.fill)
        return self.pairs.base.params - self.pairs.prunable_params + self.pair_params + biases

    @property
    def bytes(self) -> int | None:
        """Bytes of the sliced model's weights on disk, in the precision that was searched, at the most; ``None`` where
        the path is of 0.1.0, which does not say what the dense model's are.
        """
        base = self.pairs.base
        if not base.bytes:
            return None
        thinned = [pair for pair in self.pairs if pair.name in self.fill and not self.keep[pair.name].all()]
        added = sum(fill_bytes(pair, base.itemsize) for pair in thinned)
        return base.bytes - (self.pairs.prunable_params - self.pair_params) * base.itemsize + added

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
