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

import inspect
import operator
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
KINDS: dict[str, tuple[str, ...]] = {
    "width": WIDTHS,
    "key heads": KEY_HEADS,
    "heads": HEADS,
    "total": TOTALS,
    "key total": KEY_TOTALS,
    "scale": SCALES,
}

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


def shape_modules(model: nn.Module, record: Mapping[str, Any], *, doubtful: bool = True) -> None:
    """Give a freshly built model the maps of a record; weights are left uninitialised.

    Args:
        doubtful: the record has no checksum.

    Raises:
        ArtifactError: the record is not that of a slice of this model.
    """
    check_record(model, record)
    if doubtful:
        _check_seen(model, record)
    for name, shape in record["modules"].items():
        old = linear_map(model, name)
        new = sized_map(old, shape, old.weight.device)
        # The map itself changes, as a model may hold it in other places, too (Mask2Former: in lists).
        old.__class__, old.__dict__ = type(new), vars(new)
    for name, shapes in record["parameters"].items():
        module = model.get_submodule(name)
        for parameter, shape in shapes.items():
            setattr(module, parameter, nn.Parameter(getattr(module, parameter).new_empty(shape)))


def check_record(model: nn.Module, record: Mapping[str, Any]) -> None:
    """Refuse a record that slicing would not have written for this dense model: it comes from a file.

    Raises:
        ArtifactError: maps do not fit the dense ones, sizes of an attention do not go together, or not with its maps.
    """
    for name, shape in record["modules"].items():
        _check_map(name, shape, linear_map(model, name))
    for name, shapes in record["parameters"].items():
        held = dict(model.get_submodule(name).named_parameters(recurse=False))
        for parameter, shape in shapes.items():
            dense = [*held[parameter].shape] if parameter in held else []
            cut = [a for a, b in zip(shape, dense, strict=False) if a != b]
            if not dense or len(shape) != len(dense) or len(cut) > 1 or any(map(operator.gt, shape, dense)):
                raise ArtifactError(
                    f"the shape record gives {name}.{parameter} the shape {shape[:9]}; the dense one has "
                    f"{dense or 'none of the name'}"
                )
    for name in {**record["attributes"], **record["rotary"]}:
        attention, sizes = model.get_submodule(name), record["attributes"].get(name, {})
        width = _check_sizes(name, attention, sizes)
        if name in record["rotary"]:
            _check_columns(name, record["rotary"][name], head_width(attention) or 0, width)


def _check_map(name: str, shape: Mapping[str, Any], old: Map) -> None:
    """A slice is smaller on one side, never larger: a record that says so would only claim memory."""
    pad = shape["pad"]
    sizes = dict(zip(("in", "out"), features(old), strict=True))
    for side, limit in sizes.items():
        size = shape[f"{side}_features"]
        shown = _seen(shape, side)
        if max(size, shown) > limit:
            raise ArtifactError(
                f"the shape record gives {name} {side}_features={max(size, shown)}; the dense map has {limit}"
            )
    same = [side for side, limit in sizes.items() if shape[f"{side}_features"] == limit]
    if not same or (pad and {"in": "out", "out": "in"}[pad["side"]] not in same):
        raise ArtifactError(
            f"the shape record gives {name} in_features={shape['in_features']} and "
            f"out_features={shape['out_features']}; the dense map has {sizes['in']} and {sizes['out']}, of which "
            "slicing changes one"
        )
    if old.bias is not None and not shape["bias"]:
        raise ArtifactError(f"the shape record takes the bias of {name}, which slicing never does")


def _seen(shape: Mapping[str, Any], side: str) -> int:
    """Features of one side of a map, with the zeros among them."""
    pad = shape["pad"]
    if not pad or pad["side"] != side:
        return int(shape[f"{side}_features"])
    return int(pad["blocks"] * pad["padded"] if "blocks" in pad else pad["size"])


def _check_sizes(name: str, attention: nn.Module, sizes: Mapping[str, int | float]) -> int | float:
    """Hold an attention's sizes against one another; the width of its heads, zero where it has none."""

    def refuse(what: str) -> ArtifactError:
        return ArtifactError(f"the shape record of {name} sets {dict(sizes)}: {what}; it was altered, copy it again")

    for attribute, value in sizes.items():
        dense = getattr(attention, attribute, None)
        if not isinstance(dense, type(value)) or (value > dense) != (attribute in SCALES and value != dense):
            raise ArtifactError(f"the shape record sets {name}.{attribute} to {value}; the dense model has {dense}")
    now: dict[str, tuple[Any, Any]] = {}  # of each kind of size: in the dense model, and as recorded
    for kind, keys in KINDS.items():
        given = {(getattr(attention, key), sizes[key]) for key in keys if key in sizes}
        if len(given) > 1:
            raise refuse("sizes that are the same in the dense model differ")
        if given:
            now[kind] = given.pop()
    # Two of width, heads and total make the third.
    if "width" in now and "total" in now and now["total"][0] % now["width"][0] == 0:
        if not now["width"][1] or now["total"][1] % now["width"][1]:
            raise refuse("heads of that width do not make that size")
        now.setdefault("heads", tuple(total // width for total, width in zip(now["total"], now["width"], strict=True)))
    elif "heads" in now and "total" in now and now["heads"][1] and now["total"][0] % now["heads"][0] == 0:
        now["width"] = tuple(total // heads for total, heads in zip(now["total"], now["heads"], strict=True))
    elif "total" in now and _entry(attention, HEADS) * (head_width(attention) or 0) == now["total"][0]:
        raise refuse("the width or the number of heads is missing")
    for whole, part in (("total", "heads"), ("key total", "key heads")):
        if "width" in now and part in now:
            now[whole] = tuple(width * heads for width, heads in zip(now["width"], now[part], strict=True))
    if "heads" in now and "key heads" in now:
        (dense, heads), (dense_keys, keys) = now["heads"], now["key heads"]
        if heads * dense_keys != keys * dense:
            raise refuse("queries and keys have not kept the same share of heads")
    for kind, (dense, value) in now.items():
        for key in KINDS[kind]:
            if kind != "scale" and getattr(attention, key, None) == dense and sizes.get(key) != value:
                raise refuse(f"{key} should be {value}, and is {sizes.get(key, 'missing')}")
    if "scale" in now and "width" in now and now["scale"] != tuple(width**-0.5 for width in now["width"]):
        raise refuse("the scale is not that of heads of that width")
    return now["width"][1] if "width" in now else head_width(attention) or 0


def _entry(module: nn.Module, names: tuple[str, ...]) -> int:
    """The first of some attributes; zero where there is none."""
    return next((value for name in names if isinstance(value := getattr(module, name, None), int)), 0)


def _check_columns(name: str, columns: list[int], dense: int, width: int | float) -> None:
    """Rotary columns come in couples, which turn together: dimensions i and i + D/2, or 2i and 2i + 1."""
    if max(columns, default=0) >= dense:
        raise ArtifactError(f"the shape record of {name} has rotary column {max(columns)}; the head has {dense}")
    half = len(columns) // 2
    couples = [(columns[:half], columns[half:], dense // 2), (columns[::2], columns[1::2], 1)]
    for first, second, apart in couples:
        units = first if apart > 1 or dense == 2 else [column // 2 for column in first]
        kept = units[: next((at for at in range(1, half) if units[at] <= units[at - 1]), half)]
        if (
            2 * half == len(columns) == width
            and all(b - a == apart for a, b in zip(first, second, strict=True))
            and (apart > 1 or dense == 2 or not any(column % 2 for column in first))
            and max(units, default=0) < max(dense // 2, 1)
            and not any(units[len(kept) :])  # padded columns are the first, again
        ):
            return
    raise ArtifactError(
        f"the shape record of {name} has rotary columns that are not couples in order, as many as a head of "
        f"{width} has dimensions; it was altered, copy it again"
    )


def _check_seen(model: nn.Module, record: Mapping[str, Any]) -> None:
    """Refuse a record whose parts do not go together, where no checksum says that they are as they were written."""
    modules = dict(model.named_modules())
    cut = {  # map -> the side that changes, what it has of it as seen, and in the dense model
        (name, side): (_seen(shape, side), limit)
        for name, shape in record["modules"].items()
        for side, limit in zip(("in", "out"), features(linear_map(model, name)), strict=True)
        if shape[f"{side}_features"] != limit
    }
    for (name, side), (seen, limit) in cut.items():
        owner = name.rpartition(".")[0]
        attention = modules[owner]
        width = head_width(attention) or 0
        if side == "out" and limit == width * _entry(attention, HEADS):
            sizes = record["attributes"].get(owner, {})
            heads = next((sizes[key] for key in HEADS if key in sizes), _entry(attention, HEADS))
            if seen != heads * next((sizes[key] for key in WIDTHS if key in sizes), width):
                raise ArtifactError(
                    f"the shape record shows {name} with {seen} features, which its attention's sizes {dict(sizes)} "
                    "do not make; it was altered"
                )
        scope, shares = name, []
        while side == "in" and scope and not scope.rpartition(".")[2].isdigit():
            scope = scope.rpartition(".")[0]
            within = f"{scope}." if scope else ""
            shares += [of for (other, way), of in cut.items() if way == "out" and other.startswith(within)]
        if side == "in" and not any(seen * dense == shown * limit for shown, dense in shares):
            raise ArtifactError(
                f"the shape record shows {name} with {seen} inputs, which no map puts out; it was altered"
            )
    turns = any("rotary" in name.rpartition(".")[2] for name in modules)
    for name, sizes in record["attributes"].items():
        attention = modules[name]
        dense = head_width(attention) or 0
        width = next((value for key, value in sizes.items() if key in WIDTHS), dense)
        handed = "position_embeddings" in inspect.signature(attention.forward).parameters
        handed = handed and getattr(attention, "use_rope", True)  # some layers of Llama 4 and SmolLM3 leave them unused
        if turns and handed and width != dense and not record["rotary"]:
            raise ArtifactError(f"the shape record makes heads of {name} narrower, and has no rotary columns for them")
        inside = {key: of for key, of in cut.items() if key[0].startswith(f"{name}.")}
        for (inner, _), (seen, limit) in inside.items() if dense and len(inside) <= 5 else ():  # more than attention
            if seen != limit and limit % dense == 0 and all(seen % every for every in (width, dense) if every):
                raise ArtifactError(f"the shape record shows {inner} with {seen} features, no heads of {width}")


def head_width(attention: nn.Module) -> Any:
    """Width of a head, by the attribute that the attention module keeps it in; None where it has none."""
    return next((getattr(attention, name) for name in WIDTHS if hasattr(attention, name)), None)


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
