"""Models inside others: how to come at what is to be pruned.

Wrappers are told by the names of their classes, so that no library has to be there to tell its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pathprune.errors import UnsupportedModelError

# Class of a wrapper -> what to pass in its place.
WRAPPERS = {
    "PeftModel": "model.merge_and_unload()",
    "DataParallel": "model.module",
    "DistributedDataParallel": "model.module",
    "OptimizedModule": "model._orig_mod, or compile it in place by model.compile()",
    "SentenceTransformer": "model[0].auto_model",
    "CrossEncoder": "model[0].auto_model",
}
# Those that take the arguments of the model inside -> where that is.
TRANSPARENT = {
    "PeftModel": "get_base_model",
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "OptimizedModule": "_orig_mod",
}
ADAPTER = "BaseTunerLayer"  # of PEFT, in place of a map


def inside(model: nn.Module) -> nn.Module:
    """The model that takes the arguments of a call; mostly the model itself.

    Raises:
        UnsupportedModelError: it is none that takes a model's inputs by name.
    """
    while (found := _wrapper(model)) in TRANSPARENT:
        held = getattr(model, TRANSPARENT[found])
        model = held if isinstance(held, nn.Module) else held()
    if found or not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule) or _empty(model):
        check_bare(model)
    return model


def check_bare(model: Any) -> None:
    """Refuse what only holds a model, and models whose parts hide their maps.

    Raises:
        UnsupportedModelError: it is one of these; the message says what to pass instead.
    """
    if not isinstance(model, nn.Module):
        held = next((name for name in ("model", "auto_model") if isinstance(getattr(model, name, None), nn.Module)), "")
        raise UnsupportedModelError(
            f"a {type(model).__name__} is not a torch.nn.Module; pass "
            + (f"the model that it holds, its .{held}" if held else "the model itself")
        )
    if found := _wrapper(model):
        raise UnsupportedModelError(
            f"a {type(model).__name__} holds a model and is none that can be pruned; pass {WRAPPERS[found]}"
        )
    if _empty(model):
        raise UnsupportedModelError(f"the {type(model).__name__} has no parameters; nothing of it can be pruned")
    for name, part in model.named_modules():
        where = f"{name or 'the model'} is a {type(part).__name__}"
        if isinstance(part, torch.jit.ScriptModule):
            raise UnsupportedModelError(f"{where}, scripted or traced, which no hook reaches; pass the original model")
        if _wrapper(part) == "OptimizedModule":
            raise UnsupportedModelError(
                f"{where}, made by torch.compile; put its ._orig_mod back, and compile in place by .compile()"
            )
        if ADAPTER in _ancestors(part):
            raise UnsupportedModelError(
                f"{where}, an adapter of PEFT over a linear map; merge the adapters into the weights first, by "
                "merge_and_unload() of the PeftModel, and pass the model that this returns"
            )


def _empty(model: nn.Module) -> bool:
    return next(model.parameters(), None) is None


def _wrapper(module: Any) -> str:
    """Its name among ``WRAPPERS``; empty where it is none."""
    return next((name for name in _ancestors(module) if name in WRAPPERS), "")


def _ancestors(module: Any) -> list[str]:
    return [kind.__name__ for kind in type(module).__mro__]
