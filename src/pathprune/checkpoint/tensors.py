"""Tensors of a checkpoint, and of a path, read by parts."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from pathprune.errors import ArtifactError, MismatchError
from pathprune.family.artifact import open_artifact, open_regular, read_json, reading
from pathprune.family.checks import CHECKS, check_array, line_checks
from pathprune.family.learned import LARGE
from pathprune.family.pairs import Pair, Slot
from pathprune.family.path import FORMAT, SolutionPath
from pathprune.family.selection import Selection
from pathprune.transform.delta import moved
from pathprune.transform.folding import by_places
from pathprune.transform.reconstruction import folded
from pathprune.types import Floats, Ints


class _Told:
    """What compensation needs of a sorted path (``pathprune.transform.reconstruction``), read by parts.

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
        """As ``pathprune.transform.slicing.compensate``; (d,) is without the constants of all units."""
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
    """The large tensors of a path, whose parts carry checksums (``pathprune.family.path.checks``; 0.1.0 wrote none)."""

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
def open_path(folder: str | os.PathLike[str]) -> Iterator[tuple[SolutionPath, _Told]]:
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
def open_weights(folder: Path) -> Iterator[_Weights]:
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
