"""Modules of the shapes that a record names.

This file imports nothing of pathprune: a folder that opens without it brings this very code along
(``pathprune.checkpoint.standalone``).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D


class Padding:
    """Hook by which one side of a linear map is seen from outside with zeros among its features.

    The map itself is an ordinary one of its small sizes, so that whatever takes maps (adapters, quantisation) takes it.

    Args:
        side: ``"out"``: zeros are put between the output's features; ``"in"``: features of the
            input are left out.
        blocks, width, padded: the axis as blocks of ``padded`` features, the first ``width`` of which exist; or
        positions, size: the axis as ``size`` features, of which those at ``positions`` exist.
    """

    def __init__(
        self,
        side: str,
        blocks: int = 0,
        width: int = 0,
        padded: int = 0,
        positions: list[int] | None = None,
        size: int = 0,
    ) -> None:
        self.side, self.blocks, self.width, self.padded, self.size = side, blocks, width, padded, size
        self.positions = None if positions is None else torch.tensor(positions, dtype=torch.long, device="cpu")

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor | None = None) -> Any:
        """Before the map of side ``"in"`` and after that of side ``"out"``."""
        return (self.crop(args[0]), *args[1:]) if output is None else self.pad(output)

    def _positions(self, device: torch.device) -> Tensor:
        assert self.positions is not None
        if self.positions.device != device:
            self.positions = self.positions.to(device)
        return self.positions

    def pad(self, output: Tensor) -> Tensor:
        """Put the zeros in."""
        if self.positions is None:
            return F.pad(output.unflatten(-1, (self.blocks, self.width)), (0, self.padded - self.width)).flatten(-2)
        return output.new_zeros(*output.shape[:-1], self.size).index_copy(-1, self._positions(output.device), output)

    def crop(self, input: Tensor) -> Tensor:
        """The features that the weight reads."""
        if self.positions is None:
            return input.unflatten(-1, (self.blocks, self.padded))[..., : self.width].flatten(-2)
        return input.index_select(-1, self._positions(input.device))

    def put_on(self, module: nn.Module) -> None:
        """Have what stands in the map's place hooked, once; an adapter around the map, and not the map inside it."""
        hooks: Any = module._forward_pre_hooks if self.side == "in" else module._forward_hooks
        if any(isinstance(hook, Padding) for hook in hooks.values()):
            return
        for inner in module.modules():
            for held in (inner._forward_pre_hooks, inner._forward_hooks):
                for key in [key for key, hook in held.items() if isinstance(hook, Padding)]:
                    del held[key]
        if self.side == "in":
            module.register_forward_pre_hook(self)
        else:
            module.register_forward_hook(self)


class _Paddings:
    """Forward pre-hook of the module that holds padded maps: libraries put other modules in their places."""

    def __init__(self) -> None:
        self.paddings: dict[str, Padding] = {}

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        for name, padding in self.paddings.items():
            padding.put_on(module.get_submodule(name))


class EmptyLinear(nn.Linear):
    """A map without features, of a kind of its own: what torch quantises of such a map computes anything."""


class EmptyConv1D(Conv1D):
    """GPT-2's transposed linear map, which can do without features."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.mT, self.bias)


class _RotaryColumns:
    """Forward pre-hook of an attention module: keep the cos/sin columns of the kept dimensions."""

    def __init__(self, columns: list[int]) -> None:
        self.columns = columns

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        cos, sin = kwargs["position_embeddings"]
        return args, {**kwargs, "position_embeddings": (cos[..., self.columns], sin[..., self.columns])}


def shape_modules(model: nn.Module, record: Mapping[str, Any]) -> None:
    """Give a freshly built model the maps of a record; weights are left uninitialised."""
    for name, shape in record["modules"].items():
        old: Any = model.get_submodule(name)
        new = sized_map(old, shape, old.weight.device)
        # The map itself changes, as a model may hold it in other places, too (Mask2Former: in lists).
        old.__class__, old.__dict__ = type(new), vars(new)
    for name, shapes in record["parameters"].items():
        module = model.get_submodule(name)
        for parameter, shape in shapes.items():
            setattr(module, parameter, nn.Parameter(getattr(module, parameter).new_empty(shape)))


def shape_attention(model: nn.Module, record: Mapping[str, Any]) -> None:
    """Give the attention of a model the sizes of a record, and its maps their zeros, once it has its weights:
    initialising code reads sizes.
    """
    for name, attributes in record["attributes"].items():
        module = model.get_submodule(name)
        for attribute, value in attributes.items():
            setattr(module, attribute, value)
    for name, columns in record["rotary"].items():
        model.get_submodule(name).register_forward_pre_hook(_RotaryColumns(columns), with_kwargs=True)
    _pad_maps(model, {name: shape["pad"] for name, shape in record["modules"].items() if shape["pad"]})


def _pad_maps(model: nn.Module, pads: Mapping[str, Mapping[str, Any]]) -> None:
    """Put zeros among the features of maps, whatever will stand in their places."""
    holders: dict[str, _Paddings] = {}
    for name, pad in pads.items():
        padding = Padding(**pad)
        padding.put_on(model.get_submodule(name))
        holder, _, child = name.rpartition(".")
        while isinstance(model.get_submodule(holder), nn.ModuleList | nn.ModuleDict):  # which nobody calls
            holder, _, outer = holder.rpartition(".")
            child = f"{outer}.{child}"
        if holder not in holders:
            holders[holder] = _Paddings()
            model.get_submodule(holder).register_forward_pre_hook(holders[holder])
        holders[holder].paddings[child] = padding


def sized_map(old: Any, shape: Mapping[str, Any], device: torch.device) -> Any:
    """A map like ``old`` in the sizes of a record, its weights uninitialised."""
    sizes = (shape["in_features"], shape["out_features"])
    dtype = old.weight.dtype
    with warnings.catch_warnings(), torch.device("meta"):  # weights are about to be replaced: do not draw them
        warnings.filterwarnings("ignore", "Initializing zero-element tensors")  # removed attention has no features
        new: Any
        if isinstance(old, nn.Linear):
            new = (EmptyLinear if 0 in sizes else nn.Linear)(*sizes, shape["bias"], dtype=dtype)
        else:
            new = (EmptyConv1D if 0 in sizes else Conv1D)(sizes[1], sizes[0]).to(dtype)
    return new if device.type == "meta" else new.to_empty(device=device)


def matched_record(model: nn.Module, record: Mapping[str, Any]) -> dict[str, Any]:
    """The record's module names as they are in ``model``.

    A record written for a model with a task head holds for its base model, and the other way
    round; their names differ by the base model's prefix. One written for a tower holds wherever that is.

    Raises:
        LookupError: it names a module that the model has not, or one twice.
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
        raise LookupError(
            f"the shape record names {name[:200]}, which {type(model).__name__} does not have; "
            "load it with the class it was saved from, or with another of the same base model"
        )

    renamed: dict[str, Any] = {}
    for part, entries in record.items():
        renamed[part] = {rename(name): value for name, value in entries.items()}
        if len(renamed[part]) < len(entries):
            raise LookupError(f"the shape record names a module of {type(model).__name__} twice among its {part}")
    return renamed
