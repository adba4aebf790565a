"""Load a model at a size from a dense checkpoint with a sorted path beside it, reading that size's bytes only.

The model is built without weights, the path says which rows and columns of which maps the size keeps, and only
those are read from the safetensors files, as contiguous runs: one prefix where units are sorted, one a head in
attention. Whatever belongs to no pair (embeddings, norms) is read whole. The small weights then go through
``from_pretrained``, like those of any sliced model (``pathprune.hub``).
"""

from __future__ import annotations

import copy
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pathprune.artifact import open_artifact, open_regular, read_json, reading
from pathprune.budget import Budget, Selection
from pathprune.compensation import folded
from pathprune.delta import moved
from pathprune.discovery import check_base
from pathprune.errors import ArtifactError, MismatchError
from pathprune.experts import scaled_stack, stacks
from pathprune.hub import PathpruneConfig
from pathprune.pairs import Ints, Pair, Slot
from pathprune.path import CHECKS, FORMAT, LARGE, Floats, SolutionPath, check_array, line_checks
from pathprune.shapes import linear_map
from pathprune.slicing import Axis, by_places, plain, plan, sliced_map, through

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
    with _opened_path(folder) as (path, told):
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
    with _opened(folder) as weights:
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


class _Told:
    """What compensation needs of a sorted path (``pathprune.compensation``), read by parts.

    Args:
        folder: of the path.
        centre: pair name -> (N,).
        tensors: the covariances and normal equations, and the deltas.
    """

    def __init__(self, folder: str | os.PathLike[str], centre: dict[str, Floats], tensors: _Weights) -> None:
        self.folder, self.centre, self.tensors = folder, centre, tensors
        self.normal, self.delta_normal = (
            {name.removeprefix(part) for name in tensors.files if name.startswith(part)}
            for part in ("normal/", "delta_normal/")
        )

    def fold(self, weight: Tensor, pair: Pair, slot: Slot, selection: Selection) -> tuple[Tensor, Tensor]:
        """As ``pathprune.slicing.compensate``; (d,) is without the constants of all units."""
        centre = torch.from_numpy(self.centre[pair.name]).double()
        left, scale, constants = by_places(pair, selection, centre)
        kept, inner, columns = left.numpy(), len(centre), int(left.max()) + 1 if len(left) else 0
        with reading(self.folder, "path"):
            covariance = self.tensors.rows(f"covariance/{pair.name}", kept, (inner, inner), columns)
            normal = self.tensors.rows(f"normal/{pair.name}", kept, (inner, slot.size), slot.size)
            if pair.name in self.delta_normal:
                more = self.tensors.rows(f"delta_normal/{pair.name}", kept, (inner, slot.size), slot.size)
                normal = normal + (1 - selection.fraction) * more
        places = torch.from_numpy(slot.index(pair.groups, pair.width).ravel())[left]
        ours, added = folded(
            covariance.double()[:, left], normal, weight[places].double(), scale[left], centre[left], constants[left]
        )
        return weight.double().index_copy(0, places, ours), added


class _Weights:
    """The tensors of a checkpoint, read by parts.

    Args:
        files: name of a tensor -> the open file that holds it.
        names: name of a parameter -> that of the tensor it is tied to.
    """

    def __init__(self, files: dict[str, Any]) -> None:
        self.files = files
        self.names: dict[str, str] = {}

    def tie(self, model: Any) -> None:
        """Learn which parameters of ``model`` are one and the same, of which a checkpoint holds one.

        A part that a checkpoint may lack as a whole, such as a pooler, is taken from the model, too.
        """
        alike: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            alike.setdefault(id(parameter), []).append(name)
        base = f"{getattr(model, 'base_model_prefix', '')}."

        def part(name: str) -> str:
            return name.removeprefix(base).partition(".")[0]

        held = {names[0]: next((name for name in names if name in self.files), None) for names in alike.values()}
        there = {part(name) for names in alike.values() if held[names[0]] for name in names}
        for names in alike.values():
            tensor = held[names[0]]
            if tensor is None:
                if not there or any(part(name) in there or "." not in name.removeprefix(base) for name in names):
                    raise ArtifactError(
                        f"the checkpoint has no {names[0]}, which {type(model).__name__} has; save the model that "
                        "pathprune.sort_units or pathprune.elastic gave with save_pretrained"
                    )
                for name in names:
                    owner = model.get_submodule(base[:-1]) if name.startswith(base) else model
                    setattr(owner, part(name), None)
                continue
            dtype = self.files[tensor].get_slice(tensor).get_dtype()
            if not dtype.startswith(("F", "BF")):
                raise ArtifactError(f"the checkpoint's {tensor} holds {dtype}, not floating-point numbers")
            self.names |= dict.fromkeys(names, tensor)
        self.parameters = set(self.names.values())

    def whole(self, name: str) -> Tensor:
        tensor: Tensor = self.files[name].get_tensor(name)
        self._check(name, tensor, None)
        return tensor

    def _check(self, name: str, read: Tensor, places: Ints | None, *where: Any) -> None:
        """Refuse numbers that are not finite.

        Raises:
            ValueError: there are some.
        """
        if name in self.parameters and not torch.isfinite(read.float()).all():
            raise ValueError(f"{name} has values that are not finite")

    def sample(self, name: str, places: range) -> Tensor:
        """Single values, by their places in the flattened tensor."""
        name = self.names[name]
        part = self.files[name].get_slice(name)
        shape = part.get_shape()
        if not shape:
            return self.whole(name).flatten()
        values = []
        for place in places:
            at = np.unravel_index(place, shape)
            values.append(part[tuple(slice(int(i), int(i) + 1) for i in at)].flatten())
        return torch.cat(values) if values else torch.empty(0)

    def rows(self, name: str, places: Ints, shape: tuple[int, int], columns: int) -> Tensor:
        """The first columns of some rows of a matrix.

        Raises:
            ValueError: it has not that shape.
        """
        found = tuple(self.files[name].get_slice(name).get_shape())
        if found != shape:
            raise ValueError(f"{name} has shape {found}, not {shape}")
        return self._runs(name, (), places, 0, (slice(0, columns),))

    def kept(self, name: str, places: Ints, dim: int, shape: torch.Size) -> Tensor:
        """A tensor of which only some rows (``dim`` 0) or columns (1) are read, run by run; the others are zero."""
        read = self._runs(name, (slice(None),) * dim, places, dim)
        return read.new_zeros(shape).index_copy(dim, torch.from_numpy(places), read)

    def kept_of_each(self, name: str, places: Ints, dim: int) -> Tensor:
        """The same of stacked maps, (experts, ...), by expert; ``places`` is (experts, kept)."""
        each = [
            self._runs(name, (slice(expert, expert + 1), *(slice(None),) * (dim - 1)), row, dim)
            for expert, row in enumerate(places)
        ]
        return torch.cat(each)

    def _runs(
        self, name: str, ahead: tuple[slice, ...], places: Ints, dim: int, behind: tuple[slice, ...] = ()
    ) -> Tensor:
        part = self.files[name].get_slice(name)
        runs = np.split(places, np.flatnonzero(np.diff(places) != 1) + 1)
        edges = [(int(run[0]), int(run[-1]) + 1) for run in runs if len(run)] or [(0, 0)]
        read = torch.cat([part[(*ahead, slice(*edge), *behind)] for edge in edges], dim)
        self._check(name, read, places, dim, ahead)
        return read


class _OfPath(_Weights):
    """The large tensors of a path, whose parts carry checksums (``pathprune.path.checks``; 0.1.0 wrote none)."""

    def __init__(self, files: dict[str, Any], checks: Mapping[str, npt.NDArray[Any]]) -> None:
        super().__init__(files)
        self.checks = checks

    def _check(self, name: str, read: Tensor, places: Ints | None, *where: Any) -> None:
        if not read.is_floating_point():
            raise ValueError(f"the {name} holds {read.dtype}, not floating-point numbers")
        if not torch.isfinite(read).all():
            raise ValueError(f"the {name} is not finite")
        dim, ahead = where or (max(0, read.dim() - 2), ())
        written = self.checks.get(f"check{dim}/{name}")
        if written is None:
            return
        array = read.numpy()
        if name.startswith("covariance/"):  # rows up to the diagonal have checksums, and the rest is the same again
            assert places is not None
            square = array[:, places]
            same = np.array_equal(square, square.T)
            found = np.array(
                [zlib.crc32(row[: at + 1]) for row, at in zip(array, places, strict=True)], dtype=np.uint32
            )
        else:
            same, found = True, line_checks(array, dim)
        expected = written if places is None else written[(*ahead[: read.dim() - 2], ..., places)]
        if not same or not np.array_equal(found, expected):
            raise ValueError(f"the {name} does not have the recorded checksums; it was altered")


class _Moved(_Weights):
    """A checkpoint's tensors with a share of a path's deltas added.

    Raises:
        MismatchError: the checkpoint has no such parameter, or one of another shape.
    """

    def __init__(self, weights: _Weights, model: nn.Module, told: _Told, share: float) -> None:
        super().__init__(weights.files)
        self.names, self.parameters = weights.names, weights.parameters
        self.told, self.share = told, share
        self.deltas: dict[str, str] = {}
        shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        for key, file in told.tensors.files.items():
            part, _, name = key.partition("/")
            if part == "delta":
                if shapes.get(name) != (shape := tuple(file.get_slice(key).get_shape())):
                    raise MismatchError(f"the path has a delta for {name} of shape {shape}, which the model has not")
                self.deltas[weights.names[name]] = key

    def whole(self, name: str) -> Tensor:
        return self._moved(super().whole(name), name, lambda key: self.told.tensors.whole(key))

    def _runs(self, name: str, *at: Any) -> Tensor:
        return self._moved(super()._runs(name, *at), name, lambda key: self.told.tensors._runs(key, *at))

    def _moved(self, tensor: Tensor, name: str, read: Callable[[str], Tensor]) -> Tensor:
        if name not in self.deltas:
            return tensor
        with reading(self.told.folder, "path"):
            delta = read(self.deltas[name])
        return moved(tensor, delta, self.share)


@contextmanager
def _opened_path(folder: str | os.PathLike[str]) -> Iterator[tuple[SolutionPath, _Told]]:
    """The path without its moments, and those to be read by parts."""

    def open_tensors(file: Path) -> Any:
        open_regular(file).close()
        return safe_open(file, framework="pt")

    meta, opened = open_artifact(folder, "path", FORMAT, open_tensors)
    with ExitStack() as stack:
        with reading(folder, "path"):
            tensors = stack.enter_context(opened)
            names = set(tensors.keys())
            large = {name for name in names if name.partition("/")[0] in LARGE}
            if wrong := [name for name in large if not tensors.get_slice(name).get_dtype().startswith("F")]:
                raise ValueError(f"{wrong[0]} holds no floating-point numbers")
            small = {name: tensors.get_tensor(name).numpy() for name in names - large}
            prefixed = {name: small.pop(name) for name in names if name.startswith("centre/")}
            centre = {name.removeprefix("centre/"): array for name, array in prefixed.items()}
            path = SolutionPath.from_artifact(folder, meta, small)
            for pair in path.pairs:
                if pair.name in centre:
                    inner = pair.groups * pair.consumer.repeat * pair.width
                    check_array(f"centre of {pair.name}", centre[pair.name], (inner,))
            checks = {name: array for name, array in small.items() if name.partition("/")[0] in CHECKS}
            recorded = meta.get("checksums")  # 0.1.0 wrote none
            found = {name: zlib.crc32(array.tobytes()) for name, array in {**small, **prefixed}.items()}
            checked = {name.partition("/")[2] for name in checks}
            if recorded is not None and (recorded != found or not checked <= large):
                raise ValueError(
                    f"a tensor in {meta['tensors']['file']} is missing or does not have the recorded checksum"
                )
        yield path, _Told(folder, centre, _OfPath(dict.fromkeys(large, tensors), checks))


@contextmanager
def _opened(folder: Path) -> Iterator[_Weights]:
    """The checkpoint's safetensors files, one or several."""
    try:
        index = folder / "model.safetensors.index.json"
        shards = [folder / "model.safetensors"]
        if index.exists():
            held = read_json(index)["weight_map"].values()
            shards = [folder / Path(name).name for name in sorted(set(held))]
        with ExitStack() as stack:
            files: dict[str, Any] = {}
            for shard in shards:
                open_regular(shard).close()
                file = stack.enter_context(safe_open(shard, framework="pt"))
                files |= dict.fromkeys(file.keys(), file)
            yield _Weights(files)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError) as error:
        raise ArtifactError(
            f"cannot read the weights in {folder}: {error!r}. It must hold model.safetensors, whole or in shards, as "
            "save_pretrained writes it; copy it again from its source"
        ) from error
