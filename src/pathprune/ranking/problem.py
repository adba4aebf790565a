"""What a search is of: a model, its pairs, data, an objective, and how all that is set up."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pathprune.data.batches import Batches
from pathprune.discovery.discover import find_pairs
from pathprune.family.budget import Budget
from pathprune.family.pair_list import PairList
from pathprune.family.path import SolutionPath
from pathprune.model.contexts import caching, eager, evaluating, mixed
from pathprune.objectives.base import Objective
from pathprune.objectives.choose import get_objective
from pathprune.objectives.targets import Targets
from pathprune.ranking.config import SearchConfig
from pathprune.ranking.dynamics import Visited
from pathprune.ranking.units import Units


class Problem:
    """A model, and what its units are to be ranked by.

    Attributes:
        config: with what goes by the objective and the data filled in.
        data: what tells the data from others.
        seq_len: tokens that a path counts MACs at.
        targets: the dense model's outputs, remembered.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Iterable[Mapping[str, Tensor]],
        config: SearchConfig,
        objective: str | Objective,
    ) -> None:
        self.model, self.batches = model, Batches(model, data)
        self.objective = get_objective(objective, model, self.batches.first)
        self.config = config.suited(self.objective, self.batches.first)
        self.pairs = find_pairs(model, self.batches.first)
        self.units = Units(self.pairs)
        self.data = _identity(self.batches)
        self.targets = Targets(model, self.objective)
        with evaluating(model), caching(model, False):
            self.seq_len = _tokens(model, self.pairs, self.batches.first)

    def precision(self) -> AbstractContextManager[None]:
        """That of the steps."""
        return mixed(self.model, self.config.bf16)

    def path(self, ranking: Tensor, slope: Tensor, **rest: Any) -> SolutionPath:
        """The family of a ranking (N,), whose units are scaled by a slope (N,)."""
        scalable = {pair.name for pair in self.pairs if pair.scalable}
        return SolutionPath(
            self.pairs,
            {name: part.numpy() for name, part in self.units.split(ranking).items()},
            slope={name: part.numpy() for name, part in self.units.split(slope).items() if name in scalable},
            unit=self.config.unit,
            multiple=self.config.multiple,
            seq_len=self.seq_len,
            **rest,
        )

    def member(self, ranking: Tensor, slope: Tensor, density: float) -> Visited:
        """What the family would ship at a density."""
        path = self.path(ranking, slope)
        selection = path.select(Budget(keep=density))
        mask = self.units.join({pair.name: torch.from_numpy(selection.mask(pair)) for pair in self.pairs}).float()
        keeps = {pair: selection.keep[pair.name] for pair in self.pairs}
        scaled = {pair.name: torch.from_numpy(keep & pair.scalable & ~keep.all()) for pair, keep in keeps.items()}
        value = path.order.value
        threshold = float(value[min(selection.removals, len(value) - 1)])
        return Visited(
            mask, density, selection.sparsity, selection.sparsity * self.units.join(scaled).float(), threshold
        )


def _identity(batches: Batches) -> dict[str, Any]:
    """What tells a search's data from others: their first batch, and how many there are where that is known."""
    data: Any = batches.data
    try:
        count = len(data)
    except TypeError:  # an iterable without a length
        count = None
    return {"first": Targets.key(batches.first).hex(), "batches": count}


def _tokens(model: nn.Module, pairs: PairList, batch: Mapping[str, Tensor]) -> int:
    """Length of the sequences that the first attention layer (or MLP) sees: of text, image patches or audio frames."""
    lengths: list[int] = []
    pair = next((pair for pair in pairs if pair.kind != "mlp"), pairs[0])
    module = model.get_submodule(pair.mask_slot.module)
    handle = module.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[-2]))
    try:
        with torch.no_grad(), eager(model):
            model(**batch)
    finally:
        handle.remove()
    return lengths[0]


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No gradients for weights, no dropout, no cache of keys and values; all come back afterwards."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        with caching(model, False), evaluating(model):
            yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
