"""A sliced model's shape record on the model, where transformers saves and reads it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from pathprune.errors import UnsupportedModelError
from pathprune.family.selection import Selection
from pathprune.transform.record import PathpruneConfig


def attach_record(model: Any, record: Mapping[str, Any], selection: Selection) -> None:
    """Write a shape record into a sliced model's configuration; onto the model where it is of another library."""
    config = PathpruneConfig(record, selection.to_dict())
    if is_transformers_model(model):
        attach_config(model, config)
    else:
        model.pathprune = config


def attach_config(model: Any, config: PathpruneConfig) -> None:
    """Also to the configurations of its parts, so that a tower of CLIP saves and loads alone, too."""
    own_names(model)
    owners: set[int] = set()
    for name, part in model.named_modules():
        if not is_transformers_model(part) or id(part.config) in owners:
            continue
        owners.add(id(part.config))
        # Heads are counted in the configuration, where they are those of the dense model.
        vars(part)["_get_static_cache_init_shape"] = _unknown
        if config.record["attributes"]:
            vars(part)["init_continuous_batching"] = _no_pages
        record = {
            entry: {key[len(name) + 1 :]: value for key, value in values.items() if key.startswith(f"{name}.")}
            for entry, values in config.record.items()
        }
        if not name:
            part.config.quantization_config = config
        elif any(record.values()):
            part.config.quantization_config = PathpruneConfig(record)


def _unknown() -> None:
    """What transformers takes for a static cache that gets its shapes from the first keys."""


def _no_pages(*args: Any, **kwargs: Any) -> None:
    """In place of transformers' own, which gives every request an error inside and no tokens."""
    raise UnsupportedModelError(
        "continuous batching makes its cache for the heads that the configuration names, which are the dense model's; "
        "a sliced model generates by generate()"
    )


def own_names(model: nn.Module) -> None:
    """Have a model saved under its own modules' names: transformers would save some architectures in an older layout,
    and cut fused weights into parts of dense sizes.
    """
    for part in model.modules():
        if is_transformers_model(part):
            part._weight_conversions = []  # type: ignore[assignment]


def is_transformers_model(model: Any) -> bool:
    from transformers import PreTrainedModel  # late: its module is what imports this one

    return isinstance(model, PreTrainedModel)
