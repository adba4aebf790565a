"""A package of somebody else's: an attention with names of its own, an objective, and a kind of budget."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pathprune.discovery.layouts.candidate import Candidate, linear_slot
from pathprune.family.costs import Cost, Family, Sizes
from pathprune.family.pairs import Pair


class Gaze(nn.Module):
    def __init__(self, size: int = 24, eyes: int = 3) -> None:
        super().__init__()
        self.eyes = eyes
        self.wants, self.offers, self.gives, self.joins = (nn.Linear(size, size) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        wants, offers, gives = (
            part(x).unflatten(-1, (self.eyes, -1)).transpose(1, 2) for part in (self.wants, self.offers, self.gives)
        )
        seen = (wants @ offers.mT / 3).softmax(-1) @ gives
        return self.joins(seen.transpose(1, 2).flatten(2))


class Reader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.gazes = nn.Embedding(30, 24), nn.ModuleList(Gaze() for _ in range(2))

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.table(input_ids)
        for gaze in self.gazes:
            x = x + gaze(x)
        return x


def find_gaze(model: nn.Module, name: str, module: nn.Module, order: Mapping[str, int]) -> Candidate | None:
    if not isinstance(module, Gaze):
        return None
    wants, offers, gives = (linear_slot(model, f"{name}.{part}") for part in ("wants", "offers", "gives"))
    joins = linear_slot(model, f"{name}.joins", side="in")
    groups, width = module.eyes, module.joins.in_features // module.eyes
    pairs = (
        Pair(f"{name}.qk", "qk", name, groups, width, (wants, offers)),
        Pair(f"{name}.vo", "vo", name, groups, width, (gives, joins)),
    )
    return Candidate(name, (pairs,))


class FirstToken:
    """Squared distance of the first token's vector."""

    name = "first-token"

    def target(self, outputs: Tensor, batch: Any) -> Tensor:
        return outputs[:, 0]

    def loss(self, outputs: Tensor, batch: Any, target: Tensor) -> Tensor:
        return (outputs[:, 0] - target).square().mean()

    def probe(self, outputs: Tensor, batch: Any, noise: torch.Generator) -> Tensor:
        return (outputs[:, 0] * torch.randn(outputs[:, 0].shape, generator=noise).to(outputs)).sum()


def first_token(model: nn.Module) -> FirstToken:
    return FirstToken()


def _widest(family: Family) -> Sizes:
    removed = np.cumsum(np.vstack([0 * family.order.units[:1], family.order.units]), axis=0)
    widths = np.array([pair.groups * pair.width for pair in family.pairs])
    per_unit = np.array([pair.dims_per_unit for pair in family.pairs])
    return (widths - removed * per_unit).max(axis=1).astype(np.float64)


WIDEST = Cost(_widest)  # the widest inner axis that is left: no sum over units


def export_numbers(model: Any, out: Any, *, source: Any) -> str:
    """The number of parameters, as a file."""
    Path(out).mkdir()
    (Path(out) / "numbers.txt").write_text(str(sum(parameter.numel() for parameter in model.parameters())))
    return f"cat {out}/numbers.txt"
