"""Shape record."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from pathprune.errors import ArtifactError
from pathprune.family.artifact import content_hash
from pathprune.model.attention import SCALES, SIZE_ATTRIBUTES

Record = dict[str, Any]


METHOD = "pathprune (pip install pathprune, then `import pathprune` before loading this model)"


FORMAT = 1


MOST_MODULES = 100_000  # in a shape record


class PathpruneConfig(QuantizationConfigMixin):
    """The shape record of a sliced model, in its configuration.

    Args:
        record: what ``pathprune.transform.slicing`` describes.
        selection: sizes and widths, for people.
        sha256: of the two, where they come from a file; 0.1.0 wrote none.

    Raises:
        ArtifactError: the record is malformed, or was altered.
    """

    def __init__(
        self,
        record: Mapping[str, Any] | None = None,
        selection: Mapping[str, Any] | None = None,
        format: int = FORMAT,
        quant_method: str = METHOD,
        sha256: str | None = None,
    ) -> None:
        self.quant_method: Any = quant_method
        self.format = format
        self.record = _checked(record, format)
        if selection is not None and not isinstance(selection, Mapping):
            raise ArtifactError(f"the shape record's selection is a {type(selection).__name__}; it must be a dict")
        self.selection = dict(selection or {})
        self.signed = sha256 is not None
        self.sha256 = content_hash({"record": self.record, "selection": self.selection})
        if sha256 is not None and sha256 != self.sha256:
            raise ArtifactError(
                "the shape record does not have the recorded SHA-256; it was altered. "
                "Copy the model's config.json again from its source, or slice the model again"
            )

    @classmethod
    def from_dict(
        cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> PathpruneConfig | tuple[PathpruneConfig, dict[str, Any]]:
        known = {key: config_dict.get(key) for key in ("record", "selection", "format", "sha256")}
        if unknown := set(config_dict) - set(known) - {"quant_method"}:
            raise ArtifactError(
                f"unknown keys in the shape record: {sorted(unknown)}; it was written by a newer pathprune"
            )
        config = cls(**known)  # type: ignore[arg-type]
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        return {
            "quant_method": self.quant_method,
            "format": self.format,
            "record": copy.deepcopy(self.record),
            "selection": copy.deepcopy(self.selection),
            "sha256": self.sha256,
        }

    def __deepcopy__(self, memo: dict[int, Any]) -> PathpruneConfig:
        return self  # nothing changes it, and encoder-decoders copy their configuration at every forward pass

    def to_json_string(self, use_diff: bool = True) -> str:
        return json.dumps(self.to_dict(), indent=2) + "\n"


def _checked(record: Any, version: Any) -> dict[str, Any]:
    """Refuse what is not a shape record: it comes from a file."""
    if version != FORMAT:
        raise ArtifactError(f"the shape record has format {version!r}, this pathprune reads {FORMAT}; update pathprune")
    if not isinstance(record, Mapping) or set(record) != {"modules", "parameters", "attributes", "rotary"}:
        raise ArtifactError("the shape record is malformed: it needs modules, parameters, attributes and rotary")

    def size(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31

    if not all(isinstance(part, Mapping) and all(isinstance(name, str) for name in part) for part in record.values()):
        raise ArtifactError("the shape record is malformed: modules, parameters, attributes and rotary must be dicts")
    if (count := sum(map(len, record.values()))) > MOST_MODULES:
        raise ArtifactError(f"the shape record names {count:,} modules, more than any model has")
    for name, shape in record["modules"].items():
        pad = shape.get("pad") if isinstance(shape, Mapping) else None
        good = (
            isinstance(shape, Mapping)
            and set(shape) == {"in_features", "out_features", "bias", "pad"}
            and isinstance(shape["bias"], bool)
        )
        good = good and size(shape["in_features"]) and size(shape["out_features"])
        if good and pad is not None:
            good = isinstance(pad, Mapping) and pad.get("side") in ("in", "out") and _padding(pad, shape, size)
        if not good:
            raise ArtifactError(f"the shape record of {name[:200]} is malformed: {repr(shape)[:500]}")
    for name, attributes in record["attributes"].items():
        if (
            not isinstance(attributes, Mapping)
            or not set(attributes) <= {*SIZE_ATTRIBUTES, *SCALES}
            or not all(
                isinstance(value, float) and 0 < value <= 1 if key in SCALES else size(value)
                for key, value in attributes.items()
            )
        ):
            raise ArtifactError(
                f"the shape record of {name[:200]} sets {repr(attributes)[:500]}; only sizes of an attention may be set"
            )
    for name, shapes in record["parameters"].items():
        if not isinstance(shapes, Mapping) or not all(
            isinstance(shape, list) and all(size(length) for length in shape) for shape in shapes.values()
        ):
            raise ArtifactError(f"the shape record of {name} has parameters whose shapes are not lists of sizes")
    for name, columns in record["rotary"].items():
        if not isinstance(columns, list) or not all(size(column) for column in columns):
            raise ArtifactError(f"the shape record of {name} has rotary columns that are not indices")
    return {  # a copy; copy.deepcopy would take ten times as long
        "modules": {name: {**shape, "pad": _copied(shape["pad"])} for name, shape in record["modules"].items()},
        "parameters": {
            name: {key: [*shape] for key, shape in part.items()} for name, part in record["parameters"].items()
        },
        "attributes": {name: dict(attributes) for name, attributes in record["attributes"].items()},
        "rotary": {name: [*columns] for name, columns in record["rotary"].items()},
    }


def _copied(pad: Mapping[str, Any] | None) -> dict[str, Any] | None:
    return None if pad is None else {key: [*value] if isinstance(value, list) else value for key, value in pad.items()}


def _padding(pad: Mapping[str, Any], shape: Mapping[str, Any], size: Callable[[Any], bool]) -> bool:
    """Whether a padding is one of the two kinds, and fits the map."""
    features = shape[f"{pad['side']}_features"]
    if set(pad) == {"side", "blocks", "width", "padded"}:
        good = all(size(pad[key]) for key in ("blocks", "width", "padded"))
        return good and pad["width"] <= pad["padded"] and pad["blocks"] * pad["width"] == features
    if set(pad) != {"side", "positions", "size"} or not isinstance(pad["positions"], list) or not size(pad["size"]):
        return False
    places = pad["positions"]
    ascending = all(size(place) for place in places) and all(a < b for a, b in pairwise(places))
    return ascending and len(places) == features and (not places or places[-1] < pad["size"])
