"""Recover every size at once: one training run over shared weights, of which every size is a prefix.

The dense model's units are sorted by importance (``transform.sorting``). A copy then learns to imitate the dense model
while it is masked as the family would ship it, at another size in each step. What it learns is what the parameters
move by, the more the smaller the size (``transform.delta``): sizes want different learning rates, and the dense model
stays as it is. The fills and slopes of the path are trained beside it.

(Training nested networks in one set of weights: slimmable networks, Yu et al., ICLR 2019; MatFormer, Devvrit et al.,
NeurIPS 2024. Weights on a line between two models: Wortsman et al., CVPR 2022.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from pathprune.data.batches import Batches
from pathprune.errors import SettingError
from pathprune.family.budget import Budget
from pathprune.family.learned import LEARNED, at_sparsity
from pathprune.family.path import SolutionPath
from pathprune.family.selection import Selection
from pathprune.model.contexts import M, evaluating
from pathprune.objectives.base import Objective
from pathprune.objectives.targets import Targets
from pathprune.ranking.dynamics import GOLDEN
from pathprune.recovery.training import distill, trainable, warn_of_nothing
from pathprune.transform.delta import moved
from pathprune.transform.masks import attach_masks
from pathprune.transform.reconstruction import compensators
from pathprune.transform.sorting import rebased, sort_units
from pathprune.types import Floats

MEASURED = (0.0625, 0.375, 0.6875)  # of the way from the smallest size to the dense model
BESIDE_LR = 0.01  # peak, of slopes, and of fills in their own mean size


def elastic(
    model: M,
    path: SolutionPath,
    data: Iterable[Mapping[str, Tensor]],
    *,
    steps: int = 1000,
    lr: float = 3e-4,
    objective: str | Objective = "auto",
    lowest: float = 0.2,
    seed: int = 0,
    bf16: bool = False,
    teacher: Targets | None = None,
    validation: Iterable[Mapping[str, Tensor]] | None = None,
    progress: bool | None = None,
) -> tuple[M, SolutionPath]:
    """The dense model with its units sorted, and a path over it of which every size is recovered.

    Samples are held back as in ``recover``. What comes back was best on them, over three sizes none of which may be
    worse than at the start; the figures are in ``path.config["held_out"]``.

    Both saved into one folder (``save_pretrained``, ``SolutionPath.save``) are a dense checkpoint that plain
    ``from_pretrained`` reads, and from which ``load_slice`` reads any size. ``model`` is untouched. Where ``path`` is
    one that came from here, training goes on.

    Args:
        model: dense; the teacher, too.
        path: found in ``model``.
        data: re-iterable of model-input dicts.
        steps: batches to train on, for all sizes together.
        lr: peak learning rate of the deltas, of which a size that keeps r adds 1 - r.
        objective: what is imitated, as in ``recover``.
        lowest: smallest share of the prunable parameters that is trained; sizes are drawn from there to 1.
        seed: of everything random.
        bf16: multiply matrices in bfloat16, weights staying as they are: twice as fast where the hardware can.
        teacher: the dense model's remembered outputs, where they are needed again; its objective counts.
        validation: see ``recover``.
        progress: show a bar; by default only on a terminal.

    Raises:
        MismatchError: the path belongs to another model.
        SettingError: a setting is out of range.
        DataError: empty data or one sample alone, wrong keys, or a loss that is not finite.

    Example:
        >>> trained, elastic_path = pp.elastic(model, path, batches, steps=4)
        >>> half = pp.slice_model(trained, elastic_path.select(pp.Budget(keep=0.5)))
    """
    if not 0 < lowest < 1:
        raise SettingError(f"lowest={lowest} must lie between 0 and 1: it is the smallest share of parameters to train")
    batches = Batches(model, data)
    ordered, path = sort_units(model, path)
    student, sizes = _Student(ordered, path), Sizes(path, lowest, batches.device)

    def visit(step: int) -> None:
        student.sparsity = sizes.visit(step).sparsity

    levels = [lowest + (1 - lowest) * share for share in MEASURED]
    told = compensators(path.centre, path.covariance, batches.device)
    masks = attach_masks(ordered, path.pairs, sizes.masks, sizes.fills, told=told, outputs=sizes.outputs)
    beside = [*sizes.slope.values(), *sizes.shift.values()]

    def size(level: float) -> Callable[[], None]:
        def there() -> None:
            student.sparsity = sizes.at(level).sparsity

        return there

    with evaluating(model if teacher is None else teacher.teacher), evaluating(student), masks:
        outcome = distill(
            student,
            teacher or model,
            batches,
            progress=progress,
            steps=steps,
            lr=lr,
            gone=1.0,
            objective=objective,
            seed=seed,
            bf16=bf16,
            validation=None if validation is None else Batches(model, validation),
            trained=list(student.deltas),
            beside=beside,
            beside_lr=BESIDE_LR,
            before=visit,
            sizes=[size(level) for level in levels],
        )
    warn_of_nothing(outcome)
    measured = {
        "samples": outcome.samples,
        "levels": levels,
        "before": list(outcome.before),
        "after": list(outcome.after),
    }
    found = replace(sizes.path(), delta=student.delta(), config={**path.config, "held_out": measured})
    return ordered, rebased(found, ordered)


class _Student(nn.Module):
    """A model at the size that a step visits, and what is trained of it.

    Attributes:
        sparsity: of that size, by which it adds the deltas.
        deltas: in 32 bits, of all parameters but the embedding tables.
    """

    def __init__(self, model: nn.Module, path: SolutionPath) -> None:
        super().__init__()
        self.model, self.sparsity = model, 0.0
        ids = {id(parameter) for parameter in trainable(model)}
        self.of = {name: parameter for name, parameter in model.named_parameters() if id(parameter) in ids}
        self.deltas = nn.ParameterList()
        for name, parameter in self.of.items():
            start = torch.from_numpy(path.delta[name]) if name in path.delta else torch.zeros(parameter.shape)
            self.deltas.append(nn.Parameter(start.to(parameter.device, torch.float32)))

    def forward(self, **batch: Tensor) -> Any:
        deltas = zip(self.of.values(), self.deltas, strict=True)
        here = {id(parameter): moved(parameter, delta, self.sparsity) for parameter, delta in deltas}
        held = [
            (module._parameters, key, parameter)
            for module in self.model.modules()
            for key, parameter in module._parameters.items()
            if id(parameter) in here
        ]
        try:
            # torch.func.functional_call leaves such tensors in a module that the model holds under two names.
            for parameters, key, parameter in held:
                parameters[key] = here[id(parameter)]  # type: ignore[assignment]
            return self.model(**batch)
        finally:
            for parameters, key, parameter in held:
                parameters[key] = parameter

    def delta(self) -> dict[str, Floats]:
        """By parameter, as a path has them."""
        return {name: delta.detach().cpu().numpy() for name, delta in zip(self.of, self.deltas, strict=True)}


class Sizes:
    """The mask of the size that a step visits, and what is trained of it.

    Attributes:
        masks: pair name -> (G, U), as ``Selection.mask`` has it.
        fills: pair name -> (G, D).
        outputs: pair name -> (2, d), as ``Selection.output`` has it, of the pairs that lose units.
        slope, shift: pair name -> (G, U), trained; a fill is where it was, plus its mean size times its shift.
    """

    def __init__(self, path: SolutionPath, lowest: float, device: torch.device) -> None:
        self.start, self.lowest, self.device = path, lowest, device
        self.masks: dict[str, Tensor] = {}
        self.fills: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        self.mean = {name: torch.from_numpy(array).to(device) for name, array in path.fill.items()}
        self.shift = {name: torch.zeros_like(mean).requires_grad_() for name, mean in self.mean.items()}
        self.slope = {name: torch.tensor(array, device=device).requires_grad_() for name, array in path.slope.items()}

    def visit(self, step: int) -> Selection:
        """Put those of a step's size in place."""
        return self.at(self.lowest + (1 - self.lowest) * ((0.5 + GOLDEN * step) % 1))

    def at(self, level: float) -> Selection:
        """Put the masks and fills of a size in place."""
        selection = self.start.select(Budget(keep=level))
        self.outputs.clear()
        self.outputs.update({name: torch.from_numpy(part).to(self.device) for name, part in selection.output.items()})
        for pair in self.start.pairs:
            keep = selection.keep[pair.name]
            mask = torch.from_numpy(keep).to(self.device, torch.float32)
            if pair.name in self.slope and not keep.all():
                mask = mask * at_sparsity(LEARNED["slope"].dense, self.slope[pair.name], selection.sparsity)
            self.masks[pair.name] = mask
        self.fills.update(self._fill())
        return selection

    def _fill(self) -> dict[str, Tensor]:
        return {name: mean + mean.abs().mean() * self.shift[name] for name, mean in self.mean.items()}

    def path(self) -> SolutionPath:
        """The path with what was learned."""
        return replace(
            self.start,
            fill={name: fill.detach().cpu().numpy() for name, fill in self._fill().items()},
            slope={name: slope.detach().cpu().numpy() for name, slope in self.slope.items()},
        )
