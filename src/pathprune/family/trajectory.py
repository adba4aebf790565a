"""What a search did, step by step."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from pathprune.family.selection import same
from pathprune.types import Floats


@dataclass(frozen=True, eq=False)
class Trajectory:
    """What a search did, step by step, over S steps and P pairs.

    Args:
        loss: (S,), the objective at the mask that the step visited.
        level: (S,), fraction of the prunable parameters that the mask kept.
        gamma_l1: (S, P), L1 norm of Gamma by pair (SPP, figure 2).
    """

    loss: Floats = field(default_factory=lambda: np.zeros(0, np.float32))
    level: Floats = field(default_factory=lambda: np.zeros(0, np.float32))
    gamma_l1: Floats = field(default_factory=lambda: np.zeros((0, 0), np.float32))

    def __eq__(self, other: object) -> bool:
        return same(self, other) if isinstance(other, Trajectory) else NotImplemented

    def __hash__(self) -> int:
        return hash((np.shape(self.loss), np.shape(self.gamma_l1)))
