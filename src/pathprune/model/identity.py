"""Which model this is, and whether pairs that were found elsewhere are of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from pathprune.errors import MismatchError, UnsupportedModelError
from pathprune.family.pair_list import BaseModel, PairList
from pathprune.family.pairs import Pair, Slot
from pathprune.model.linear import Map, features
from pathprune.model.wrapped import check_bare

# Configuration entries that say how a model was loaded or saved, not what it computes.
VOLATILE = frozenset(
    [
        "_name_or_path",
        "transformers_version",
        "architectures",
        "dtype",
        "torch_dtype",
        "_attn_implementation",
        "attn_implementation",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
        "use_cache",
        "quantization_config",
    ]
)


Read = Callable[[str, range], Tensor]


def identify(model: nn.Module, macs_per_token: int, macs_per_sequence: int, read: Read | None = None) -> BaseModel:
    """Hash a model's configuration, and a sample of its weights.

    Weights are rounded to bfloat16, and once more by way of float16, so that of one model in two precisions one of the
    two hashes is the same (but for bfloat16 against float16).

    Args:
        read: gives some values of a parameter by its name and their places in the flattened one; by default the
            model's own.
    """
    config = getattr(model, "config", None)
    facts = config.to_diff_dict() if config is not None else {}
    facts = {key: value for key, value in facts.items() if key not in VOLATILE and not key.endswith("_token_id")}
    straight, by_half = hashlib.sha256(), hashlib.sha256()
    for name, parameter in model.named_parameters():
        places = range(0, parameter.numel(), max(1, parameter.numel() // 16))[:17]
        values = (
            parameter.detach().flatten()[places.start : places.stop : places.step]
            if read is None
            else read(name, places)
        )
        for weights, sample in ((straight, values.cpu()), (by_half, values.to("cpu", torch.float16))):
            weights.update(f"{name}{tuple(parameter.shape)}".encode())
            weights.update(sample.to(torch.bfloat16).view(torch.int16).numpy().tobytes())
    return BaseModel(
        architecture=type(model).__name__,
        config_hash=hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest(),
        fingerprint=f"{straight.hexdigest()[:32]}-{by_half.hexdigest()[:32]}",
        params=sum(parameter.numel() for parameter in model.parameters()),
        macs_per_token=macs_per_token,
        macs_per_sequence=macs_per_sequence,
        bytes=_bytes_on_disk(model),
        itemsize=itemsize(model),
    )


def itemsize(model: nn.Module) -> int:
    """Bytes of a weight; of the narrowest, so that what is removed is never counted for more than it takes."""
    return min((parameter.itemsize for parameter in model.parameters() if parameter.dim() > 1), default=4)


def _bytes_on_disk(model: nn.Module) -> int:
    """Of the safetensors file that the model is saved as: its tensors, each once, and a header that names them."""
    tensors = {id(tensor): (name, tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, tensor in tensors.values():
        end = at + tensor.numel() * tensor.itemsize
        header[name] = {"dtype": "BF16", "shape": [*tensor.shape], "data_offsets": [at, end]}
        at = end
    words = len(json.dumps(header, separators=(",", ":")).encode())
    return 8 + -(-words // 8) * 8 + at


def check_base(model: nn.Module, pairs: PairList, read: Read | None = None) -> None:
    """Check that ``pairs`` were found in this very model.

    Args:
        read: see ``identify``.

    Raises:
        MismatchError: architecture, configuration or weights differ.
    """
    if read is None:
        check_usable(model)
    base, here = pairs.base, identify(model, pairs.base.macs_per_token, pairs.base.macs_per_sequence, read)
    alike = set(base.fingerprint.split("-")) & set(here.fingerprint.split("-"))
    for what, theirs, ours in (
        ("architecture", base.architecture, here.architecture),
        ("size", f"{base.params:,} parameters", f"{here.params:,} parameters"),
        ("configuration", base.config_hash[:12], here.config_hash[:12]),
        ("weights", base.fingerprint[:12], base.fingerprint[:12] if alike else here.fingerprint[:12]),
    ):
        if theirs != ours:
            raise MismatchError(
                f"this path belongs to another model: {what} was {theirs}, here it is {ours}. "
                "Load the model that was searched, or search this one"
            )
    _check_slots(model, pairs)


def _check_slots(model: nn.Module, pairs: PairList) -> None:
    """Hold pairs, which may come from a file, against the model's own maps.

    Raises:
        MismatchError: a map is not there, has another shape than its slot says, or would be cut by two pairs.
    """
    modules = dict(model.named_modules())
    taken: dict[tuple[str, str, str], npt.NDArray[np.bool_]] = {}
    forms: dict[str, tuple[int, bool, bool, bool]] = {}
    for pair in pairs:
        form = (pair.groups, pair.narrow, pair.fewer, pair.rescale)
        if pair.kind != "mlp" and forms.setdefault(pair.block, form) != form:
            raise MismatchError(
                f"the path's pairs of {pair.block} disagree in their heads, or in what its code follows (narrow, "
                "fewer, rescale); the path was altered: copy it again, or search again"
            )
        if pair.block not in modules or (pair.kind != "mlp" and pair.name != f"{pair.block}.{pair.kind}".lstrip(".")):
            raise MismatchError(
                f"the path's {pair.name} lies in {pair.block!r}, where the model has none; search again"
            )
        for slot in pair.slots:
            if slot.module not in modules:
                raise MismatchError(
                    f"the path's {pair.name} names {slot.module}, which the model has not; search it again"
                )
            axis, size, bias = _sizes_of(modules[slot.module], slot, pair)
            groups = 1 if pair.stacked else pair.groups
            seen = groups * slot.total * (1 if slot.layout == "rows" else pair.width)
            exact = pair.narrow or pair.fewer or not slot.fused  # otherwise other maps may lie on the axis, too
            if (slot.size, slot.bias) != (size, bias) or seen > axis or (exact and seen != axis):
                raise MismatchError(
                    f"the path's {pair.name} has {slot.module} with an inner axis of {seen}, {slot.size} features on "
                    f"the other side and {'a' if slot.bias else 'no'} bias; the model's has {axis}, {size} and "
                    f"{'one' if bias else 'none'}. The path was altered: copy it again, or search again"
                )
            places = slot.index(groups, pair.width).ravel()
            free = taken.setdefault((slot.module, slot.parameter, slot.side), np.ones(axis, dtype=bool))
            shared = slot.module in [other.module for other in pair.slots if other is not slot]
            if places.max() >= axis or not (free[places].all() or shared):
                raise MismatchError(
                    f"the path's {pair.name} takes places of {slot.module} that another pair takes, or that are not "
                    "there; the path was altered: copy it again, or search again"
                )
            free[places] = False


def _sizes_of(module: nn.Module, slot: Slot, pair: Pair) -> tuple[int, int, bool]:
    """Length of a map's inner axis and of the other one, and whether it has a bias."""
    if not slot.parameter:
        if not isinstance(module, Map):
            raise MismatchError(f"{slot.module} is a {type(module).__name__}, not a linear map; search again")
        inputs, outputs = features(module)
        axes = (outputs, inputs) if slot.side == "out" else (inputs, outputs)
        return *axes, module.bias is not None
    stack = getattr(module, slot.parameter, None)
    if not isinstance(stack, nn.Parameter) or stack.dim() != 3 or len(stack) != pair.groups:
        raise MismatchError(f"{slot.module} stacks no {pair.groups} maps in a {slot.parameter}; search again")
    biased = slot.side == "out" and isinstance(getattr(module, f"{slot.parameter}_bias", None), Tensor)
    return stack.shape[slot.dim], stack.shape[3 - slot.dim], biased


def check_usable(model: nn.Module) -> None:
    """Refuse a model that is inside another, and one whose weights are elsewhere or cannot be worked with.

    Raises:
        UnsupportedModelError: it is one of these; the message says what to pass instead.
    """
    check_bare(model)
    if any(parameter.is_inference() for parameter in model.parameters()):
        raise UnsupportedModelError(
            f"the {type(model).__name__} was built under torch.inference_mode(), so that nothing can be learned about "
            "its weights; build or load it outside, or pass copy.deepcopy(model), made outside"
        )
    if absent := [name for name, parameter in model.named_parameters() if parameter.is_meta]:
        raise UnsupportedModelError(
            f"{len(absent)} parameters of the {type(model).__name__} are on the meta device ({absent[0]}): it was "
            "built without weights, or offloaded; load it whole, on one device"
        )
