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

import copy
import ctypes
import json
import os
import re
import shutil
import warnings
import zlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.core_model_loading import PrefixChange
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from pathprune.artifact import beside, content_hash, left, named_folder, open_regular, read_json
from pathprune.budget import Selection
from pathprune.errors import ArtifactError, MismatchError, UnsupportedModelError
from pathprune.experts import check_experts
from pathprune.path import SolutionPath
from pathprune.shapes import SCALES, SIZE_ATTRIBUTES, shape_attention, shape_modules

METHOD = "pathprune (pip install pathprune, then `import pathprune` before loading this model)"
FORMAT = 1
MOST_MODULES = 100_000  # in a shape record
WEIGHTS, SHAPES = "model.safetensors", "pathprune.json"  # of a model of another library
# Of tokenizers, processors and modules of sentence-transformers.
BESIDE = ["*.json", "*.txt", "*.model", "*.spm", "*.jinja", "*.tiktoken", "[0-9]_*/*"]
# Of a dense model alone.
DENSE_FILES = (
    ".safetensors",
    ".bin",
    ".h5",
    ".msgpack",
    ".onnx",
    ".pt",
    ".gguf",
    ".index.json",
    "README.md",
    "path.json",
)
MODEL_FILES = r"(model|pytorch_model)[-.].*(safetensors|bin|index\.json)"  # would be read in place of newer ones
PATH_FILES = r"path\.json|path-[0-9a-f]{12}\.safetensors"


class PathpruneConfig(QuantizationConfigMixin):
    """The shape record of a sliced model, in its configuration.

    Args:
        record: what ``pathprune.slicing`` describes.
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


class PathpruneLoader(HfQuantizer):
    """Shapes a model before its weights arrive."""

    requires_calibration = False

    quantization_config: PathpruneConfig

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        record = _below(model, self.quantization_config.record)
        shape_modules(model, record, doubtful=not self.quantization_config.signed)
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
        _attach(model, self.quantization_config)
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


def attach_record(model: Any, record: Mapping[str, Any], selection: Selection) -> None:
    """Write a shape record into a sliced model's configuration; onto the model where it is of another library."""
    config = PathpruneConfig(record, selection.to_dict())
    if _of_transformers(model):
        _attach(model, config)
    else:
        model.pathprune = config


def _attach(model: Any, config: PathpruneConfig) -> None:
    """Also to the configurations of its parts, so that a tower of CLIP saves and loads alone, too."""
    own_names(model)
    owners: set[int] = set()
    for name, part in model.named_modules():
        if not _of_transformers(part) or id(part.config) in owners:
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
        if _of_transformers(part):
            part._weight_conversions = []  # type: ignore[assignment]


def _of_transformers(model: Any) -> bool:
    from transformers import PreTrainedModel  # late: its module is what imports this one

    return isinstance(model, PreTrainedModel)


def load_model(model: nn.Module, folder: str | os.PathLike[str]) -> nn.Module:
    """Give a model of another library than transformers the shapes and weights that ``save_model`` wrote.

    Args:
        model: the dense model as its own library builds it; changed in place. Its weights do not matter.

    Returns:
        ``model``.

    Raises:
        ArtifactError: the folder holds no such model, or that of another architecture.
    """
    folder = Path(folder)
    try:
        described = read_json(folder / SHAPES)
        if not isinstance(described, dict):
            raise ValueError(f"{SHAPES} is not a JSON object")
        recorded = described.pop("tensors", None)  # 0.1.0 wrote none
        config: Any = PathpruneConfig.from_dict(described)
        found = _checksums(folder / WEIGHTS)
        if recorded is not None and recorded != found:
            both = recorded if isinstance(recorded, dict) else {}
            wrong = next(name for name in (*found, *both, "everything") if found.get(name) != both.get(name))
            raise ValueError(f"{wrong} in {WEIGHTS} does not have the recorded checksum; it was altered")
        shape_modules(model, config.record, doubtful=not config.signed)
        safetensors.torch.load_model(model, folder / WEIGHTS)
        shape_attention(model, config.record)
    except (
        OSError,
        ValueError,
        TypeError,
        AttributeError,
        ArtifactError,
        MismatchError,
        RuntimeError,
        SafetensorError,
    ) as error:
        raise ArtifactError(
            f"cannot load {folder} into a {type(model).__name__}: {error}. "
            "Build the model as it was built before it was searched, and give the folder that save_model wrote"
        ) from error
    model.pathprune = config
    return model


def _checksums(weights: Path) -> dict[str, int]:
    """CRC-32 of each tensor of a file.

    Raises:
        ValueError: it holds numbers that are not finite, or none but integers where weights should be.
    """
    open_regular(weights).close()
    found = {}
    with safe_open(weights, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118, it is no dict
            tensor = file.get_tensor(name).contiguous()
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise ValueError(f"{name} in {weights.name} has numbers that are not finite")
            found[name] = zlib.crc32(tensor.flatten().view(torch.uint8).numpy())
    return found


def save_model(
    model: Any,
    folder: str | os.PathLike[str],
    *,
    source: str | os.PathLike[str] | None = None,
    card: str | None = None,
    path: SolutionPath | None = None,
) -> None:
    """``save_pretrained`` into a folder that is complete or not there at all.

    A model that is there is replaced; other files and folders beside it stay. Whatever ends this call, a kill too, the
    folder then holds a whole model with all that stood beside it, the old one or the new one; what a killed run left
    beside the folder goes with the next call. (Where the system cannot exchange two folders in one step, or the file
    system has no hard links, a kill at one moment of it leaves the old model under a hidden name, and the next call
    brings it back.) A model of another library becomes ``model.safetensors`` and ``pathprune.json``; ``load_model``
    reads them.

    Args:
        source: folder or hub id of the dense model, whose tokenizer and other small files come along. Where the hub
            has none to give, a warning says so, and the model is saved without.
        card: content of ``README.md``.
        path: of this model, from ``elastic`` or ``sort_units``, saved into the same folder in the same step.

    Raises:
        ArtifactError: the folder cannot be written, holds something that is not a model, or is ``source``.
    """
    folder = check_free(folder, *([] if source is None else [source]))
    files = None if source is None else _small_files(source, model)
    with beside(folder) as (part, old):
        try:
            part.mkdir(parents=True)
            if files is not None:
                shutil.copytree(files, part, ignore=_not_beside(Path(files)), dirs_exist_ok=True)
            if _of_transformers(model):
                try:
                    model.save_pretrained(part)
                except RuntimeError as error:  # of weights that two modules hold, undeclared
                    raise ArtifactError(
                        f"transformers cannot save the {type(model).__name__}: {str(error)[:200]}. A layer that the "
                        "model holds twice belongs into its _tied_weights_keys; or give each place a copy, by "
                        "copy.deepcopy"
                    ) from error
            else:
                safetensors.torch.save_model(model, str(part / WEIGHTS))
                described = {**model.pathprune.to_dict(), "tensors": _checksums(part / WEIGHTS)}
                (part / SHAPES).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
            if card is not None:
                (part / "README.md").write_text(card, encoding="utf-8")
            if path is not None:
                path.save(part)
            _to_disk(part)
            _put(part, folder, old)
        except (OSError, SafetensorError) as error:
            raise ArtifactError(
                f"cannot write the model to {folder}: {error}; nothing was changed. "
                "Free some space, or choose a folder that you may write to"
            ) from error
        finally:
            _settle(folder, part, old)


def check_free(folder: str | os.PathLike[str], *sources: str | os.PathLike[str]) -> Path:
    """Where a model may be written: the folder that ``folder`` is, or links to; without what a killed run left there.

    Args:
        sources: folders or hub ids of the models that the new one comes from.

    Raises:
        ArtifactError: it holds something that is not a model, or is one of the sources.
    """
    folder = named_folder(folder).resolve()
    if any(Path(source).resolve() == folder for source in sources):
        raise ArtifactError(
            f"{folder} is the model that this one was made from, and would be lost; choose another folder"
        )
    for rest in left(folder.parent, re.escape(folder.name)):
        if back := _settle(folder, rest.with_suffix(".part"), rest.with_suffix(".old")):
            warnings.warn(f"a run was killed while it replaced the model in {folder}; {back} is back", stacklevel=3)
    try:
        held = folder.is_dir() and any(folder.iterdir())
    except OSError as error:
        raise ArtifactError(f"cannot read {folder}: {error.strerror or error}; choose another folder") from error
    if (folder.exists() and not folder.is_dir()) or (
        held and not any((folder / name).exists() for name in ("config.json", SHAPES))
    ):
        raise ArtifactError(f"{folder} exists and is not a model folder; choose another folder, or remove it")
    return folder


def _to_disk(folder: Path) -> None:
    """Have every file reach the disk before the old model goes, in case the machine stops."""
    for file in folder.rglob("*"):
        if file.is_file():
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())


def _put(part: Path, folder: Path, old: Path) -> None:
    """Rename a complete model into place. What was there gets the name ``old``; ``_settle`` goes on from wherever
    this ends.
    """
    if not folder.exists():
        part.rename(folder)
    elif _link_rest(folder, part) and _exchange(part, folder):
        with suppress(OSError):  # nothing but the old model is in it
            part.rename(old)
    else:
        folder.rename(old)
        part.rename(folder)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange the names of two folders in one step; False where the system cannot (Linux can)."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None) if os.name == "posix" else None
    here, exchange = -100, 2  # AT_FDCWD, which absolute paths do not use, and RENAME_EXCHANGE
    return rename is not None and rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


def _settle(folder: Path, part: Path, old: Path) -> str:
    """Finish a replacement, or undo it: ``folder`` holds the new model or else the old, with all that stood beside it,
    and ``part`` and ``old`` are gone.

    Returns:
        What was brought back, in words.

    Raises:
        ArtifactError: it cannot be; ``old`` still holds it.
    """
    back = ""
    try:
        if os.path.exists(old) and not folder.exists():
            old.rename(folder)
            back = "the old one"
        shutil.rmtree(part, ignore_errors=True)
        if os.path.exists(old):  # it is False of names that are too long
            for rest in _rest(old, folder):
                rest.rename(folder / rest.name)
                back = "what stood beside it"
            with suppress(OSError):
                old.rename(part)  # nothing in it is wanted any more
    except OSError as error:
        raise ArtifactError(
            f"what stood in {folder} is still in {old} ({error.strerror or error}); move what you need yourself"
        ) from error
    for gone in (part, old):
        shutil.rmtree(gone, ignore_errors=True)
    return back


def _rest(old: Path, new: Path) -> list[Path]:
    """What stands beside the old model, is no part of it, and is not beside the new one."""
    paths = (old / "path.json").exists() and (new / "path.json").exists()  # the tensors of the old one go with it
    parts = f"{MODEL_FILES}|{PATH_FILES}" if paths else MODEL_FILES
    return [rest for rest in old.iterdir() if not (os.path.lexists(new / rest.name) or re.fullmatch(parts, rest.name))]


def _link_rest(folder: Path, part: Path) -> bool:
    """Give all that stands beside the old model a second name beside the new one, so that it is there whichever of the
    two is; False where the file system has no such links, and the rest must be moved later.
    """
    rest = _rest(folder, part)
    try:
        for one in rest:
            if one.is_dir() and not one.is_symlink():
                shutil.copytree(one, part / one.name, symlinks=True, copy_function=os.link)
            elif one.is_symlink():
                os.symlink(os.readlink(one), part / one.name)
            else:
                os.link(one, part / one.name)
    except OSError:
        for one in rest:
            with suppress(OSError):
                (part / one.name).unlink()
            shutil.rmtree(part / one.name, ignore_errors=True)
        return False
    return True


def _small_files(source: str | os.PathLike[str], model: Any) -> str | os.PathLike[str] | None:
    """A folder that holds what stands beside the dense model's weights: its own, or the hub's in the cache."""
    if Path(source).is_dir():
        return source
    revision = getattr(getattr(model, "config", None), "_commit_hash", None)  # the one that was loaded
    reason: Exception | None = None
    for cached in (False, True):  # what is in the cache does where the hub is out of reach
        try:
            return snapshot_download(str(source), revision=revision, allow_patterns=BESIDE, local_files_only=cached)
        except (OSError, ValueError) as error:
            reason = reason or error
    warnings.warn(
        f"the model is saved without a tokenizer or processor: {source} gave none ({reason}). "
        "Save it into the folder yourself, by its own save_pretrained",
        stacklevel=3,
    )
    return None


def _not_beside(source: Path) -> Callable[[str, list[str]], list[str]]:
    """For ``shutil.copytree``: what belongs to the dense model alone, its weights, a path, and folders that are neither
    modules of sentence-transformers nor chat templates.
    """
    try:
        modules = {module["path"] for module in json.loads((source / "modules.json").read_text(encoding="utf-8"))}
    except (OSError, ValueError, TypeError, KeyError):  # there are none, or nobody could read them anyway
        modules = set()

    def ignore(folder: str, names: list[str]) -> list[str]:
        here = Path(folder)
        if here != source:
            return []
        folders = {name for name in names if (here / name).is_dir()} - modules - {"additional_chat_templates"}
        return [name for name in names if name in folders or name.endswith(DENSE_FILES) or name.startswith(".")]

    return ignore


def _below(model: nn.Module, record: Mapping[str, Any]) -> dict[str, Any]:
    """The record's module names as they are in ``model``.

    A record written for a model with a task head holds for its base model, and the other way
    round; their names differ by the base model's prefix. One written for a tower holds wherever that is.
    """
    modules = [name for name, _ in model.named_modules()]
    known = set(modules)
    prefix = getattr(model, "base_model_prefix", "") + "."
    inside: dict[str, list[str]] = {}  # end of a name -> the names that end so

    def rename(name: str) -> str:
        for candidate in (name, prefix + name, name.removeprefix(prefix)):
            if candidate in known:
                return candidate
        if not inside:
            for module in modules:
                parts = module.split(".")
                for depth in range(1, len(parts)):
                    inside.setdefault(".".join(parts[depth:]), []).append(module)
        if len(found := inside.get(name, [])) == 1:
            return found[0]
        raise ArtifactError(
            f"the shape record names {name[:200]}, which {type(model).__name__} does not have; "
            "load it with the class it was saved from, or with another of the same base model"
        )

    renamed: dict[str, Any] = {}
    for part, entries in record.items():
        renamed[part] = {rename(name): value for name, value in entries.items()}
        if len(renamed[part]) < len(entries):
            raise ArtifactError(f"the shape record names a module of {type(model).__name__} twice among its {part}")
    return renamed


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


for registry in (auto.AUTO_QUANTIZATION_CONFIG_MAPPING, auto.AUTO_QUANTIZER_MAPPING):
    registry.pop(METHOD, None)  # where this module is imported anew (importlib.reload)
auto.register_quantization_config(METHOD)(PathpruneConfig)
auto.register_quantizer(METHOD)(PathpruneLoader)
