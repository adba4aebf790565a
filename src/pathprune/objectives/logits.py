"""Logits of classifiers and language models."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pathprune.errors import DataError
from pathprune.model.outputs import Batch, real_tokens
from pathprune.objectives.base import noisy_sum, to_float
from pathprune.objectives.pooling import config_of


class LogitsObjective:
    """KL(dense || pruned) of the output distributions: mean over samples, or over the real tokens of all samples.

    H in the logits z of one token is diag(p) - p p^T, the covariance of a label drawn from the model's
    own p (its Fisher information). xi ~ N(0, 1) for each entry has the same in expectation:
    sum(sqrt(p) * xi * log softmax(z)) has gradient (sqrt(p) * xi) - p <sqrt(p), xi>, with that covariance.

    Args:
        yes_no: every logit is a question of its own (multi-label classifiers). A single logit always is.
    """

    name = "logits"

    def __init__(self, yes_no: bool = False) -> None:
        self.yes_no = yes_no

    @classmethod
    def of(cls, model: nn.Module) -> Self:
        return cls(config_of(model, "problem_type") == "multi_label_classification")

    def rows(self, outputs: Any, batch: Batch) -> Tensor:
        """(distributions, classes): padding left out."""
        z = outputs if isinstance(outputs, Tensor) else getattr(outputs, "logits", None)
        if z is None:
            raise DataError(
                f"objective='logits' needs logits; {type(outputs).__name__} has none. Load the model with its "
                "head (AutoModelForCausalLM, ...), or use objective='hidden' or 'embedding'"
            )
        if z.dim() == 4:  # a class map, (B, C, H, W)
            z = z.movedim(1, -1).flatten(0, 2)
        elif z.dim() == 3:
            z = z[real_tokens(outputs, batch, z.shape[1])]
        z = to_float(z)
        if self.yes_no or z.shape[-1] == 1:
            return torch.stack([z, torch.zeros_like(z)], -1).flatten(0, -2)
        return z

    def target(self, outputs: Any, batch: Batch) -> Tensor:
        return self.rows(outputs, batch)

    def loss(self, outputs: Any, batch: Batch, target: Tensor) -> Tensor:
        ours, dense = self.rows(outputs, batch).log_softmax(-1), target.log_softmax(-1)
        return F.kl_div(ours, dense, reduction="batchmean", log_target=True)

    def probe(self, outputs: Any, batch: Batch, noise: torch.Generator) -> Tensor:
        log_p = self.rows(outputs, batch).log_softmax(-1)
        return noisy_sum(log_p, batch, noise, scale=(log_p.detach() / 2).exp())
