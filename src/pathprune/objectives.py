"""What a search or a recovery minimises: the distance of a model's outputs from the dense model's.

No labels are needed. An objective sees a model's outputs and the batch they came from.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pathprune.errors import DataError

Batch = Mapping[str, Tensor]

TARGET_CACHE_BYTES = 2**30


class Objective(Protocol):
    """Three functions of a model's outputs."""

    def target(self, outputs: Any, batch: Batch) -> Tensor:
        """What is kept of the dense model's outputs, (B, ...)."""

    def loss(self, outputs: Any, batch: Batch, target: Tensor) -> Tensor:
        """Mean distance to the target, a scalar; zero at the dense model."""

    def probe(self, outputs: Any, batch: Batch, noise: torch.Generator) -> Tensor:
        """A random scalar summed over samples: the expected square of each sample's gradient is
        the diagonal of the loss's Gauss-Newton curvature at the dense model.
        """


class EmbeddingObjective:
    """One minus the cosine of mean-pooled sentence (or image) embeddings."""

    def target(self, outputs: Any, batch: Batch) -> Tensor:
        return pooled(last_hidden(outputs), batch)

    def loss(self, outputs: Any, batch: Batch, target: Tensor) -> Tensor:
        return (1 - F.cosine_similarity(pooled(last_hidden(outputs), batch), target, dim=-1)).mean()

    def probe(self, outputs: Any, batch: Batch, noise: torch.Generator) -> Tensor:
        unit = F.normalize(pooled(last_hidden(outputs), batch), dim=-1)
        return (unit * torch.randn(unit.shape, generator=noise).to(unit)).sum()


class HiddenObjective(EmbeddingObjective):
    """The embedding's distance plus one minus the cosine of every real token's last hidden state."""

    def target(self, outputs: Any, batch: Batch) -> Tensor:
        return last_hidden(outputs)

    def loss(self, outputs: Any, batch: Batch, target: Tensor) -> Tensor:
        hidden = last_hidden(outputs)
        apart = 1 - F.cosine_similarity(hidden, target, dim=-1)  # (B, T)
        weight = token_weights(hidden, batch)[..., 0]
        between = 1 - F.cosine_similarity(pooled(hidden, batch), pooled(target, batch), dim=-1)  # (B,)
        return between.mean() + (apart * weight).sum() / weight.sum().clamp_min(1)


OBJECTIVES = {"embedding": EmbeddingObjective, "hidden": HiddenObjective}


def get_objective(objective: str | Objective) -> Objective:
    """An objective by name, or the object itself."""
    if not isinstance(objective, str):
        return objective
    if objective not in OBJECTIVES:
        raise DataError(f"objective={objective!r} is not one of {', '.join(OBJECTIVES)}")
    return OBJECTIVES[objective]()


def last_hidden(outputs: Any) -> Tensor:
    """The last hidden state, (B, T, d).

    Raises:
        DataError: the model has none.
    """
    hidden = getattr(outputs, "last_hidden_state", None)
    if hidden is None:
        raise DataError(
            f"this objective needs a last_hidden_state; {type(outputs).__name__} has none. "
            "Load the model with AutoModel"
        )
    return hidden


def token_weights(hidden: Tensor, batch: Batch) -> Tensor:
    """One for real tokens, zero for padding, (B, T, 1)."""
    mask = batch.get("attention_mask")
    return torch.ones_like(hidden[..., :1]) if mask is None else mask.unsqueeze(-1).to(hidden)


def pooled(hidden: Tensor, batch: Batch) -> Tensor:
    """Mean of a hidden state over the real tokens, (B, d)."""
    weight = token_weights(hidden, batch)
    return (hidden * weight).sum(1) / weight.sum(1).clamp_min(1)


class Targets:
    """The dense model's outputs, remembered by a batch's content while they fit in a gigabyte."""

    def __init__(self, teacher: nn.Module, objective: Objective) -> None:
        self.teacher, self.objective = teacher, objective
        self.known: dict[bytes, Tensor] = {}
        self.left = TARGET_CACHE_BYTES

    def __call__(self, batch: Batch) -> Tensor:
        digest = hashlib.sha256()
        for name in sorted(batch):
            data = batch[name].detach().cpu().contiguous().flatten()
            digest.update(name.encode())
            digest.update(data.view(torch.uint8).numpy().tobytes())
        key = digest.digest()
        if key in self.known:
            return self.known[key]
        with torch.no_grad():
            target = self.objective.target(self.teacher(**batch), batch)
        size = target.numel() * target.element_size()
        if size <= self.left:
            self.left -= size
            self.known[key] = target
        return target
