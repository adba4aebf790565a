"""All units of a model in one vector, and by pair."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pathprune.family.pair_list import PairList


class Units:
    """The N units of a model, pair after pair.

    Attributes:
        params: (N,), parameters that go with each.
        mlp: (N,), whether each is of an MLP.
    """

    def __init__(self, pairs: PairList) -> None:
        self.pairs = pairs
        self.sizes = [pair.groups * pair.units for pair in pairs]
        self.params = self.repeat([pair.unit_params for pair in pairs])
        self.mlp = self.repeat([pair.kind == "mlp" for pair in pairs])

    def __len__(self) -> int:
        return sum(self.sizes)

    def repeat(self, by_pair: Sequence[float]) -> Tensor:
        """(N,), from one number a pair."""
        return torch.tensor(by_pair).repeat_interleave(torch.tensor(self.sizes))

    def split(self, flat: Tensor) -> dict[str, Tensor]:
        """Pair name -> (..., G, U), from (..., N)."""
        parts = flat.split(self.sizes, dim=-1)
        return {pair.name: part.unflatten(-1, pair.shape) for pair, part in zip(self.pairs, parts, strict=True)}

    def join(self, parts: Mapping[str, Tensor]) -> Tensor:
        """(..., N), from pair name -> (..., G, U)."""
        return torch.cat([parts[pair.name].flatten(-2) for pair in self.pairs], dim=-1)

    def sums(self, flat: Tensor) -> list[float]:
        """Of every pair, from (N,)."""
        return [float(part.sum()) for part in flat.split(self.sizes)]
