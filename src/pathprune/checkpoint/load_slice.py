"""Load a model at a size from a dense checkpoint with a sorted path beside it, reading that size's bytes only.

The model is built without weights, the path says which rows and columns of which maps the size keeps, and only
those are read from the safetensors files, as contiguous runs: one prefix where units are sorted, one a head in
attention. Whatever belongs to no pair (embeddings, norms) is read whole. The small weights then go through
``from_pretrained``, like those of any sliced model (``pathprune.checkpoint.hf``).
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pathprune.checkpoint.tensors import _Moved, _Told, _Weights, open_path, open_weights
from pathprune.errors import ArtifactError, MismatchError
from pathprune.family.budget import Budget
from pathprune.family.pairs import Pair, Slot
from pathprune.family.path import SolutionPath
from pathprune.family.selection import Selection
from pathprune.model.identity import check_base
from pathprune.model.linear import linear_map
from pathprune.transform.experts import scaled_stack, stacks
from pathprune.transform.folding import plain, sliced_map, through
from pathprune.transform.plan import Axis, plan
from pathprune.transform.record import PathpruneConfig

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
    """
    with open_path(folder) as (path, told):
        return _load(Path(folder), path, told, budget, model_class, options)


def _load(
    folder: Path, path: SolutionPath, told: _Told, budget: Budget, model_class: Any, options: dict[str, Any]
) -> nn.Module:
    if path.basis or set(path.fill) != set(path.fill_sum) or set(told.centre) != told.normal:
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
        weights = _Moved(weights, dense, told, 1 - selection.fraction)
        consumers = {pair.name: weights.names[f"{pair.consumer.module}.weight"] for pair in path.pairs if pair.fillable}
        trained = {name for name in path.fill if consumers[name] in weights.deltas}
        if trained != set(path.delta_sum) or trained & told.normal != told.delta_normal:
            raise ArtifactError(f"the path in {folder} lacks a part of what was trained; copy it again from its source")
        state, record = _sliced_state(dense, path, selection, weights, told)
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


def _sliced_state(
    dense: nn.Module, path: SolutionPath, selection: Selection, weights: _Weights, told: _Told
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What is left of every tensor of the checkpoint, and the record of its shapes."""
    axes, record = plan(dense, selection)
    parts: dict[str, list[tuple[Pair, Slot]]] = {}
    for pair in path.pairs:
        for slot in pair.slots:
            parts.setdefault(slot.module, []).append((pair, slot))
    state: dict[str, Tensor] = {}
    for name, axis in axes.items():
        weight, bias = _map(linear_map(dense, name), name, axis, parts[name], path, selection, weights, told)
        state[f"{name}.weight"] = weight
        if bias is not None:
            state[f"{name}.bias"] = bias
    for pair in path.pairs:
        if pair.stacked and not selection.keep[pair.name].all():
            for stack in stacks(pair, selection.keep[pair.name]):
                name = f"{stack.module}.{stack.parameter}"
                kept = weights.kept_of_each(name, stack.places, stack.dim)
                state[name] = scaled_stack(kept, stack, pair, selection)
    return state | {name: weights.whole(name) for name in weights.files if name not in state}, record


def _map(
    module: Any,
    name: str,
    axis: Axis,
    parts: list[tuple[Pair, Slot]],
    path: SolutionPath,
    selection: Selection,
    weights: _Weights,
    told: _Told,
) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of one sliced map: sliced as always, from one whose other weights are zero."""
    kept, inner = axis.places()[0], int((axis.side == "in") != isinstance(module, Conv1D))
    partly = copy.deepcopy(module)
    partly.weight = nn.Parameter(weights.kept(f"{name}.weight", kept, inner, module.weight.shape))
    if module.bias is not None:
        out = axis.side == "out"
        whole = weights.kept(f"{name}.bias", kept, 0, module.bias.shape) if out else weights.whole(f"{name}.bias")
        partly.bias = nn.Parameter(whole)

    def fold(
        weight: Tensor, bias: Tensor | None, pair: Pair, slot: Slot, selection: Selection
    ) -> tuple[Tensor, Tensor | None]:
        if pair.name not in path.fill:
            return plain(weight, bias, pair, slot, selection)
        total = torch.from_numpy(path.fill_sum[pair.name])
        if pair.name in path.delta_sum:
            total = total + (1 - selection.fraction) * torch.from_numpy(path.delta_sum[pair.name])
        if pair.name in told.centre:
            weight, added = told.fold(weight, pair, slot, selection)
            return weight, added + total if bias is None else bias.double() + added + total
        # Units that are left out are zero here, and so is their fill's share.
        total = total - through(path.fill[pair.name], weight, slot.index(pair.groups, pair.width))
        weight, bias = plain(weight, bias, pair, slot, selection)
        return weight, total if bias is None else bias + total

    weight, bias = sliced_map(partly, axis, parts, selection, fold)
    dtype = partly.weight.dtype
    return weight.to(dtype).contiguous(), None if bias is None else bias.to(dtype)
