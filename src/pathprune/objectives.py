"""What a search or a recovery minimises.

| name | distance from the dense model | fits |
|---|---|---|
| ``embedding`` | cosine of embeddings | encoders, and dual towers such as CLIP |
| ``hidden`` | cosine of embeddings and of every token | base models with a last hidden state |
| ``logits`` | divergence of output distributions | causal and masked LMs, seq2seq, classifiers |
| ``task`` | none: the model's own loss on labels | models that return a loss |

``embedding`` and ``hidden`` pool tokens as the model's folder says (``pathprune.serving``), or as a name
says that ends in ``-mean``, ``-class`` or ``-last``.

``auto`` chooses among the first three (``auto``). Only ``task`` needs labels. An objective sees a
model's outputs and the batch they came from; all are computed in float32 or better.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pathprune.errors import DataError, SettingError
from pathprune.modes import caching, evaluating
from pathprune.outputs import Batch, last_hidden, pooled, real_tokens, samples, towers
from pathprune.serving import Served, served

TARGET_CACHE_BYTES = 2**30
TARGET_BYTES = 2**25  # a larger target is made anew each time: a vocabulary's logits would fill the cache at once

POOLINGS = ("mean", "class", "last")
CLASS_TOKENS = ("cls_token", "class_token", "class_embedding")


class Objective(Protocol):
    """Three functions of a model's outputs."""

    def target(self, outputs: Any, batch: Batch) -> Tensor:
        """What is kept of the dense model's outputs."""

    def loss(self, outputs: Any, batch: Batch, target: Tensor) -> Tensor:
        """Mean distance to the target, a scalar; zero at the dense model."""

    def probe(self, outputs: Any, batch: Batch, noise: torch.Generator) -> Tensor:
        """A random scalar, a sum over the batch's B samples. The square of its gradient in one sample's
        masks, averaged over samples and noise, is the diagonal of the loss's Gauss-Newton matrix
        J^T H J at the dense model, with J the outputs' Jacobian and H the loss's Hessian in the outputs.
        """


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

    def __init__(self, class_token: bool = False, pooling: str = "mean") -> None:
        if pooling not in POOLINGS:
            raise SettingError(f"pooling={pooling!r} is not one of {', '.join(POOLINGS)}")
        self.pooling = "class and mean" if class_token else pooling

    def embeddings(self, outputs: Any, batch: Batch) -> Tensor:
        """(rows, d): a row for each sample, and for each tower if there are several."""
        own = towers(outputs)
        return _float(torch.cat(own)) if own else self.mean_hidden(outputs, batch)

    def mean_hidden(self, outputs: Any, batch: Batch) -> Tensor:
        """(B, d) or (B, 2d)."""
        hidden = last_hidden(outputs)
        return pooled(_float(hidden), real_tokens(outputs, batch, hidden.shape[1]), self.pooling)

    def target(self, outputs: Any, batch: Batch) -> Tensor:
        return self.embeddings(outputs, batch)

    def loss(self, outputs: Any, batch: Batch, target: Tensor) -> Tensor:
        return (1 - F.cosine_similarity(self.embeddings(outputs, batch), target, dim=-1)).mean()

    def probe(self, outputs: Any, batch: Batch, noise: torch.Generator) -> Tensor:
        return _noisy_sum(F.normalize(self.embeddings(outputs, batch), dim=-1), batch, noise)


class HiddenObjective(EmbeddingObjective):
    """The embedding's distance plus one minus the cosine of the last hidden state, mean over all real tokens.

    The probe is that of ``embedding`` plus the same for the tokens, with independent noise.
    """

    embeddings = EmbeddingObjective.mean_hidden

    def tokens(self, outputs: Any, batch: Batch) -> Tensor:
        """(real tokens, d)."""
        hidden = last_hidden(outputs)
        return _float(hidden[real_tokens(outputs, batch, hidden.shape[1])])

    def target(self, outputs: Any, batch: Batch) -> Tensor:
        return _float(last_hidden(outputs))

    def loss(self, outputs: Any, batch: Batch, target: Tensor) -> Tensor:
        real = real_tokens(outputs, batch, target.shape[1])
        apart = 1 - F.cosine_similarity(self.tokens(outputs, batch), target[real], dim=-1)
        return super().loss(outputs, batch, pooled(target, real, self.pooling)) + apart.mean()

    def probe(self, outputs: Any, batch: Batch, noise: torch.Generator) -> Tensor:
        unit = F.normalize(self.tokens(outputs, batch), dim=-1)
        return super().probe(outputs, batch, noise) + _noisy_sum(unit, batch, noise)


class LogitsObjective:
    """KL(dense || pruned) of the output distributions: mean over samples, or over the real tokens of all samples.

    H in the logits z of one token is diag(p) - p p^T, the covariance of a label drawn from the model's
    own p (its Fisher information). xi ~ N(0, 1) for each entry has the same in expectation:
    sum(sqrt(p) * xi * log softmax(z)) has gradient (sqrt(p) * xi) - p <sqrt(p), xi>, with that covariance.

    Args:
        yes_no: every logit is a question of its own (multi-label classifiers). A single logit always is.
    """

    def __init__(self, yes_no: bool = False) -> None:
        self.yes_no = yes_no

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
        z = _float(z)
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
        return _noisy_sum(log_p, batch, noise, scale=(log_p.detach() / 2).exp())


class TaskObjective:
    """The model's own loss on labelled batches; there is nothing to imitate.

    The probe is not random: B times the loss, whose gradient in a sample's masks is that of the
    sample's own loss. Its mean square is the empirical Fisher (Kwon et al., NeurIPS 2022), which is
    the Gauss-Newton diagonal of a cross entropy where the labels follow the model's own distribution.
    """

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
        return _float(loss)

    def probe(self, outputs: Any, batch: Batch, noise: torch.Generator) -> Tensor:
        return self.loss(outputs, batch, self.target(outputs, batch)) * samples(batch)


def get_objective(
    objective: str | Objective, model: nn.Module, batch: Batch, *, encoder: str = "embedding"
) -> Objective:
    """An objective by name, made for the model; or the object itself.

    Args:
        objective: ``"auto"``, ``"embedding"``, ``"hidden"``, ``"logits"``, ``"task"``, ``"embedding-class"`` and the
            like with another pooling than the model's folder names, or an object.
        batch: on the model's device; ``auto`` runs the model on it once.
        encoder: see ``auto``.

    Raises:
        DataError: there is no such objective, ``auto`` finds none for the model, or its folder names a pooling that
            is not known here.
        ArtifactError: its folder does not say its pooling as sentence-transformers writes it.
    """
    if not isinstance(objective, str):
        return objective
    if objective == "auto":
        with evaluating(model), caching(model, True), torch.no_grad():  # a decoder shows itself by its cache
            objective = auto(model, model(**batch), encoder=encoder)
        if objective == "hidden" and _served(model):  # a decoder or the like that embeds sentences
            objective = encoder
    name, _, pooling = objective.partition("-")
    if objective == name or (name in ("embedding", "hidden") and pooling in POOLINGS):
        match name:
            case "embedding":
                return EmbeddingObjective(*_pooling(model, pooling))
            case "hidden":
                return HiddenObjective(*_pooling(model, pooling))
            case "logits":
                return LogitsObjective(_config(model, "problem_type") == "multi_label_classification")
            case "task":
                return TaskObjective()
    raise DataError(
        f"objective={objective!r} is not one of auto, embedding, hidden, logits, task, nor embedding or hidden with "
        f"-{', -'.join(POOLINGS)}"
    )


def auto(model: nn.Module, outputs: Any, *, encoder: str = "embedding") -> str:
    """The objective's name that suits a model's outputs; the first that applies:

    1. logits (LM heads, classifiers): ``logits``, because the distribution is what users read;
    2. embeddings of its own (dual towers): ``embedding``;
    3. a last hidden state of a decoder (it returns a cache), of an encoder-decoder, or of an audio
       model: ``hidden``, because a head reads every token or frame and none stands for the whole;
    4. a last hidden state of another encoder (BERT, ViT, DINOv2): ``encoder``.

    Args:
        encoder: ``"embedding"`` to search, where the embedding alone ranks best; ``"hidden"`` to
            train, where every token teaches and the embedding follows.

    Raises:
        DataError: none applies.
    """
    if isinstance(outputs, Tensor):  # timm
        return "logits" if getattr(model, "num_classes", 0) else "embedding"
    if isinstance(getattr(outputs, "logits", None), Tensor):
        return "logits"
    if towers(outputs):
        return "embedding"
    if getattr(outputs, "last_hidden_state", None) is None:
        has = ", ".join(outputs) if isinstance(outputs, Mapping) else "no named outputs"
        raise DataError(
            f"objective='auto' finds neither logits nor embeddings nor a last_hidden_state in what "
            f"{type(model).__name__} returns ({has}). Load it with AutoModel, pass batches with labels and "
            "objective='task', or pass an object with the methods of pathprune.objectives.Objective"
        )
    decodes = any(getattr(outputs, name, None) is not None for name in ("past_key_values", "encoder_last_hidden_state"))
    audio = getattr(model, "main_input_name", "") in ("input_values", "input_features")
    return "hidden" if decodes or audio else encoder


def objective_name(objective: Objective) -> str:
    """``"embedding"``, ``"embedding-class"``, ...; of a user's own class, its name."""
    kind = type(objective).__qualname__
    if type(objective).__module__ != __name__:
        return kind
    pooling = getattr(objective, "pooling", "mean")
    return kind.removesuffix("Objective").lower() + (f"-{pooling}" if pooling in ("class", "last") else "")


def _float(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _noisy_sum(rows: Tensor, batch: Batch, noise: torch.Generator, scale: Tensor | float = 1.0) -> Tensor:
    """Sum of (R, d) rows times N(0, 1) noise. The loss is a mean over rows, the probe's square one over samples:
    hence sqrt(B / R).
    """
    xi = torch.randn(rows.shape, generator=noise).to(rows)
    return (rows * xi * scale).sum() * math.sqrt(samples(batch) / len(rows))


def _class_token(model: nn.Module) -> bool:
    """Whether an image model has a learned class token (not so Swin or SigLIP)."""
    names = (name.rpartition(".")[2] for name, _ in model.named_parameters())
    return getattr(model, "main_input_name", "") == "pixel_values" and any(name in CLASS_TOKENS for name in names)


def _pooling(model: nn.Module, asked: str) -> tuple[bool, str]:
    """Whether class token and mean both count, and else which pooling: what was asked for, or what the folder says."""
    if asked:
        return False, asked
    use = _served(model)
    if use and use.pooling not in POOLINGS:
        raise DataError(
            f"{_config(model, '_name_or_path')} pools by {use.pooling!r}, which is not known here; choose "
            "objective='embedding-mean', or pass an object with the methods of pathprune.objectives.Objective"
        )
    return (False, use.pooling) if use else (_class_token(model), "mean")


def _served(model: nn.Module) -> Served | None:
    """How the folder or the hub's files that a model was loaded from say that it is used."""
    source = _config(model, "_name_or_path")
    return served(source) if source else None


def _config(model: nn.Module, name: str) -> Any:
    return getattr(getattr(model, "config", None), name, None)


class Targets:
    """The dense model's outputs, remembered by a batch's content.

    Up to 32 MiB for a batch and a gigabyte for all are kept; what is larger, such as the logits of a
    language model, costs a forward pass at every visit instead of memory.
    """

    def __init__(self, teacher: nn.Module, objective: Objective) -> None:
        self.teacher, self.objective = teacher, objective
        self.known: dict[bytes, Tensor] = {}
        self.left = TARGET_CACHE_BYTES

    def __call__(self, batch: Batch) -> Tensor:
        if isinstance(self.objective, TaskObjective):  # the labels are the target
            return torch.empty(0)
        key = self._key(batch)
        if key in self.known:
            return self.known[key]
        with torch.no_grad():
            return self._keep(key, self.objective.target(self.teacher(**batch), batch))

    def remember(self, batch: Batch, outputs: Any) -> None:
        """Take the target from what the dense model was seen to put out."""
        key = self._key(batch)
        if key not in self.known:
            self._keep(key, self.objective.target(outputs, batch))

    @staticmethod
    def _key(batch: Batch) -> bytes:
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
