"""What an objective must offer."""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
from torch import Tensor

from pathprune.model.outputs import Batch, samples


class Objective(Protocol):
    """Three functions of a model's outputs.

    Example:
        >>> class FirstToken:
        ...     def target(self, outputs, batch):
        ...         return outputs.last_hidden_state[:, 0]
        ...     def loss(self, outputs, batch, target):
        ...         return (outputs.last_hidden_state[:, 0] - target).square().mean()
        ...     def probe(self, outputs, batch, noise):
        ...         first = outputs.last_hidden_state[:, 0]
        ...         return (first * torch.randn(first.shape, generator=noise)).sum()
        >>> own = pp.search(model, batches, objective=FirstToken(), steps=20)
    """

    def target(self, outputs: Any, batch: Batch) -> Tensor:
        """What is kept of the dense model's outputs."""

    def loss(self, outputs: Any, batch: Batch, target: Tensor) -> Tensor:
        """Mean distance to the target, a scalar; zero at the dense model."""

    def probe(self, outputs: Any, batch: Batch, noise: torch.Generator) -> Tensor:
        """A random scalar, a sum over the batch's B samples. The square of its gradient in one sample's
        masks, averaged over samples and noise, is the diagonal of the loss's Gauss-Newton matrix
        J^T H J at the dense model, with J the outputs' Jacobian and H the loss's Hessian in the outputs.
        """


def to_float(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def noisy_sum(rows: Tensor, batch: Batch, noise: torch.Generator, scale: Tensor | float = 1.0) -> Tensor:
    """Sum of (R, d) rows times N(0, 1) noise. The loss is a mean over rows, the probe's square one over samples:
    hence sqrt(B / R).
    """
    xi = torch.randn(rows.shape, generator=noise).to(rows)
    return (rows * xi * scale).sum() * math.sqrt(samples(batch) / len(rows))
