"""What every method is given, and the few things that most of them need.

A *score* is a tensor (G, U) for each pair, by name, in the notation of ``family.pairs``; *flat* tensors hold the
N units of all pairs in a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor, nn

import pathprune as pp
from pathprune.data.batches import Batch
from pathprune.family.order import Unit
from pathprune.family.pairs import Pair, Slot
from pathprune.model.linear import linear_map
from pathprune.model.outputs import samples
from pathprune.objectives.base import Objective
from pathprune.objectives.targets import Targets
from pathprune.ranking.config import SearchConfig
from pathprune.transform.folding import axis_first
from pathprune.transform.masks import attach_masks

Scores = Mapping[str, Tensor]

# A method returns a path, which holds every size, or a function that makes one size when it is asked for it.
OneSize = Callable[[float], "pp.Selection | nn.Module"]


@dataclass(frozen=True)
class Problem:
    """One model to prune, on one seed's data.

    Args:
        model: dense, to search on: in eval mode, its weights frozen.
        dense: the same in float32, to slice.
        pairs: of the model.
        batches: unlabelled, the same for every method.
        objective: distance from the dense model's outputs.
        steps: forward-backward passes that a method may take, for each size if it makes one at a time.
        seed: of everything random.
        settings: of ``pathprune.SearchConfig``, for our own search only.
    """

    model: nn.Module
    dense: nn.Module
    pairs: pp.PairList
    batches: list[Batch]
    objective: Objective
    steps: int
    seed: int
    settings: Mapping[str, Any]

    @property
    def device(self) -> torch.device:
        """Of the models and the batches; scores are on the CPU."""
        return next(self.model.parameters()).device

    @property
    def sizes(self) -> list[int]:
        """Units of every pair."""
        return [pair.groups * pair.units for pair in self.pairs]

    @property
    def costs(self) -> Tensor:
        """(N,), parameters of every unit."""
        return torch.tensor([pair.unit_params for pair in self.pairs]).repeat_interleave(torch.tensor(self.sizes))

    def passes(self, count: int) -> Iterator[Batch]:
        """That many batches, going round the data."""
        return islice(cycle(self.batches), count)

    def split(self, flat: Tensor) -> dict[str, Tensor]:
        """From (..., N) to scores."""
        parts = flat.split(self.sizes, dim=-1)
        return {pair.name: part.unflatten(-1, pair.shape) for pair, part in zip(self.pairs, parts, strict=True)}

    def path(self, scores: Scores, *, unit: Unit = "mixed", fill: Scores | None = None) -> pp.SolutionPath:
        """The family of a ranking, by our rectangle rule, in widths that are multiples of what ours are."""
        multiple = self.settings.get("multiple", SearchConfig().multiple)
        path = pp.SolutionPath.from_scores(self.pairs, scores, unit=unit, multiple=multiple)
        return path if fill is None else replace(path, fill={name: part.numpy() for name, part in fill.items()})

    def per_cost(self, flat: Tensor) -> dict[str, Tensor]:
        """Scores by gain per parameter."""
        return self.split(flat / self.costs)


def weights(problem: Problem, pair: Pair, slot: Slot) -> Tensor:
    """The rows or columns of a map that belong to the pair's inner dimensions, (G, R, D, features)."""
    module = linear_map(problem.dense, slot.module)
    index = torch.from_numpy(slot.index(pair.groups, pair.width))
    return axis_first(module.weight.detach().cpu(), module, slot.side)[index]


def by_unit(pair: Pair, by_dim: Tensor) -> Tensor:
    """Sums over the dimensions of each unit, from (..., D) to (..., U)."""
    out = by_dim.new_zeros(*by_dim.shape[:-1], pair.units)
    return out.index_add(-1, torch.tensor(pair.unit_of), by_dim)


def moments(problem: Problem) -> dict[tuple[str, Slot], tuple[Tensor, Tensor]]:
    """Mean and mean square over the real tokens of one pass over the data, (G, R, D) each, in float64.

    Of the consumer's input, and for ``qk`` of both maps' outputs; by (pair name, slot).
    """
    sums: dict[tuple[str, Slot], list[Any]] = {}
    real: list[Tensor | None] = [None]

    def gather(pair: Pair, slot: Slot) -> Any:
        total = sums.setdefault((pair.name, slot), [0, 0, 0])

        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor | None = None) -> None:
            y = (args[0] if output is None else output).detach()
            y = y[real[0]] if real[0] is not None and real[0].shape == y.shape[:-1] else y.flatten(0, -2)
            y = y.double()
            for i, part in enumerate((len(y), y.sum(0), y.square().sum(0))):
                total[i] = total[i] + part

        return hook

    handles = []
    try:
        for pair in problem.pairs:
            for slot in pair.slots if pair.kind == "qk" else (pair.consumer,):
                module, hook = problem.model.get_submodule(slot.module), gather(pair, slot)
                register = module.register_forward_hook if slot.side == "out" else module.register_forward_pre_hook
                handles.append(register(hook))
        with torch.no_grad():
            for batch in problem.batches:
                mask = batch.get("attention_mask")
                real[0] = None if mask is None else mask.bool()
                problem.model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    found = {}
    for pair in problem.pairs:
        for slot in pair.slots:
            if (pair.name, slot) in sums:
                count, first, second = sums[pair.name, slot]
                index = torch.from_numpy(slot.index(pair.groups, pair.width))
                found[pair.name, slot] = (first.cpu()[index] / count, second.cpu()[index] / count)
    return found


def probes(problem: Problem, count: int | None = None) -> Tensor:
    """(samples, N), every sample's gradient of the objective's random probe in its masks, at the dense model.

    The objective's own gradient is zero there, because nothing has been removed. The probe's mean square is the
    diagonal of the objective's Gauss-Newton matrix, its Fisher information (``pathprune.objectives.choose``).

    Args:
        count: batches; by default all, once. (On MiniLM, 100 passes over 40 batches ranked no better than 40.)
    """
    noise = torch.Generator().manual_seed(problem.seed)
    masks: dict[str, Tensor] = {}
    rows = []
    with attach_masks(problem.model, problem.pairs, masks):
        for batch in problem.batches if count is None else problem.passes(count):
            ones = torch.ones(samples(batch), sum(problem.sizes), device=problem.device, requires_grad=True)
            masks.update(problem.split(ones))
            value = problem.objective.probe(problem.model(**batch), batch, noise)
            rows.append(torch.autograd.grad(value, ones)[0].float().cpu())
    return torch.cat(rows)


@contextmanager
def mask_gradients(problem: Problem, targets: Targets) -> Iterator[Callable[[Tensor, Batch], Tensor]]:
    """A function from masks (N,) and a batch to the gradient of the objective in the masks, (N,).

    Args:
        targets: the dense model's outputs, remembered for all sizes.
    """
    masks: dict[str, Tensor] = {}
    with attach_masks(problem.model, problem.pairs, masks):

        def gradient(mask: Tensor, batch: Batch) -> Tensor:
            masks.clear()
            target = targets(batch)
            leaf = mask.detach().clone().requires_grad_()
            masks.update(problem.split(leaf.to(problem.device)))
            loss = problem.objective.loss(problem.model(**batch), batch, target)
            return torch.autograd.grad(loss, leaf)[0].float()

        yield gradient
