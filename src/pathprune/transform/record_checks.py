"""A shape record that comes from a file, held against the dense model."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Mapping
from typing import Any

from torch import nn

from pathprune.errors import ArtifactError
from pathprune.model.attention import HEADS, KINDS, SCALES, WIDTHS, head_width
from pathprune.model.linear import Map, features, linear_map


def check_record(model: nn.Module, record: Mapping[str, Any], *, doubtful: bool = True) -> None:
    """Refuse a record that slicing would not have written for this dense model: it comes from a file.

    Args:
        doubtful: the record has no checksum.

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
    if doubtful:
        _check_consistent(model, record)


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


def _check_consistent(model: nn.Module, record: Mapping[str, Any]) -> None:
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
