"""Deltas: what training has added to a model's parameters, more of it the smaller the size.

Where a fraction r of the prunable parameters is kept, a parameter is W + (1 - r) delta, the law by which all that is
learned follows the size (``pathprune.family.learned.at_sparsity``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from pathprune.errors import MismatchError
from pathprune.family.learned import at_sparsity
from pathprune.family.selection import Selection
from pathprune.transform.weights import TensorWeights, WeightSource
from pathprune.types import Ints


def moved(weight: Tensor, delta: Tensor, sparsity: float) -> Tensor:
    """``weight`` at a size, of its own dtype."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    return at_sparsity(weight.to(wide), delta.to(weight.device, wide), sparsity).to(weight.dtype)


class WeightsAtSize:
    """The weights of a size, of which no more is ever moved than is asked for.

    Args:
        dense: those of the dense model.
        deltas: by the same names, where there are some.
    """

    def __init__(self, dense: WeightSource, deltas: WeightSource, sparsity: float) -> None:
        self.dense, self.deltas, self.sparsity = dense, deltas, sparsity
        self.names, self.shape = dense.names, dense.shape

    def read(self, name: str, dim: int, indices: Ints) -> Tensor:
        weight = self.dense.read(name, dim, indices)
        if name not in self.deltas.names:
            return weight
        return moved(weight, self.deltas.read(name, dim, indices), self.sparsity)

    def whole(self, name: str) -> Tensor:
        weight = self.dense.whole(name)
        return moved(weight, self.deltas.whole(name), self.sparsity) if name in self.deltas.names else weight


def check_deltas(model: nn.Module, shapes: Mapping[str, Sequence[int]]) -> None:
    """Hold the shapes of a path's deltas, by parameter, against the model.

    Raises:
        MismatchError: the model has no such parameter, or one of another shape.
    """
    parameters = dict(model.named_parameters())
    for name, shape in shapes.items():
        if name not in parameters or tuple(parameters[name].shape) != tuple(shape):
            raise MismatchError(f"the path has a delta for {name} of shape {tuple(shape)}, which the model has not")


def weights_at(model: nn.Module, selection: Selection) -> WeightSource:
    """A model's own weights, at the size of a selection.

    Raises:
        MismatchError: see ``check_deltas``.
    """
    check_deltas(model, {name: delta.shape for name, delta in selection.delta.items()})
    parameters = dict(model.named_parameters())
    first = {id(parameter): name for name, parameter in parameters.items()}  # a delta goes by this one of its names
    deltas = {
        name: torch.from_numpy(selection.delta[first[id(parameter)]])
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if first[id(parameter)] in selection.delta
    }

    def weight(name: str) -> Tensor:
        owner, _, attribute = name.rpartition(".")
        found: Tensor = getattr(model.get_submodule(owner), attribute)
        return found

    dense = TensorWeights(parameters, weight)
    return WeightsAtSize(dense, TensorWeights(deltas, deltas.__getitem__), selection.sparsity) if deltas else dense


@contextmanager
def at_size(model: nn.Module, selection: Selection) -> Iterator[None]:
    """The model with the parameters of a selection's size, until the context ends.

    Raises:
        MismatchError: see ``check_deltas``.
    """
    weights = weights_at(model, selection)
    parameters = {name: model.get_parameter(name) for name in selection.delta}
    before = {name: parameter.data for name, parameter in parameters.items()}
    try:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.data = weights.whole(name)
        yield
    finally:
        for name, data in before.items():
            parameters[name].data = data
