"""Least squares for the maps that read a thinned axis.

For each such map in forward order, regress the dense map's output on the kept inputs, taken from
the model as recovered so far, so that a later map also repairs what the earlier ones could not.
Tokens are weighted by the inverse norm of their target: a few tokens with massive activations
would own the fit otherwise. Solved in float64, with a ridge that pulls towards the sliced weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers.pytorch_utils import Conv1D

from pathprune.data import Batches
from pathprune.errors import DataError
from pathprune.slicing import Map, PaddedConv1D, PaddedLinear, features, is_map


class _Reached(Exception):
    """The forward pass has got as far as it is needed."""


def least_squares(
    student: nn.Module,
    teacher: nn.Module,
    batches: Batches,
    *,
    hidden: bool | None,
    count: int = 16,
    ridge: float = 1e-2,
) -> None:
    """Fit in place.

    Args:
        count: batches to read.
        ridge: pull towards the sliced weights, relative to the inputs' mean square.

    Raises:
        DataError: no linear map reads a thinned axis (where experts are stacked, say), or the
            activations are not finite.
    """
    read = batches.take(count)
    names = consumers(student, teacher)
    if not names:
        raise DataError(
            f"no linear map of the {type(student).__name__} reads fewer features than the dense model's, so "
            "method='closed-form' has nothing to fit; use method='distill'"
        )
    with torch.no_grad():
        for name in tqdm(names, desc="closed form", unit="map", disable=hidden):
            _fit(student, teacher, name, read, ridge)


def consumers(student: nn.Module, teacher: nn.Module) -> list[str]:
    """Linear maps of the student that read fewer features than the teacher's, in forward order."""
    return [
        name
        for name, module in student.named_modules()
        if is_map(module) and 0 < _inputs(module) < _inputs(teacher.get_submodule(name))
    ]


def _inputs(module: Any) -> int:
    return features(module)[0]


def _weight(module: Map) -> Tensor:
    """(out, in), a view."""
    return module.weight.mT if isinstance(module, Conv1D) else module.weight


def _fit(student: nn.Module, teacher: nn.Module, name: str, read: list[dict[str, Tensor]], ridge: float) -> None:
    module: Any = student.get_submodule(name)
    weight = _weight(module)
    biased = module.bias is not None
    start = torch.cat([weight, module.bias.unsqueeze(1)], 1) if biased else weight
    start = start.double().mT  # (in [+ 1], out)
    gram, cross = torch.zeros(start.shape[0], start.shape[0]).to(start), torch.zeros_like(start)
    for batch in read:
        x = _up_to(student, name, batch)[0]
        y = _up_to(teacher, name, batch)[1]
        x = (module.crop(x) if isinstance(module, PaddedLinear | PaddedConv1D) else x).double()
        if biased:
            x = torch.cat([x, torch.ones_like(x[..., :1])], -1)
        y = y.double()
        real = batch.get("attention_mask")
        if real is not None and real.shape == x.shape[:-1]:
            x, y = x[real.bool()], y[real.bool()]
        x, y = x.flatten(0, -2), y.flatten(0, -2)  # (tokens, in [+ 1]), (tokens, out)
        scale = 1 / y.norm(dim=1, keepdim=True).clamp_min(1e-6)
        x, y = x * scale, y * scale
        gram += x.mT @ x
        cross += x.mT @ y
    pull = ridge * gram.diagonal().mean() * torch.eye(len(gram)).to(gram)
    solution = torch.linalg.solve(gram + pull, cross + pull @ start)  # (in [+ 1], out)
    if not torch.isfinite(solution).all():
        raise DataError(f"the least squares of {name} have no finite solution; check the data, or load in float32")
    weight.copy_(solution[: _inputs(module)].mT)
    if biased:
        module.bias.copy_(solution[-1])


def _up_to(model: nn.Module, name: str, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Input and output of one map; the rest of the forward pass is not run."""
    seen: list[Tensor] = []

    def stop(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        seen.extend((args[0], output))
        raise _Reached

    handle = model.get_submodule(name).register_forward_hook(stop)
    try:
        model(**batch)
    except _Reached:
        pass
    finally:
        handle.remove()
    return seen[0], seen[1]
