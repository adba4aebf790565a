"""Linear maps, of the two kinds that models have."""

from __future__ import annotations

from torch import nn
from transformers.pytorch_utils import Conv1D

from pathprune.errors import MismatchError

Map = nn.Linear | Conv1D


FORWARDS = (nn.Linear.forward, Conv1D.forward)


def is_map(module: nn.Module) -> bool:
    """Whether a module is a linear map of one vector."""
    return isinstance(module, Map)


def computes_linear(module: nn.Module) -> bool:
    """Whether a map's forward is the one of its kind, and not that of a subclass or of the object alone."""
    forward = vars(module).get("_old_forward", module.forward)  # of accelerate, which moves inputs to a device first
    forward = getattr(forward, "_torchdynamo_orig_callable", forward)
    # Falcon's own class says x W^T + b in other words.
    return getattr(forward, "__func__", None) in FORWARDS or type(module).__name__ == "FalconLinear"


def features(module: Map) -> tuple[int, int]:
    """(inputs, outputs)."""
    return (module.nx, module.nf) if isinstance(module, Conv1D) else (module.in_features, module.out_features)


def linear_map(model: nn.Module, name: str) -> Map:
    """The map of that name.

    Raises:
        MismatchError: it is none.
    """
    module = model.get_submodule(name)
    if not isinstance(module, Map):
        raise MismatchError(f"{name} is a {type(module).__name__}, not a linear map; the shapes are of another model")
    return module
