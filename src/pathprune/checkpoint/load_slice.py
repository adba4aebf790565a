"""Load a model at a size from a dense checkpoint with a sorted path beside it, reading that size's bytes only.

The model is built without weights, the path says which rows and columns of which maps the size keeps, and only
those are read from the safetensors files, as contiguous runs: one prefix where units are sorted, one a head in
attention. Whatever belongs to no pair (embeddings, norms) is read whole. The small weights then go through
``from_pretrained``, like those of any sliced model (``pathprune.checkpoint.hf``).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from pathprune.checkpoint.tensors import PathTensors, open_path, open_weights
from pathprune.errors import ArtifactError, MismatchError
from pathprune.family.budget import Budget
from pathprune.family.learned import at_sparsity
from pathprune.family.pairs import Pair
from pathprune.family.path import SolutionPath
from pathprune.model.identity import check_base
from pathprune.transform.delta import WeightsAtSize, check_deltas
from pathprune.transform.folding import Moments
from pathprune.transform.plan import plan
from pathprune.transform.record import PathpruneConfig
from pathprune.transform.slicing import sliced_tensors
from pathprune.types import Floats

LAYERS = 1000  # more of them are a damaged config.json; to build them would take minutes


def load_slice(folder: str | os.PathLike[str], budget: Budget, *, model_class: Any = None, **options: Any) -> nn.Module:
    """The model that ``slice_model`` would cut from a checkpoint at ``budget``, loaded without the rest of it.

    Args:
        folder: a dense model as ``save_pretrained`` wrote it (safetensors), and a path as ``SolutionPath.save`` did,
            both from ``elastic`` or ``sort_units``.
        model_class: a class of ``transformers``, or one of its Auto classes; by default the one that was searched.
        **options: of ``from_pretrained``: ``dtype=``, ``device_map=``, ...

    Raises:
        ArtifactError: the folder lacks the model or the path, or a file cannot be read.
        MismatchError: the path belongs to other weights (a sample of every parameter is compared, as in
            ``slice_model``), or has rotations, which need weights of units that are left out.
        BudgetError: see ``SolutionPath.select``.

    Example:
        >>> ordered, sorted_path = pp.sort_units(model, path)
        >>> pp.save_model(ordered, folder / "family", path=sorted_path)
        >>> half = pp.load_slice(folder / "family", pp.Budget(keep=0.5))  # reads the bytes of half
    """
    with open_path(folder) as (path, centre, tensors):
        return _load(Path(folder), path, centre, tensors, budget, model_class, options)


def _load(
    folder: Path,
    path: SolutionPath,
    centre: dict[str, Floats],
    tensors: PathTensors,
    budget: Budget,
    model_class: Any,
    options: dict[str, Any],
) -> nn.Module:
    normal = tensors.of("normal")
    if path.basis or set(path.fill) != set(path.fill_sum) or set(centre) != normal:
        raise MismatchError(
            f"the path in {folder} needs all weights of a head or a map to make a small one; sort its model once with "
            "pathprune.sort_units(model, path), or train it with pathprune.elastic, and save the model and path that "
            "come back"
        )
    selection, architecture = path.select(budget), path.pairs.base.architecture
    searched = getattr(transformers, architecture, None)
    if not (isinstance(searched, type) and issubclass(searched, transformers.PreTrainedModel)):
        searched = model_class
    if searched is None:
        raise ArtifactError(f"transformers has no {architecture}, which the path was found in; pass it as model_class=")
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
        _check_depth(config.to_dict())
        dense = _empty(searched, config)
        kind = dense if model_class is None else _empty(model_class, config)
    except Exception as error:  # what a configuration that is none leads to is up to each architecture
        raise ArtifactError(f"cannot build a {architecture} from {folder}: {type(error).__name__}: {error}") from error
    with open_weights(folder) as weights:
        weights.tie(dense)
        check_base(dense, path.pairs, weights.sample)
        check_deltas(dense, {name: tensors.shape(f"delta/{name}") for name in tensors.of("delta")})
        deltas = tensors.deltas(weights.stored)
        consumers = {
            pair.name: weights.stored[f"{pair.consumer.module}.weight"] for pair in path.pairs if pair.fillable
        }
        trained = {name for name in path.fill if consumers[name] in deltas.names}
        if trained != set(path.delta_sum) or trained & normal != tensors.of("delta_normal"):
            raise ArtifactError(f"the path in {folder} lacks a part of what was trained; copy it again from its source")
        axes, record = plan(dense, selection)
        source = WeightsAtSize(weights, deltas, selection.sparsity)
        moments = StoredMoments(path, centre, tensors, selection.sparsity)
        state = dict(sliced_tensors(source, dense, axes, selection, moments))
    config.quantization_config = PathpruneConfig(record, selection.to_dict()).to_dict()
    options.setdefault("dtype", options.pop("torch_dtype", "auto"))
    small = type(kind).from_pretrained(None, config=config, state_dict=state, **options)
    if small.can_generate() and (folder / "generation_config.json").exists():
        small.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    return small


def _check_depth(config: Mapping[str, Any]) -> None:
    for key, value in config.items():
        if isinstance(value, Mapping):
            _check_depth({str(name): entry for name, entry in value.items()})
        elif isinstance(value, int) and key.endswith(("layers", "experts", "blocks")) and value > LAYERS:
            raise ValueError(f"{key}={value} in its configuration is more than {LAYERS}")


def _empty(kind: Any, config: Any) -> Any:
    """A model without weights."""
    with torch.device("meta"):
        return kind.from_config(config) if hasattr(kind, "from_config") else kind(config)


class StoredMoments(Moments):
    """What a sorted path has stored, so that weights of the units that go need not be read."""

    needs_all = False

    def __init__(self, path: SolutionPath, centre: dict[str, Floats], tensors: PathTensors, sparsity: float) -> None:
        super().__init__(path.fill, centre, {})
        self.path, self.tensors, self.sparsity = path, tensors, sparsity

    def constant(self, pair: Pair, weight: Tensor) -> Tensor:
        total = torch.from_numpy(self.path.fill_sum[pair.name])
        if pair.name in self.path.delta_sum:
            total = at_sparsity(total, torch.from_numpy(self.path.delta_sum[pair.name]), self.sparsity)
        return total

    def covariance(self, pair: Pair, kept: Tensor) -> Tensor:
        inner, columns = len(self.centre[pair.name]), int(kept.max()) + 1 if len(kept) else 0
        rows = self.tensors.rows(f"covariance/{pair.name}", kept.numpy(), (inner, inner), columns)
        return rows.double()[:, kept]

    def normal(self, pair: Pair, kept: Tensor, weight: Tensor) -> Tensor:
        def rows(array: str) -> Tensor:
            shape = (len(self.centre[pair.name]), pair.consumer.size)
            return self.tensors.rows(f"{array}/{pair.name}", kept.numpy(), shape, pair.consumer.size)

        if pair.name not in self.tensors.of("delta_normal"):
            return rows("normal")
        return at_sparsity(rows("normal"), rows("delta_normal"), self.sparsity)
