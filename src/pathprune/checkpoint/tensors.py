"""Tensors of a checkpoint, and of a path, read by parts."""

from __future__ import annotations

import os
import zlib
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pathprune.errors import ArtifactError
from pathprune.family.artifact import open_artifact, open_regular, read_json, reading
from pathprune.family.checks import CHECKS, check_array, line_checks
from pathprune.family.learned import LARGE
from pathprune.family.path import FORMAT, SolutionPath
from pathprune.types import Floats, Ints


class StoredWeights:
    """The tensors of a checkpoint, read by parts: a ``pathprune.transform.weights.WeightSource``.

    Args:
        tensors: name -> the open file that holds it, and its key there.
    """

    def __init__(self, tensors: dict[str, tuple[Any, str]]) -> None:
        self.tensors = tensors
        self.stored: dict[str, str] = {}  # name of a parameter -> that of the tensor it is tied to

    @property
    def names(self) -> Collection[str]:
        return self.tensors.keys()

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

        held = {names[0]: next((name for name in names if name in self.tensors), None) for names in alike.values()}
        present = {part(name) for names in alike.values() if held[names[0]] for name in names}
        for names in alike.values():
            tensor = held[names[0]]
            if tensor is None:
                if not present or any(part(name) in present or "." not in name.removeprefix(base) for name in names):
                    raise ArtifactError(
                        f"the checkpoint has no {names[0]}, which {type(model).__name__} has; save the model that "
                        "pathprune.sort_units or pathprune.elastic gave with save_pretrained"
                    )
                for name in names:
                    owner = model.get_submodule(base[:-1]) if name.startswith(base) else model
                    setattr(owner, part(name), None)
                continue
            dtype = self._part(tensor).get_dtype()
            if not dtype.startswith(("F", "BF")):
                raise ArtifactError(f"the checkpoint's {tensor} holds {dtype}, not floating-point numbers")
            self.stored |= dict.fromkeys(names, tensor)

    def _part(self, name: str) -> Any:
        file, key = self.tensors[name]
        return file.get_slice(key)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._part(name).get_shape())

    def whole(self, name: str) -> Tensor:
        file, key = self.tensors[name]
        tensor: Tensor = file.get_tensor(key)
        self._check(name, tensor, None)
        return tensor

    def _check(self, name: str, read: Tensor, indices: Ints | None, *where: Any) -> None:
        """Refuse numbers that are not finite.

        Args:
            indices: those that were read; ``None`` of a whole tensor.
            where: the dimension that they are of, and the slices of those before it.

        Raises:
            ValueError: there are some.
        """
        if name in self.stored.values() and not torch.isfinite(read.float()).all():
            raise ValueError(f"{name} has values that are not finite")

    def sample(self, name: str, positions: range) -> Tensor:
        """Single values of a parameter, by their positions in the flattened one; for its fingerprint
        (``pathprune.model.identity``).
        """
        part = self._part(self.stored[name])
        shape = part.get_shape()
        if not shape:
            return self.whole(self.stored[name]).flatten()
        values = []
        for position in positions:
            at = np.unravel_index(position, shape)
            values.append(part[tuple(slice(int(i), int(i) + 1) for i in at)].flatten())
        return torch.cat(values) if values else torch.empty(0)

    def read(self, name: str, dim: int, indices: Ints) -> Tensor:
        if indices.ndim == 1:
            return self._runs(name, (slice(None),) * dim, indices, dim)
        rest = (slice(None),) * (dim - 1)
        each = [self._runs(name, (slice(i, i + 1), *rest), row, dim) for i, row in enumerate(indices)]
        return torch.cat(each)

    def _runs(
        self, name: str, before: tuple[slice, ...], indices: Ints, dim: int, after: tuple[slice, ...] = ()
    ) -> Tensor:
        """What is at some indices of a dimension, by runs of them.

        Args:
            before, after: of the other dimensions.
        """
        part = self._part(name)
        runs = np.split(indices, np.flatnonzero(np.diff(indices) != 1) + 1)
        ends = [(int(run[0]), int(run[-1]) + 1) for run in runs if len(run)] or [(0, 0)]
        read = torch.cat([part[(*before, slice(*end), *after)] for end in ends], dim)
        self._check(name, read, indices, dim, before)
        return read


class PathTensors(StoredWeights):
    """The large tensors of a path, whose parts carry checksums (``pathprune.family.checks``; 0.1.0 wrote none).

    Raises:
        ArtifactError: a part cannot be read, or does not have its checksum.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        tensors: dict[str, tuple[Any, str]],
        checks: Mapping[str, npt.NDArray[Any]],
    ) -> None:
        super().__init__(tensors)
        self.folder, self.checks = folder, checks

    def of(self, array: str) -> set[str]:
        """The pairs or parameters that have an array of that name (``pathprune.family.learned``)."""
        return {name.partition("/")[2] for name in self.tensors if name.partition("/")[0] == array}

    def deltas(self, stored: Mapping[str, str]) -> PathTensors:
        """Those of parameters, by the names that a checkpoint has for them."""
        tensors = {stored[name]: self.tensors[f"delta/{name}"] for name in self.of("delta")}
        return PathTensors(self.folder, tensors, self.checks)

    def whole(self, name: str) -> Tensor:
        with reading(self.folder, "path"):
            return super().whole(name)

    def read(self, name: str, dim: int, indices: Ints) -> Tensor:
        with reading(self.folder, "path"):
            return super().read(name, dim, indices)

    def rows(self, name: str, indices: Ints, shape: tuple[int, int], columns: int) -> Tensor:
        """The first columns of some rows of a matrix of that shape."""
        with reading(self.folder, "path"):
            if (found := self.shape(name)) != shape:
                raise ValueError(f"{name} has shape {found}, not {shape}")
            return self._runs(name, (), indices, 0, (slice(0, columns),))

    def _check(self, name: str, read: Tensor, indices: Ints | None, *where: Any) -> None:
        key = self.tensors[name][1]
        if not read.is_floating_point():
            raise ValueError(f"the {key} holds {read.dtype}, not floating-point numbers")
        if not torch.isfinite(read).all():
            raise ValueError(f"the {key} is not finite")
        dim, before = where or (max(0, read.dim() - 2), ())
        written = self.checks.get(f"check{dim}/{key}")
        if written is None:
            return
        array = read.numpy()
        if key.startswith("covariance/"):  # rows up to the diagonal have checksums, and the rest is the same again
            assert indices is not None
            square = array[:, indices]
            same = np.array_equal(square, square.T)
            found = np.array(
                [zlib.crc32(row[: at + 1]) for row, at in zip(array, indices, strict=True)], dtype=np.uint32
            )
        else:
            same, found = True, line_checks(array, dim)
        expected = written if indices is None else written[(*before[: read.dim() - 2], ..., indices)]
        if not same or not np.array_equal(found, expected):
            raise ValueError(f"the {key} does not have the recorded checksums; it was altered")


@contextmanager
def open_path(folder: str | os.PathLike[str]) -> Iterator[tuple[SolutionPath, dict[str, Floats], PathTensors]]:
    """A path without its moments and deltas; the centre of each pair that has one; and what is read by parts."""

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
        yield path, centre, PathTensors(folder, {name: (tensors, name) for name in large}, checks)


@contextmanager
def open_weights(folder: Path) -> Iterator[StoredWeights]:
    """The checkpoint's safetensors files, one or several."""
    try:
        index = folder / "model.safetensors.index.json"
        shards = [folder / "model.safetensors"]
        if index.exists():
            held = read_json(index)["weight_map"].values()
            shards = [folder / Path(name).name for name in sorted(set(held))]
        with ExitStack() as stack:
            tensors: dict[str, tuple[Any, str]] = {}
            for shard in shards:
                open_regular(shard).close()
                file = stack.enter_context(safe_open(shard, framework="pt"))
                tensors |= {key: (file, key) for key in file.keys()}  # noqa: SIM118
            yield StoredWeights(tensors)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError) as error:
        raise ArtifactError(
            f"cannot read the weights in {folder}: {error!r}. It must hold model.safetensors, whole or in shards, as "
            "save_pretrained writes it; copy it again from its source"
        ) from error
