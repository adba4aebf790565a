"""Make the modules of a model physically smaller.

A sliced model is its dense model with smaller linear maps and nothing else: no attention code
is replaced. Where the query-key and value widths of a layer differ, the narrower of the two is
padded with zeros to the wider one *between* the linear maps (``PaddedLinear``), so that the
model's own ``view(..., -1, head_dim)``, its cache and every attention kernel work unchanged,
while the parameters stay small. A layer that lost its attention has zero heads.

The shape of a sliced model is plain data, a *shape record*, written into its configuration::

    {"modules":    {name: {"in_features": int, "out_features": int, "bias": bool,
                           "pad": None or {"side": "in" | "out", "blocks": n, "width": w, "padded": p}}},
     "attributes": {name: {attribute: int}},
     "rotary":     {name: [positions of cos/sin that are left]}}

``shape_modules`` applies a record to a freshly built model on any device, ``meta`` included:
slicing and loading share it.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pathprune.budget import Selection
from pathprune.errors import ArtifactError, MismatchError
from pathprune.pairs import Pair, Slot

HEAD_DIM_ATTRIBUTES = ("head_dim", "attention_head_size")
HEAD_COUNT_ATTRIBUTES = ("num_heads", "num_attention_heads", "num_key_value_heads")

Record = dict[str, Any]


class PaddedLinear(nn.Linear):
    """A linear map one side of which is seen from outside in wider blocks, zeros behind each.

    Args:
        side: ``"out"``: the output's blocks are padded from ``width`` to ``padded`` features;
            ``"in"``: the input's are cropped from ``padded`` to ``width``.
        blocks: number of blocks on that side (heads, or halves of heads with rotary embedding).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        side: str,
        blocks: int,
        width: int,
        padded: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.side, self.blocks, self.width, self.padded = side, blocks, width, padded

    def forward(self, input: Tensor) -> Tensor:
        output = super().forward(self.crop(input))
        if self.side == "out":
            output = F.pad(output.unflatten(-1, (self.blocks, self.width)), (0, self.padded - self.width)).flatten(-2)
        return output

    def crop(self, input: Tensor) -> Tensor:
        """The features that the weight reads."""
        if self.side == "out":
            return input
        return input.unflatten(-1, (self.blocks, self.padded))[..., : self.width].flatten(-2)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.side}: {self.blocks} x {self.width} padded to {self.padded}"


class _RotaryColumns:
    """Forward pre-hook of an attention module: keep the cos/sin columns of the kept dimensions."""

    def __init__(self, columns: list[int]) -> None:
        self.columns = columns

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        cos, sin = kwargs["position_embeddings"]
        return args, {**kwargs, "position_embeddings": (cos[..., self.columns], sin[..., self.columns])}


def slice_model(model: nn.Module, selection: Selection) -> nn.Module:
    """A new, physically smaller model; ``model`` is untouched.

    In exact arithmetic its outputs are those of ``masked(model, selection)``. Its configuration
    carries the widths, so that ``save_pretrained`` and ``from_pretrained`` work as for any
    model of ``transformers`` (``pathprune.hub``).

    Raises:
        MismatchError: the selection belongs to another model, or to other weights of it.
    """
    from pathprune.discovery import check_base
    from pathprune.hub import attach_record

    check_base(model, selection.pairs)
    small, record = slice_modules(model, selection)
    attach_record(small, record, selection)
    return small


def slice_modules(model: nn.Module, selection: Selection) -> tuple[nn.Module, Record]:
    """Slice any module tree that holds the selection's pairs; no identity is checked or recorded."""
    record = shape_record(model, selection)
    tensors = _sliced_tensors(model, selection, record)
    memo: dict[int, Any] = {}
    for name, shape in record["modules"].items():
        old = model.get_submodule(name)
        assert isinstance(old, nn.Linear)
        new = _linear(shape, old.weight.device, old.weight.dtype)
        weight, bias = tensors[name]
        new.weight.data.copy_(weight)
        new.weight.requires_grad_(old.weight.requires_grad)
        if new.bias is not None and bias is not None:
            new.bias.data.copy_(bias)
            new.bias.requires_grad_(old.bias.requires_grad)
        new.train(old.training)
        memo[id(old)] = new  # the copy of the model takes the small map in place of a copy of the large one
    small = copy.deepcopy(model, memo)
    _shape_attention(small, record)
    return small, record


def shape_record(model: nn.Module, selection: Selection) -> Record:
    """The shapes that ``selection`` gives ``model``, as plain data."""
    record: Record = {"modules": {}, "attributes": {}, "rotary": {}}
    blocks: dict[str, list[Pair]] = {}
    for pair in selection.pairs:
        if pair.kind == "mlp":
            if not selection.keep[pair.name].all():
                for slot in pair.slots:
                    record["modules"][slot.module] = _shape(slot, selection.kept(pair))
        else:
            blocks.setdefault(pair.block, []).append(pair)
    for members in blocks.values():
        if all(selection.keep[pair.name].all() for pair in members):
            continue
        _attention_record(model, selection, members, record)
    return record


def _attention_record(model: nn.Module, selection: Selection, members: list[Pair], record: Record) -> None:
    heads = {selection.keep[pair.name].any(axis=1).tobytes() for pair in members}
    if len(heads) > 1:
        raise MismatchError(f"{members[0].block}: query-key and value-output must keep the same heads")
    for pair in members:
        if len({len(dims) for dims in pair.dims(selection.keep[pair.name])}) > 1:
            raise MismatchError(f"{pair.name}: heads must keep equally many dimensions")
        if pair.rotary and len({dims.tobytes() for dims in pair.dims(selection.keep[pair.name])}) > 1:
            raise MismatchError(f"{pair.name}: heads must keep the same dimensions, as they share the rotary embedding")
    widths = [selection.widths(pair)[1] for pair in members]
    count = selection.widths(members[0])[0]
    halves = any(pair.rotary for pair in members)
    padded = max(widths) + (halves and max(widths) % 2)  # rotary embedding rotates an even number of dimensions
    name = members[0].slots[0].module.rpartition(".")[0]
    attention = model.get_submodule(name)
    seen = count
    if count == 0:
        # Zero heads of the old width: view(..., -1, head_dim) of nothing stays defined. A decoder's cache
        # counts positions by its first layer's keys, and is shown one thin head of zeros instead.
        seen = int(bool(getattr(attention, "is_causal", False)))
        padded = min(8, members[0].width) if seen else members[0].width
    for pair, width in zip(members, widths, strict=True):
        parts = pair.dims_per_unit
        for slot in pair.slots:
            shape = _shape(slot, count * slot.repeat * width)
            if seen and width != padded:
                shape["pad"] = {
                    "side": slot.side,
                    "blocks": seen * slot.repeat * parts,
                    "width": width // parts,
                    "padded": padded // parts,
                }
            record["modules"][slot.module] = shape
    values = dict.fromkeys(HEAD_DIM_ATTRIBUTES, padded)
    for attribute in HEAD_COUNT_ATTRIBUTES:
        kv = attribute == "num_key_value_heads"
        values[attribute] = seen * (1 if kv else max(slot.repeat for pair in members for slot in pair.slots))
    values["all_head_size"] = padded * values["num_heads"]
    record["attributes"][name] = {key: value for key, value in values.items() if hasattr(attention, key)}
    for pair, width in zip(members, widths, strict=True):
        if pair.rotary and seen:
            kept = np.flatnonzero(selection.keep[pair.name].any(axis=0)).tolist()
            half = kept + [0] * ((padded - width) // 2)  # a padded column rotates zeros; any angle will do
            record["rotary"][name] = half + [column + pair.units for column in half]


def _shape(slot: Slot, size: int) -> Record:
    features = (
        {"in_features": slot.size, "out_features": size}
        if slot.side == "out"
        else {
            "in_features": size,
            "out_features": slot.size,
        }
    )
    return {**features, "bias": slot.bias, "pad": None}


def _sliced_tensors(model: nn.Module, selection: Selection, record: Record) -> dict[str, tuple[Tensor, Tensor | None]]:
    """Weight and bias of every map that the record shapes, rotations and fills computed in float64."""
    tensors: dict[str, tuple[Tensor, Tensor | None]] = {}
    for pair in selection.pairs:
        if pair.slots[0].module not in record["modules"]:
            continue
        keep = selection.keep[pair.name]
        basis = selection.basis.get(pair.name)
        rotation = inverse = None
        if basis is not None:
            rotation = torch.from_numpy(basis).double()
            inverse = torch.linalg.inv(rotation)
        for slot in pair.slots:
            linear = model.get_submodule(slot.module)
            assert isinstance(linear, nn.Linear)
            weight = linear.weight.detach()
            bias = None if linear.bias is None else linear.bias.detach()
            if rotation is not None and inverse is not None:
                # The masked side takes A, its partner A^-T, so that products do not change.
                side = rotation if slot == pair.mask_slot else inverse.mT
                weight = _rotate(weight, side, slot)
                if slot.side == "out" and bias is not None:
                    bias = _rotate(bias, side, slot)
            index = torch.from_numpy(pair.positions(slot, keep)).to(weight.device)
            if slot == pair.consumer and slot.side == "in" and bias is not None and pair.name in selection.fill:
                gone = torch.from_numpy(pair.positions(slot, ~keep)).to(weight.device)
                fill = (
                    torch.from_numpy(np.repeat(selection.fill[pair.name], slot.repeat, axis=0))
                    .flatten()
                    .to(gone.device)
                )
                bias = bias.double() + weight.double()[:, gone] @ fill.double()[gone]
            if slot.side == "out":
                weight, bias = weight[index], None if bias is None else bias[index]
            else:
                weight = weight[:, index]
            tensors[slot.module] = (weight, bias)
    return tensors


def _rotate(tensor: Tensor, rotation: Tensor, slot: Slot) -> Tensor:
    """Apply a (G, D, D) rotation to the inner axis of a weight or bias."""
    rotation = rotation.to(tensor.device).repeat_interleave(slot.repeat, dim=0)  # (G R, D, D)
    heads, width = rotation.shape[:2]
    if slot.side == "in":
        return torch.einsum("ohd,hed->ohe", tensor.double().unflatten(1, (heads, width)), rotation).flatten(1)
    if tensor.dim() == 1:
        return torch.einsum("hed,hd->he", rotation, tensor.double().unflatten(0, (heads, width))).flatten()
    return torch.einsum("hed,hdi->hei", rotation, tensor.double().unflatten(0, (heads, width))).flatten(0, 1)


def shape_modules(model: nn.Module, record: Mapping[str, Any]) -> None:
    """Give a freshly built model the shapes of a record; weights are left uninitialised."""
    for name, shape in record["modules"].items():
        old = model.get_submodule(name)
        if not isinstance(old, nn.Linear):
            raise MismatchError(
                f"{name} is a {type(old).__name__}, not a linear map; the shape record is of another model"
            )
        _check_smaller(name, shape, old)
        model.set_submodule(name, _linear(shape, old.weight.device, old.weight.dtype))
    _shape_attention(model, record)


def _check_smaller(name: str, shape: Mapping[str, Any], old: nn.Linear) -> None:
    """A slice is never larger than its dense map; a record that says so would only claim memory."""
    for side in ("in", "out"):
        size, limit, pad = shape[f"{side}_features"], getattr(old, f"{side}_features"), shape["pad"]
        shown = pad["blocks"] * pad["padded"] if pad and pad["side"] == side else size
        if max(size, shown) > limit:
            raise ArtifactError(
                f"the shape record gives {name} {side}_features={max(size, shown)}; the dense map has {limit}"
            )


def head_width(attention: nn.Module) -> Any:
    """Width of a head, by the attribute that the attention module keeps it in; None where it has none."""
    return next((getattr(attention, name) for name in HEAD_DIM_ATTRIBUTES if hasattr(attention, name)), None)


def _shape_attention(model: nn.Module, record: Mapping[str, Any]) -> None:
    for name, columns in record["rotary"].items():
        width = head_width(model.get_submodule(name)) or 0
        if max(columns, default=0) >= width:
            raise ArtifactError(f"the shape record of {name} has rotary column {max(columns)}; the head has {width}")
    for name, attributes in record["attributes"].items():
        for attribute, value in attributes.items():
            setattr(model.get_submodule(name), attribute, value)
    for name, columns in record["rotary"].items():
        model.get_submodule(name).register_forward_pre_hook(_RotaryColumns(columns), with_kwargs=True)


def _linear(shape: Mapping[str, Any], device: torch.device, dtype: torch.dtype) -> nn.Linear:
    sizes = (shape["in_features"], shape["out_features"], shape["bias"])
    with warnings.catch_warnings(), torch.device("meta"):  # weights are about to be replaced: do not draw them
        warnings.filterwarnings("ignore", "Initializing zero-element tensors")  # removed attention has no features
        linear = PaddedLinear(*sizes, **shape["pad"], dtype=dtype) if shape["pad"] else nn.Linear(*sizes, dtype=dtype)
    return linear if device.type == "meta" else linear.to_empty(device=device)
