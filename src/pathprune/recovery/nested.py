"""Recover every size at once: one training run over shared weights, of which every size is a prefix.

The dense model's units are sorted by importance (``pathprune.sorting``). A copy then learns to imitate the dense model
while it is masked as the family would ship it, at another size in each step. The fills and slopes of the path, by
which sizes differ beside the units that they keep, are trained with the weights.

(Training nested networks in one set of weights: slimmable networks, Yu et al., ICLR 2019; MatFormer, Devvrit et al.,
NeurIPS 2024.)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from pathprune.budget import Budget
from pathprune.compensation import compensators
from pathprune.data import Batches
from pathprune.dynamics import GOLDEN
from pathprune.errors import DataError
from pathprune.masks import attach_masks
from pathprune.modes import evaluating
from pathprune.objectives import Objective, Targets
from pathprune.path import SolutionPath
from pathprune.recovery.distill import imitate
from pathprune.sorting import rebased, sort_units

BESIDE_LR = 0.01  # peak, of slopes, and of fills in their own mean size


def elastic(
    model: nn.Module,
    path: SolutionPath,
    *,
    data: Iterable[Mapping[str, Tensor]],
    steps: int = 1000,
    lr: float = 1.5e-4,
    objective: str | Objective = "auto",
    lowest: float = 0.2,
    seed: int = 0,
    bf16: bool = False,
    teacher: Targets | None = None,
    progress: bool | None = None,
) -> tuple[nn.Module, SolutionPath]:
    """A model of the dense one's shapes of which every size of the path is recovered, and the path over it.

    Both saved into one folder (``save_pretrained``, ``SolutionPath.save``) are a dense checkpoint that plain
    ``from_pretrained`` reads, and from which ``load_slice`` reads any size. ``model`` is untouched.

    Args:
        model: dense; the teacher, too.
        path: found in ``model``.
        data: re-iterable of model-input dicts.
        steps: batches to train on, for all sizes together.
        lr: peak learning rate. A higher one helps small sizes and harms large ones (``docs/elastic.md``).
        objective: what is imitated, as in ``recover``.
        lowest: smallest share of the prunable parameters that is trained; sizes are drawn from there to 1.
        seed: of everything random.
        bf16: multiply matrices in bfloat16, weights staying as they are: twice as fast where the hardware can.
        teacher: the dense model's remembered outputs, where they are needed again; its objective counts.
        progress: show a bar; by default only on a terminal.

    Raises:
        MismatchError: the path belongs to another model.
        DataError: a bad setting, empty data, wrong keys, or a loss that is not finite.
    """
    if not 0 < lowest < 1:
        raise DataError(f"lowest={lowest} must lie between 0 and 1: it is the smallest share of parameters to train")
    batches = Batches(model, data)
    student, path = sort_units(model, path)
    sizes = _Sizes(path, lowest, batches.device)
    hidden = None if progress is None else not progress
    told = compensators(path.centre, path.covariance, batches.device)
    masks = attach_masks(student, path.pairs, sizes.masks, sizes.fills, told=told)
    with evaluating(model), evaluating(student), masks:
        imitate(
            student,
            teacher or model,
            batches,
            hidden=hidden,
            steps=steps,
            lr=lr,
            objective=objective,
            seed=seed,
            bf16=bf16,
            beside=[*sizes.slope.values(), *sizes.shift.values()],
            beside_lr=BESIDE_LR,
            before=sizes.visit,
        )
    return student, rebased(sizes.path(), student)


class _Sizes:
    """The mask of the size that a step visits, and what is trained of it.

    Attributes:
        masks: pair name -> (G, U), as ``Selection.mask`` has it.
        fills: pair name -> (G, D).
        slope, shift: pair name -> (G, U), trained; a fill is where it was, plus its mean size times its shift.
    """

    def __init__(self, path: SolutionPath, lowest: float, device: torch.device) -> None:
        self.start, self.lowest, self.device = path, lowest, device
        self.masks: dict[str, Tensor] = {}
        self.fills: dict[str, Tensor] = {}
        self.mean = {name: torch.from_numpy(array).to(device) for name, array in path.fill.items()}
        self.shift = {name: torch.zeros_like(mean).requires_grad_() for name, mean in self.mean.items()}
        self.slope = {name: torch.tensor(array, device=device).requires_grad_() for name, array in path.slope.items()}

    def visit(self, step: int) -> float:
        """Put the masks and fills of a step's size in place; returns the size."""
        level = self.lowest + (1 - self.lowest) * ((0.5 + GOLDEN * step) % 1)
        selection = self.start.select(Budget(keep=level))
        for pair in self.start.pairs:
            keep = selection.keep[pair.name]
            mask = torch.from_numpy(keep).to(self.device, torch.float32)
            if pair.name in self.slope and not keep.all():
                mask = mask * (1 + (1 - selection.fraction) * self.slope[pair.name])
            self.masks[pair.name] = mask
        self.fills.update(self._fill())
        return level

    def _fill(self) -> dict[str, Tensor]:
        return {name: mean + mean.abs().mean() * self.shift[name] for name, mean in self.mean.items()}

    def path(self) -> SolutionPath:
        """The path with what was learned."""
        return replace(
            self.start,
            fill={name: fill.detach().cpu().numpy() for name, fill in self._fill().items()},
            slope={name: slope.detach().cpu().numpy() for name, slope in self.slope.items()},
        )
