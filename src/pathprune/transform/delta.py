"""Deltas: what training has added to a model's parameters, more of it the smaller the size.

Where a fraction r of the prunable parameters is kept, a parameter is W + (1 - r) delta, the law by which all that is
learned follows the size (``pathprune.family.learned.at_sparsity``).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from pathprune.errors import MismatchError
from pathprune.family.learned import at_sparsity

if TYPE_CHECKING:
    from pathprune.family.selection import Selection


def moved(weight: Tensor, delta: Tensor, sparsity: float) -> Tensor:
    """``weight`` at a size, of its own dtype."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    return at_sparsity(weight.to(wide), delta.to(weight.device, wide), sparsity).to(weight.dtype)


@contextmanager
def at_size(model: nn.Module, selection: Selection) -> Iterator[None]:
    """The model with the parameters of a selection's size, until the context ends.

    Raises:
        MismatchError: the model has no such parameter, or one of another shape.
    """
    parameters = dict(model.named_parameters())
    for name, delta in selection.delta.items():
        if name not in parameters or parameters[name].shape != delta.shape:
            raise MismatchError(f"the path has a delta for {name} of shape {delta.shape}, which the model has not")
    before = {name: parameters[name].data for name in selection.delta}
    try:
        for name, delta in selection.delta.items():
            parameters[name].data = moved(before[name], torch.from_numpy(delta), selection.sparsity)
        yield
    finally:
        for name, data in before.items():
            parameters[name].data = data
