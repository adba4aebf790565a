"""Embeddings and hidden states."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pathprune.errors import SettingError
from pathprune.model.outputs import Batch, last_hidden, pooled, real_tokens, towers
from pathprune.objectives.base import noisy_sum, to_float
from pathprune.objectives.pooling import POOLINGS, resolve_pooling


class EmbeddingObjective:
    """One minus the cosine of embeddings: mean over samples, and over towers where there are several.

    The embedding is the model's own where it returns one (the towers of CLIP and its like), else made of the
    last hidden state over the real tokens. It must be the one that users read.

    With unit embeddings u, 1 - cos = |u - u'|^2 / 2, so H in u is the identity, and xi ~ N(0, 1) for
    each entry makes sum(u * xi) a probe.

    Args:
        class_token: the first token is a learned class token; the embedding is [class token, mean of
            the others], (B, 2d), the features that DINOv2 and its like are used with.
        pooling: ``"mean"``; ``"class"``, the first token (BGE, GTE); or ``"last"`` (embedders made of a decoder).

    Raises:
        SettingError: there is no such pooling.
    """

    kind = "embedding"

    def __init__(self, class_token: bool = False, pooling: str = "mean") -> None:
        if pooling not in POOLINGS:
            raise SettingError(f"pooling={pooling!r} is not one of {', '.join(POOLINGS)}")
        self.pooling = "class and mean" if class_token else pooling

    @classmethod
    def of(cls, model: nn.Module, pooling: str = "") -> Self:
        """For a model, pooled as its folder says unless another pooling is named."""
        return cls(*resolve_pooling(model, pooling))

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.pooling}" if self.pooling in ("class", "last") else self.kind

    def embeddings(self, outputs: Any, batch: Batch) -> Tensor:
        """(rows, d): a row for each sample, and for each tower if there are several."""
        own = towers(outputs)
        return to_float(torch.cat(own)) if own else self.mean_hidden(outputs, batch)

    def mean_hidden(self, outputs: Any, batch: Batch) -> Tensor:
        """(B, d) or (B, 2d)."""
        hidden = last_hidden(outputs)
        return pooled(to_float(hidden), real_tokens(outputs, batch, hidden.shape[1]), self.pooling)

    def target(self, outputs: Any, batch: Batch) -> Tensor:
        return self.embeddings(outputs, batch)

    def loss(self, outputs: Any, batch: Batch, target: Tensor) -> Tensor:
        return (1 - F.cosine_similarity(self.embeddings(outputs, batch), target, dim=-1)).mean()

    def probe(self, outputs: Any, batch: Batch, noise: torch.Generator) -> Tensor:
        return noisy_sum(F.normalize(self.embeddings(outputs, batch), dim=-1), batch, noise)


class HiddenObjective(EmbeddingObjective):
    """The embedding's distance plus one minus the cosine of the last hidden state, mean over all real tokens.

    The probe is that of ``embedding`` plus the same for the tokens, with independent noise.
    """

    kind = "hidden"
    embeddings = EmbeddingObjective.mean_hidden

    def tokens(self, outputs: Any, batch: Batch) -> Tensor:
        """(real tokens, d)."""
        hidden = last_hidden(outputs)
        return to_float(hidden[real_tokens(outputs, batch, hidden.shape[1])])

    def target(self, outputs: Any, batch: Batch) -> Tensor:
        return to_float(last_hidden(outputs))

    def loss(self, outputs: Any, batch: Batch, target: Tensor) -> Tensor:
        real = real_tokens(outputs, batch, target.shape[1])
        apart = 1 - F.cosine_similarity(self.tokens(outputs, batch), target[real], dim=-1)
        return super().loss(outputs, batch, pooled(target, real, self.pooling)) + apart.mean()

    def probe(self, outputs: Any, batch: Batch, noise: torch.Generator) -> Tensor:
        unit = F.normalize(self.tokens(outputs, batch), dim=-1)
        return super().probe(outputs, batch, noise) + noisy_sum(unit, batch, noise)
