"""What a search measures of the dense model before its first update, and keeps: bases, means, spreads, covariances."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from pathprune.ranking.basis import Calibration
from pathprune.ranking.units import Units
from pathprune.types import Floats


@dataclass(frozen=True)
class Statistics:
    """Bases and spreads, the first two moments of what consumers read, and the arrays of a path that go by them.

    Args:
        centre: pair name -> (N,), where what is removed is reconstructed.
        covariance: pair name -> (N, N), of the same pairs.
    """

    units: Units
    calibration: Calibration
    centre: dict[str, Floats] = field(default_factory=dict)
    covariance: dict[str, Floats] = field(default_factory=dict)

    def fill(self, deviation: Tensor) -> dict[str, Tensor]:
        """Pair name -> (G, D), the constants of all pairs that take one, from (N,) standard deviations."""
        mean, std = self.calibration.mean, self.calibration.std
        return {
            name: torch.from_numpy(mean[name]).to(part) + torch.from_numpy(std[name]).to(part) * part
            for name, part in self.units.split(deviation).items()
            if name in mean
        }

    @property
    def spreads(self) -> dict[str, Floats]:
        """Pair name -> (d,), of the outputs that are scaled and shifted, in the order in which they are held."""
        out = self.calibration.out
        return {pair.name: out[pair.name] for pair in self.units.pairs if pair.name in out}

    def output(self, flat: Tensor) -> dict[str, Tensor]:
        """Pair name -> (2, d), as a path has it, from (2, M)."""
        spreads = self.spreads
        parts = flat.split([len(spread) for spread in spreads.values()], dim=1)
        return {
            name: torch.stack([gain, torch.from_numpy(spread).to(shift) * shift])
            for (name, spread), (gain, shift) in zip(spreads.items(), parts, strict=True)
        }
