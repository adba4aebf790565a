"""The model's own loss, on labels."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from pathprune.errors import DataError
from pathprune.model.outputs import Batch, samples
from pathprune.objectives.base import to_float


class TaskObjective:
    """The model's own loss on labelled batches; there is nothing to imitate.

    The probe is not random: B times the loss, whose gradient in a sample's masks is that of the
    sample's own loss. Its mean square is the empirical Fisher (Kwon et al., NeurIPS 2022), which is
    the Gauss-Newton diagonal of a cross entropy where the labels follow the model's own distribution.
    """

    name = "task"

    @classmethod
    def of(cls, model: nn.Module) -> Self:
        return cls()

    def target(self, outputs: Any, batch: Batch) -> Tensor:
        return torch.empty(0)

    def loss(self, outputs: Any, batch: Batch, target: Tensor) -> Tensor:
        loss = getattr(outputs, "loss", None)
        if loss is None:
            has = "the batch has" if "labels" in batch else "the batch has no"
            raise DataError(
                f"objective='task' needs the model's loss; {type(outputs).__name__} has none, and {has} labels. "
                "Load the model with its head and put labels into every batch, or use objective='auto'"
            )
        return to_float(loss)

    def probe(self, outputs: Any, batch: Batch, noise: torch.Generator) -> Tensor:
        return self.loss(outputs, batch, self.target(outputs, batch)) * samples(batch)
