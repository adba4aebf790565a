"""The shapes of a sliced model: plain data, and modules of those shapes.

A *shape record* is written into the model's configuration::

    {"modules":    {name: {"in_features": int, "out_features": int, "bias": bool, "pad": None
                           or {"side": "in" | "out", "blocks": n, "width": w, "padded": p}
                           or {"side": "in" | "out", "positions": [place, ...], "size": n}}},
     "parameters": {name: {parameter: [size, ...]}},
     "attributes": {name: {attribute: int}},
     "rotary":     {name: [positions of cos/sin that are left]}}

``shape_modules`` gives a freshly built model on any device, ``meta`` included, the maps of a record, and
``shape_attention`` the rest of it once weights have been loaded.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from pathprune.errors import ArtifactError, MismatchError
from pathprune.pairs import Pair

# Names under which attention modules keep their sizes; each is set only where its value is the dense size.
WIDTHS = ("head_dim", "attention_head_size", "key_value_proj_dim", "head_size", "dim_per_head", "attention_head_dim",
          "hidden_size_per_attention_head", "d_head", "dim_head", "head_width")  # fmt: skip
KEY_HEADS = ("num_key_value_heads", "num_kv_heads", "kv_heads")
HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads", "nhead", "num_attn_heads")
TOTALS = ("all_head_size", "inner_dim", "embed_dim", "split_size", "hidden_size", "d_model", "dim", "embed_size",
          "attn_dim", "attention_dim", "projection_size", "dim_attention")  # fmt: skip
KEY_TOTALS = ("kv_dim",)
SCALES = ("scale", "scaling")  # of the attention, likewise: one over the root of the width
SIZE_ATTRIBUTES = frozenset((*WIDTHS, *KEY_HEADS, *HEADS, *TOTALS, *KEY_TOTALS))

Map = nn.Linear | Conv1D
FORWARDS = (nn.Linear.forward, Conv1D.forward)
Record = dict[str, Any]


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


def is_map(module: nn.Module) -> bool:
    """Whether a module is a linear map of one vector."""
    return isinstance(module, Map)


def computes_linear(module: nn.Module) -> bool:
    """Whether a map's forward is the one of its kind, and not that of a subclass or of the object alone."""
    forward = vars(module).get("_old_forward", module.forward)  # of accelerate, which moves inputs to a device first
    forward = getattr(forward, "_torchdynamo_orig_callable", forward)
    # Falcon's own class says x W^T + b in other words.
    return getattr(forward, "__func__", None) in FORWARDS or type(module).__name__ == "FalconLinear"


def features(module: Map) -> tuple[int, int]:
    """(inputs, outputs)."""
    return (module.nx, module.nf) if isinstance(module, Conv1D) else (module.in_features, module.out_features)


def linear_map(model: nn.Module, name: str) -> Map:
    """The map of that name.

    Raises:
        MismatchError: it is none.
    """
    module = model.get_submodule(name)
    if not isinstance(module, Map):
        raise MismatchError(f"{name} is a {type(module).__name__}, not a linear map; the shapes are of another model")
    return module


def shape_modules(model: nn.Module, record: Mapping[str, Any]) -> None:
    """Give a freshly built model the maps of a record; weights are left uninitialised."""
    for name, shape in record["modules"].items():
        old = linear_map(model, name)
        _check_smaller(name, shape, old)
        new = sized_map(old, shape, old.weight.device)
        # The map itself changes, as a model may hold it in other places, too (Mask2Former: in lists).
        old.__class__, old.__dict__ = type(new), vars(new)
    for name, shapes in record["parameters"].items():
        module = model.get_submodule(name)
        for parameter, shape in shapes.items():
            whole = getattr(module, parameter)
            if len(shape) != whole.dim() or any(size > limit for size, limit in zip(shape, whole.shape, strict=True)):
                raise ArtifactError(
                    f"the shape record gives {name}.{parameter} the shape {shape}; the dense one has {[*whole.shape]}"
                )
            setattr(module, parameter, nn.Parameter(whole.new_empty(shape)))


def _check_smaller(name: str, shape: Mapping[str, Any], old: Map) -> None:
    """A slice is never larger than its dense map; a record that says so would only claim memory."""
    for side, limit in zip(("in", "out"), features(old), strict=True):
        size, pad = shape[f"{side}_features"], shape["pad"]
        shown = size
        if pad and pad["side"] == side:
            shown = pad["blocks"] * pad["padded"] if "blocks" in pad else pad["size"]
        if max(size, shown) > limit:
            raise ArtifactError(
                f"the shape record gives {name} {side}_features={max(size, shown)}; the dense map has {limit}"
            )


def head_width(attention: nn.Module) -> Any:
    """Width of a head, by the attribute that the attention module keeps it in; None where it has none."""
    return next((getattr(attention, name) for name in WIDTHS if hasattr(attention, name)), None)


def shape_attention(model: nn.Module, record: Mapping[str, Any]) -> None:
    """Give the attention of a model the sizes of a record, and its maps their zeros, once it has its weights:
    initialising code reads sizes.
    """
    for name, columns in record["rotary"].items():
        width = head_width(model.get_submodule(name)) or 0
        if max(columns, default=0) >= width:
            raise ArtifactError(f"the shape record of {name} has rotary column {max(columns)}; the head has {width}")
    for name, attributes in record["attributes"].items():
        module = model.get_submodule(name)
        for attribute, value in attributes.items():
            dense = getattr(module, attribute, None)
            if not isinstance(dense, type(value)) or (value > dense) != (attribute in SCALES and value != dense):
                raise ArtifactError(f"the shape record sets {name}.{attribute} to {value}; the dense model has {dense}")
            setattr(module, attribute, value)
    for name, columns in record["rotary"].items():
        model.get_submodule(name).register_forward_pre_hook(_RotaryColumns(columns), with_kwargs=True)
    _pad_maps(model, {name: shape["pad"] for name, shape in record["modules"].items() if shape["pad"]})


def _pad_maps(model: nn.Module, pads: Mapping[str, Mapping[str, Any]]) -> None:
    """Put zeros among the features of maps, whatever will stand in their places."""
    holders: dict[str, _Paddings] = {}
    for name, pad in pads.items():
        padding = Padding(**pad)
        padding.put_on(linear_map(model, name))
        holder, _, child = name.rpartition(".")
        while isinstance(model.get_submodule(holder), nn.ModuleList | nn.ModuleDict):  # which nobody calls
            holder, _, outer = holder.rpartition(".")
            child = f"{outer}.{child}"
        if holder not in holders:
            holders[holder] = _Paddings()
            model.get_submodule(holder).register_forward_pre_hook(holders[holder])
        holders[holder].paddings[child] = padding


def sized_map(old: Map, shape: Mapping[str, Any], device: torch.device) -> Map:
    """A map like ``old`` in the sizes of a record, its weights uninitialised."""
    sizes = (shape["in_features"], shape["out_features"])
    dtype = old.weight.dtype
    with warnings.catch_warnings(), torch.device("meta"):  # weights are about to be replaced: do not draw them
        warnings.filterwarnings("ignore", "Initializing zero-element tensors")  # removed attention has no features
        new: Map
        if isinstance(old, nn.Linear):
            new = (EmptyLinear if 0 in sizes else nn.Linear)(*sizes, shape["bias"], dtype=dtype)
        else:
            new = (EmptyConv1D if 0 in sizes else Conv1D)(sizes[1], sizes[0]).to(dtype)
    return new if device.type == "meta" else new.to_empty(device=device)


def attention_of(model: nn.Module, pair: Pair) -> str:
    """Name of the module that holds the sizes of the pair's attention: the nearest above the first map."""
    name = pair.slots[0].module
    while name and name != pair.block:
        name = name.rpartition(".")[0]
        module = model.get_submodule(name)
        if any(hasattr(module, size) for size in (*WIDTHS, *HEADS)):
            return name
    return pair.slots[0].module.rpartition(".")[0]
