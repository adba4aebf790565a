"""A sliced model into a folder."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError

from pathprune.checkpoint.folders import check_free, flush_to_disk, put_in_place, settle
from pathprune.checkpoint.other_libraries import SHAPES, WEIGHTS, tensor_checksums
from pathprune.checkpoint.standalone import write_code
from pathprune.errors import ArtifactError, UnsupportedModelError
from pathprune.family.files import beside
from pathprune.family.path import SolutionPath
from pathprune.transform.attach import is_transformers_model
from pathprune.transform.record import PathpruneConfig

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


def save_model(
    model: Any,
    folder: str | os.PathLike[str],
    *,
    source: str | os.PathLike[str] | None = None,
    card: str | None = None,
    path: SolutionPath | None = None,
    standalone: bool = False,
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
        standalone: have the folder bring the little code that it needs, so that it opens with
            ``trust_remote_code=True`` where pathprune is not installed (``pathprune.checkpoint.standalone``).
        path: of this model, from ``elastic`` or ``sort_units``, saved into the same folder in the same step.

    Raises:
        ArtifactError: the folder cannot be written, holds something that is not a model, or is ``source``.

    Example:
        >>> small = pp.slice_model(model, path.select(pp.Budget(keep=0.5)))
        >>> pp.save_model(small, folder / "half")
        >>> loaded = AutoModel.from_pretrained(folder / "half")  # any process that imported pathprune
        >>> loaded.num_parameters() == small.num_parameters() < model.num_parameters()
        True
    """
    recorded: Any = getattr(getattr(model, "config", None), "quantization_config", None)
    if standalone and not isinstance(recorded, PathpruneConfig):
        raise UnsupportedModelError(
            f"standalone=True is for sliced models of transformers; the {type(model).__name__} is none"
        )
    folder = check_free(folder, *([] if source is None else [source]))
    files = None if source is None else _small_files(source, model)
    with beside(folder) as (part, old):
        try:
            part.mkdir(parents=True)
            if files is not None:
                shutil.copytree(files, part, ignore=_not_beside(Path(files)), dirs_exist_ok=True)
            if is_transformers_model(model):
                try:
                    model.save_pretrained(part)
                except RuntimeError as error:  # of weights that two modules hold, undeclared
                    raise ArtifactError(
                        f"transformers cannot save the {type(model).__name__}: {str(error)[:200]}. A layer that the "
                        "model holds twice belongs into its _tied_weights_keys; or give each place a copy, by "
                        "copy.deepcopy"
                    ) from error
                if standalone:
                    write_code(model, part, recorded.to_dict())
            else:
                safetensors.torch.save_model(model, str(part / WEIGHTS))
                described = {**model.pathprune.to_dict(), "tensors": tensor_checksums(part / WEIGHTS)}
                (part / SHAPES).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
            if card is not None:
                (part / "README.md").write_text(card, encoding="utf-8")
            if path is not None:
                path.save(part)
            flush_to_disk(part)
            put_in_place(part, folder, old)
        except (OSError, SafetensorError) as error:
            raise ArtifactError(
                f"cannot write the model to {folder}: {error}; nothing was changed. "
                "Free some space, or choose a folder that you may write to"
            ) from error
        finally:
            settle(folder, part, old)


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
