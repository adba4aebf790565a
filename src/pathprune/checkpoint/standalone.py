"""Folders that open where pathprune is not installed, by code that they bring along.

``config.json`` holds the shape record under ``pathprune``, a ``model_type`` that no release of transformers has, and an
``auto_map`` to ``modeling_pathprune.py``. That file is ``pathprune.transform.modules``, as it is, and a class for each
head that the architecture has, which calls the stock class's ``__init__`` and then shapes its maps. Nothing stands in
the slot for quantisation. Whoever does not trust the code gets transformers' own error, which says how to.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers

from pathprune.errors import UnsupportedModelError
from pathprune.transform import modules

CODE = "modeling_pathprune.py"
KEY = "pathprune"

SLICED = '''

class Sliced:
    """Stands before a class of transformers, and gives its maps the shapes that the configuration records."""

    _checkpoint_conversion_mapping = {}

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        record = matched_record(self, config.pathprune["record"])
        shape_modules(self, record)
        for name in (*record["modules"], *record["parameters"]):
            module = self.get_submodule(name)
            if not any(parameter.is_meta for parameter in module.parameters()):
                self._init_weights(module)
        shape_attention(self, record)
        for part in self.modules():
            if isinstance(part, PreTrainedModel):
                part._weight_conversions = []  # weights stand under the names of these modules
                part._get_static_cache_init_shape = _unknown  # heads are counted in the configuration


def _unknown():
    return None
'''


def write_code(model: Any, folder: Path, record: Mapping[str, Any]) -> None:
    """Make a folder that ``save_pretrained`` wrote one that opens by itself.

    Args:
        record: the shape record, with ``selection``, ``format`` and ``sha256``.

    Raises:
        UnsupportedModelError: the model's classes are not those of transformers.
    """
    kind, config_kind = type(model), type(model.config)
    for one in (kind, config_kind):
        if not one.__module__.startswith("transformers."):
            raise UnsupportedModelError(
                f"{one.__name__} is from {one.__module__}, not from transformers, and a folder that opens by itself "
                "builds on transformers' own classes; save it with standalone=False"
            )
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config.pop("quantization_config", None)
    heads = _heads(model)
    config |= {
        "model_type": f"pathprune_{model.config.model_type}",
        KEY: dict(record),
        "auto_map": {
            "AutoConfig": f"{Path(CODE).stem}.{_name(config_kind)}",
            **{auto: f"{Path(CODE).stem}.{_name(head)}" for auto, head in heads.items()},
        },
        "architectures": [_name(kind)],
    }
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (folder / CODE).write_text(_code(model, {*heads.values(), kind}), encoding="utf-8")


def _name(kind: type) -> str:
    return f"Sliced{kind.__name__}"


def _heads(model: Any) -> dict[str, type]:
    """Name of an Auto class -> the class that it gives for this configuration."""
    kind = type(model)
    found: dict[str, type] = {}
    for name in dir(transformers):
        mapping = getattr(getattr(transformers, name), "_model_mapping", None) if name.startswith("AutoModel") else None
        if mapping is None or type(model.config) not in mapping:
            continue
        heads = mapping[type(model.config)]
        heads = heads if isinstance(heads, tuple) else (heads,)
        found[name] = kind if kind in heads else heads[0]
    return found or {"AutoModel": kind}


def _code(model: Any, heads: set[type]) -> str:
    config = type(model.config)
    imports = {f"from {one.__module__} import {one.__name__}" for one in (config, *heads)}
    source = inspect.getsource(modules)
    begin = source.index("import warnings")
    classes = [f'class {_name(config)}({config.__name__}):\n    model_type = "pathprune_{model.config.model_type}"\n']
    classes += [
        f"class {_name(head)}(Sliced, {head.__name__}):\n    config_class = {_name(config)}\n"
        for head in sorted(heads, key=lambda head: head.__name__)
    ]
    head = (
        f'"""A {type(model).__name__} that pathprune sliced: its maps have the shapes that config.json records.\n\n'
        'Written by pathprune (Apache-2.0); needs torch and transformers only.\n"""\n\n'
        "from __future__ import annotations\n\n"
    )
    own = source[begin:].replace(
        "from transformers.pytorch_utils import Conv1D\n",
        "\n".join(sorted(["from transformers import PreTrainedModel", *imports]))
        + "\nfrom transformers.pytorch_utils import Conv1D\n",
    )
    return head + own.rstrip() + "\n" + SLICED + "\n\n" + "\n\n".join(classes)
