"""Sliced models load and save like any model of ``transformers``.

The shape record stands in the model's ``config.json`` as a ``quantization_config``, the one door
through which ``transformers`` lets a library reshape a model of any architecture before its
weights arrive; ``AutoModel.from_pretrained`` and every other class then load it, with dtype,
device map and sharding working as always. Importing pathprune registers the door. A process that
did not import it is told so: the method's name, which ``transformers`` prints when it does not
know it, is the remedy.

Nothing here quantises. After loading, the flags that make ``transformers`` take the model for a
quantised one (and refuse ``.half()`` or training) are cleared.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers.core_model_loading import PrefixChange
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer

from pathprune.errors import ArtifactError
from pathprune.transform.attach import attach_config
from pathprune.transform.experts import check_experts
from pathprune.transform.modules import matched_record, shape_attention, shape_modules
from pathprune.transform.record import METHOD, PathpruneConfig
from pathprune.transform.record_checks import check_record


class PathpruneLoader(HfQuantizer):
    """Shapes a model before its weights arrive."""

    requires_calibration = False

    quantization_config: PathpruneConfig

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        record = _below(model, self.quantization_config.record)
        check_record(model, record, doubtful=not self.quantization_config.signed)
        shape_modules(model, record)
        sliced = {**record["modules"], **record["parameters"]}
        self.shapes = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
        self.model, self.parts = model, {_part(model, name) for name in sliced or self.shapes}
        self.sliced = {name for name in self.shapes if name.rpartition(".")[0] in sliced}
        self.loaded: set[str] = set()

    def get_new_dtype(self, converter: Any, param: Any, dtype: Any) -> Any:
        """Called for each tensor of the file that the model takes, before it is read."""
        name = converter.target_patterns[0]
        self.loaded.add(name)
        if name in self.shapes:
            lazy = hasattr(param, "get_shape")
            shape, kind = (param.get_shape(), param.get_dtype()) if lazy else (param.shape, param.dtype)
            floating = kind.startswith(("F", "BF")) if lazy else kind.is_floating_point
            if not floating or (_part(self.model, name) in self.parts and tuple(shape) != self.shapes[name]):
                raise ArtifactError(
                    f"the weights have {name} as {kind} of shape {[*shape]}, where the shape record in config.json "
                    f"has floating-point numbers of shape {[*self.shapes[name]]}; "
                    "they do not belong together: copy both again from their source, or slice the model again"
                )
        return super().get_new_dtype(converter, param, dtype)

    def update_weight_conversions(self, weight_conversions: Any, model: Any) -> list[Any]:
        # Sliced models are saved under the names of their own modules, see `own_names`; a tower alone drops the prefix
        # that it has in the whole model.
        return [c for c in weight_conversions if isinstance(c, PrefixChange) and c.prefix_to_remove]

    def _check_loaded(self, model: Any) -> None:
        """Refuse weights that lack something, where transformers would put random numbers.

        A class that the model was not saved from may have parts of its own (a head), and any class a pooler that was
        left out: these are left to transformers, as for any model.
        """
        alike: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            alike.setdefault(id(parameter), []).append(name)
        there = {_part(model, name) for name in self.loaded}
        same_class = type(model).__name__ in (getattr(model.config, "architectures", None) or [])
        optional = getattr(model, "_keys_to_ignore_on_load_missing", None) or []
        for names in alike.values():
            if self.loaded.isdisjoint(names) and (
                any(name in self.sliced for name in names)
                or (
                    same_class
                    and any(_part(model, name) in there or "pool" not in _part(model, name) for name in names)
                    and not any(re.search(pattern, name) for pattern in optional for name in names)
                )
            ):
                raise ArtifactError(
                    f"the weights lack {names[0]}, which the sliced {type(model).__name__} was saved with; "
                    "copy the folder again from its source, or slice the model again"
                )

    def postprocess_model(self, model: Any, **kwargs: Any) -> None:
        self._check_loaded(model)
        record = _below(model, self.quantization_config.record)
        check_experts(model, record)
        shape_attention(model, record)
        attach_config(model, self.quantization_config)
        model.is_quantized = False
        for flag in ("hf_quantizer", "quantization_method"):
            if hasattr(model, flag):
                delattr(model, flag)

    @property
    def is_trainable(self) -> bool:
        return True

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True


def _part(model: Any, name: str) -> str:
    """Which of the parts of a model, or of its base model, a module or parameter is in: encoder, pooler, head."""
    return name.removeprefix(f"{model.base_model_prefix}.").partition(".")[0]


def _below(model: nn.Module, record: Mapping[str, Any]) -> dict[str, Any]:
    """See ``matched_record``.

    Raises:
        ArtifactError: the record is of another model.
    """
    try:
        return matched_record(model, record)
    except LookupError as error:
        raise ArtifactError(str(error.args[0])) from None


for registry in (auto.AUTO_QUANTIZATION_CONFIG_MAPPING, auto.AUTO_QUANTIZER_MAPPING):
    registry.pop(METHOD, None)  # where this module is imported anew (importlib.reload)


auto.register_quantization_config(METHOD)(PathpruneConfig)


auto.register_quantizer(METHOD)(PathpruneLoader)
