"""The dense model's outputs, remembered."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

from pathprune.model.outputs import Batch
from pathprune.objectives.base import Objective
from pathprune.objectives.task import TaskObjective

TARGET_CACHE_BYTES = 2**30


TARGET_BYTES = 2**25  # a larger target is made anew each time: a vocabulary's logits would fill the cache at once


class Targets:
    """The dense model's outputs, remembered by a batch's content.

    Up to 32 MiB for a batch and a gigabyte for all are kept; what is larger, such as the logits of a
    language model, costs a forward pass at every visit instead of memory.

    Example:
        >>> targets = pp.Targets(model, pp.objectives.EmbeddingObjective())
        >>> small = pp.slice_model(model, path.select(pp.Budget(keep=0.5)))
        >>> better = pp.recover(small, targets, batches, steps=2)  # the dense model runs once a batch
    """

    def __init__(self, teacher: nn.Module, objective: Objective) -> None:
        self.teacher, self.objective = teacher, objective
        self.known: dict[bytes, Tensor] = {}
        self.left = TARGET_CACHE_BYTES

    def __call__(self, batch: Batch) -> Tensor:
        if isinstance(self.objective, TaskObjective):  # the labels are the target
            return torch.empty(0)
        key = self.key(batch)
        if key in self.known:
            return self.known[key]
        with torch.no_grad():
            return self._keep(key, self.objective.target(self.teacher(**batch), batch))

    def remember(self, batch: Batch, outputs: Any) -> None:
        """Take the target from what the dense model was seen to put out."""
        key = self.key(batch)
        if key not in self.known:
            self._keep(key, self.objective.target(outputs, batch))

    @staticmethod
    def key(batch: Batch) -> bytes:
        """SHA-256 of a batch's content."""
        digest = hashlib.sha256()
        for name in sorted(batch):
            data = batch[name].detach().cpu().contiguous()
            digest.update(f"{name} {data.dtype} {tuple(data.shape)}".encode())
            digest.update(data.flatten().view(torch.uint8).numpy().tobytes())
        return digest.digest()

    def _keep(self, key: bytes, target: Tensor) -> Tensor:
        size = target.numel() * target.element_size()
        if size <= min(self.left, TARGET_BYTES):
            self.left -= size
            self.known[key] = target
        return target
