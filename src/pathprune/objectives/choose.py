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

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pathprune.errors import DataError, SettingError
from pathprune.model.contexts import caching, evaluating
from pathprune.model.outputs import Batch, towers
from pathprune.objectives.base import Objective
from pathprune.objectives.pooling import POOLINGS, served_settings
from pathprune.registry import OBJECTIVES


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
        SettingError: there is no such objective.
        DataError: ``auto`` finds none for the model, or its folder names a pooling that is not known here.
        ArtifactError: its folder does not say its pooling as sentence-transformers writes it.
    """
    if not isinstance(objective, str):
        return objective
    if objective == "auto":
        with evaluating(model), caching(model, True), torch.no_grad():  # a decoder shows itself by its cache
            objective = auto(model, model(**batch), encoder=encoder)
        if objective == "hidden" and served_settings(model):  # a decoder or the like that embeds sentences
            objective = encoder
    name, _, pooling = objective.partition("-")
    if name in ("embedding", "hidden") and pooling in POOLINGS:
        return OBJECTIVES[name](model, pooling)
    if objective not in OBJECTIVES:
        known = ", ".join(("auto", *OBJECTIVES))
        raise SettingError(
            f"objective={objective!r} is not one of {known}, nor embedding or hidden with -{', -'.join(POOLINGS)}"
            + OBJECTIVES.hint(objective)
        )
    return OBJECTIVES[objective](model)


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
    """``"embedding"``, ``"embedding-class"``, ...; of a user's own objective, its ``name`` or its class's."""
    return str(getattr(objective, "name", type(objective).__qualname__))
