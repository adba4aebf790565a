"""Where slicing reads weights from: a model in memory here, safetensors files in ``pathprune.checkpoint.tensors``."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Protocol

import torch
from torch import Tensor

from pathprune.types import Ints


class WeightSource(Protocol):
    """The weights of a model, by name. What it gives may be its own memory, which is not to be written to."""

    @property
    def names(self) -> Collection[str]:
        """Of all tensors; of those that are tied, one."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor."""

    def read(self, name: str, dim: int, indices: Ints) -> Tensor:
        """What is at some indices (K,) of a dimension, and nothing else; (experts, K) of stacked maps, by expert."""

    def whole(self, name: str) -> Tensor:
        """All of a tensor."""


class TensorWeights:
    """Tensors in memory.

    Args:
        tensor: gives the one of a name.
    """

    def __init__(self, names: Collection[str], tensor: Callable[[str], Tensor]) -> None:
        self.names, self.whole = names, tensor

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.whole(name).shape)

    def read(self, name: str, dim: int, indices: Ints) -> Tensor:
        tensor = self.whole(name)
        where = torch.from_numpy(indices).to(tensor.device)
        if where.dim() == 1:
            return tensor.index_select(dim, where)
        return torch.take_along_dim(tensor, where.unsqueeze(3 - dim) if tensor.dim() == 3 else where, dim)
