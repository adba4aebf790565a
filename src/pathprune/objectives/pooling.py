"""How an encoder makes one vector of a sequence."""

from __future__ import annotations

from typing import Any

from torch import nn

from pathprune.errors import DataError
from pathprune.serving import Served, served

POOLINGS = ("mean", "class", "last")


CLASS_TOKENS = ("cls_token", "class_token", "class_embedding")


def _class_token(model: nn.Module) -> bool:
    """Whether an image model has a learned class token (not so Swin or SigLIP)."""
    names = (name.rpartition(".")[2] for name, _ in model.named_parameters())
    return getattr(model, "main_input_name", "") == "pixel_values" and any(name in CLASS_TOKENS for name in names)


def resolve_pooling(model: nn.Module, asked: str) -> tuple[bool, str]:
    """Whether class token and mean both count, and else which pooling: what was asked for, or what the folder says."""
    if asked:
        return False, asked
    use = served_settings(model)
    if use and use.pooling not in POOLINGS:
        raise DataError(
            f"{config_of(model, '_name_or_path')} pools by {use.pooling!r}, which is not known here; choose "
            "objective='embedding-mean', or pass an object with the methods of pathprune.objectives.Objective"
        )
    return (False, use.pooling) if use else (_class_token(model), "mean")


def served_settings(model: nn.Module) -> Served | None:
    """How the folder or the hub's files that a model was loaded from say that it is used."""
    source = config_of(model, "_name_or_path")
    return served(source) if source else None


def config_of(model: nn.Module, name: str) -> Any:
    return getattr(getattr(model, "config", None), name, None)
