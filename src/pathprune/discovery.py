"""Find the pairs of a model by structure, and prove each before it is offered.

Candidates are read off the roles of linear maps and how their shapes meet (``pathprune.layouts``).
A candidate counts only when the sublayer, sliced at random, computes what the masked sublayer
computes, on arguments captured from a real forward pass (``pathprune.proof``). What cannot be
proved is refused with its reason; nothing is guessed.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pathprune.errors import DataError, MismatchError, UnsupportedModelError
from pathprune.inputs import example_inputs
from pathprune.layouts import Candidate, propose
from pathprune.limits import Limits
from pathprune.modes import eager, evaluating
from pathprune.outputs import samples
from pathprune.pairs import BaseModel, Pair, PairList, Slot
from pathprune.proof import Call, in_caches, prove
from pathprune.shapes import Map, attention_of, features, is_map
from pathprune.wrapped import check_bare

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


def find_pairs(model: nn.Module, inputs: Mapping[str, Any] | None = None) -> PairList:
    """All prunable pairs of a model, each proved on arguments that a forward pass gave its sublayer.

    Args:
        model: of ``transformers`` or any other library.
        inputs: keyword arguments of a forward pass; by default a tiny input made from the
            model's configuration. Sublayers that it does not reach are refused.

    Returns:
        The pairs in forward order; ``.base`` identifies the model, ``.refused`` names the
        sublayers that looked prunable but could not be proved, with the reason.

    Raises:
        UnsupportedModelError: no pair was found or proved; the message says what was found.
        DataError: the model cannot read ``inputs``.
    """
    _check_present(model)
    if any(
        getattr(owner, name, None) is not None
        for owner, name in ((getattr(model, "config", None), "quantization_config"), (model, "pathprune"))
    ):
        raise UnsupportedModelError(
            f"{type(model).__name__} is quantised or already sliced; search the dense, unquantised model"
        )
    if inputs is None:
        batch = example_inputs(model)
    elif isinstance(inputs, Mapping):
        batch = dict(inputs)
        Limits(model).check({name: value for name, value in batch.items() if isinstance(value, Tensor)})
    else:
        raise DataError(f"inputs is a {type(inputs).__name__}; it must be a dict of model inputs")
    for name, mask in batch.items():
        if name.endswith("attention_mask") and isinstance(mask, Tensor) and mask.dim() == 2:
            batch[name] = torch.ones_like(mask)  # what padding attends to means nothing, and would disprove a fill
    parameters = inspect.signature(model.forward).parameters
    if "use_cache" in parameters or (getattr(model, "can_generate", bool)() and "kwargs" in parameters):
        batch.setdefault("use_cache", False)  # a cache would grow from one run of a block to the next
    with eager(model), evaluating(model):
        count = _Count(model, batch)
        candidates, refused = propose(model, count.order)
        if not candidates:
            linears = sum(is_map(module) for module in model.modules())
            raise UnsupportedModelError(
                f"{type(model).__name__}: no attention or MLP in a known layout among its {linears} linear maps. "
                f"{_reasons(refused)}What is found are attention's query, key, value and output maps and MLPs' up and "
                "down maps, under the names that transformers and timm give them"
            )
        found: dict[int, list[Pair]] = {}
        groups, calls, shared, astray = _capture(model, batch, candidates)
        for fewer in (True, False):
            for alike in groups:
                first = next((candidate for candidate in alike if candidate.block in calls), None)
                if first is None or any(m not in count.positions for m in first.modules):
                    refused |= {candidate.block: "the forward pass of the input never called it" for candidate in alike}
                    continue
                if outside := [(one, m) for one in alike for m in sorted(one.modules & astray)]:
                    refused |= {one.block: f"{m} is called from outside of it, too" for one, m in outside}
                    continue
                inside = Candidate("", tuple(tuple(map(_inside, choice)) for choice in first.choices))
                columns = _columns(calls.get(attention_of(model, first.choices[0][0])))
                scope = model.get_submodule(first.block)
                fixed = _swapped(model, first.block)
                held, reasons = prove(
                    inside,
                    scope,
                    calls[first.block],
                    columns,
                    shared=shared,
                    narrow=not fixed,
                    fewer=fewer and not fixed,
                )
                for candidate in alike:
                    names = {pair.kind: pair.name for pair in candidate.choices[0]}
                    found[id(candidate)] = [_outside(pair, candidate.block, names[pair.kind]) for pair in held]
                    refused |= {names[kind]: reason for kind, reason in reasons.items()}
            groups = _disagreeing(groups, found)
    pairs = []
    for candidate in candidates:
        for pair in found.get(id(candidate), []):
            calls_, once = count.calls(pair)
            pairs.append(replace(pair, calls=calls_, once=once))
    if not pairs:
        raise UnsupportedModelError(
            f"{type(model).__name__}: found {len(candidates)} sublayers, none could be proved. {_reasons(refused)}"
        )
    return PairList(pairs, identify(model, *count.dense([p for p in pairs if p.stacked])), refused)


def _disagreeing(groups: list[list[Candidate]], found: Mapping[int, list[Pair]]) -> list[list[Candidate]]:
    """Groups of attentions that may have fewer heads, while others of the same maps may not.

    Some layers hand on what they computed for every head (T5's position bias), and only the layers that are
    handed it show that the number of heads must not change.
    """

    def maps(group: list[Candidate]) -> Any:
        pairs = found.get(id(group[0]), [])
        return tuple((pair.kind, pair.groups, pair.width, _inside(pair).slots) for pair in pairs if pair.kind != "mlp")

    fixed = {maps(group) for group in groups if not all(pair.fewer for pair in found.get(id(group[0]), []))}
    return [
        group
        for group in groups
        if maps(group) in fixed and maps(group) and all(pair.fewer for pair in found[id(group[0])])
    ]


def _swapped(model: nn.Module, block: str) -> bool:
    """Whether the attention's code may be replaced between forward passes, by code in the dense sizes of the
    configuration (BigBird: full attention for short inputs, block-sparse attention for long ones).
    """
    parts = block.split(".")
    above = (model.get_submodule(".".join(parts[:depth])) for depth in range(len(parts) + 1))
    return any(hasattr(module, "set_attention_type") for module in above)


def _columns(call: Call | None) -> int:
    """Width of the cos and sin that an attention is handed by name; zero if it is not."""
    handed = call[1].get("position_embeddings") if call else None
    if isinstance(handed, tuple) and len(handed) == 2 and all(isinstance(t, Tensor) for t in handed):
        return int(handed[0].shape[-1])
    return 0


def _facts(scope: nn.Module) -> tuple[Any, ...]:
    """What a block computes with beside its weights: types, plain attributes, functions of its own, hooks."""
    facts: list[Any] = []
    for name, module in scope.named_modules():
        own = {key: value for key, value in vars(module).items() if key not in ("layer_idx", "training")}
        plain = {key: value for key, value in own.items() if isinstance(value, bool | int | float | str | None)}
        functions = {key: id(value) for key, value in own.items() if callable(value)}
        hooks = [id(hook) for key in ("_forward_hooks", "_forward_pre_hooks") for hook in own[key].values()]
        facts.append((name, type(module), repr(plain), repr(functions), tuple(hooks)))
    return tuple(facts)


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
    )


def check_base(model: nn.Module, pairs: PairList, read: Read | None = None) -> None:
    """Check that ``pairs`` were found in this very model.

    Args:
        read: see ``identify``.

    Raises:
        MismatchError: architecture, configuration or weights differ.
    """
    if read is None:
        _check_present(model)
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


def _check_present(model: nn.Module) -> None:
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


def _reasons(refused: Mapping[str, str]) -> str:
    return "".join(f"{name}: {reason}. " for name, reason in list(refused.items())[:5])


class _Count:
    """What one forward pass shows of the maps that it calls.

    Attributes:
        order: map -> when it was first called.
        positions: map, or module of stacked experts -> vectors that it was given, by each map of the stack.
        macs: of each call of a map: positions, MACs.
        sequences: length of the batch.
    """

    def __init__(self, model: nn.Module, batch: Mapping[str, Any]) -> None:
        self.order: dict[str, int] = {}
        self.positions: dict[str, int] = {}
        self.macs: list[tuple[int, int]] = []
        handles = []
        for name, module in model.named_modules():
            if is_map(module):
                handles.append(module.register_forward_hook(self._map(name)))
            elif any(p.dim() == 3 for p in module.parameters(recurse=False)):
                handles.append(module.register_forward_pre_hook(self._stack(name)))
        try:
            run_once(model, batch)
        finally:
            for handle in handles:
                handle.remove()
        self.sequences = samples({name: x for name, x in batch.items() if isinstance(x, Tensor)})
        self.tokens = max((positions for positions, _ in self.macs), default=1)

    def _map(self, name: str) -> Any:
        def hook(module: Map, args: tuple[Tensor, ...], output: Any) -> None:
            if not isinstance(output, Tensor):  # a subclass with a mind of its own
                return
            inputs, outputs = features(module)
            rows = output.numel() // max(outputs, 1)
            self.order.setdefault(name, len(self.order))
            self.positions[name] = self.positions.get(name, 0) + rows
            self.macs.append((rows, rows * inputs * outputs))

        return hook

    def _stack(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            tensors = [x for x in args if isinstance(x, Tensor)]
            chosen = [x.shape[-1] for x in tensors[1:] if not x.is_floating_point() and x.dim() > 1]  # experts a token
            rows = tensors[0].numel() // tensors[0].shape[-1] if tensors else 0
            self.positions[name] = self.positions.get(name, 0) + rows * (chosen[0] if chosen else 1)

        return hook

    def calls(self, pair: Pair) -> tuple[float, bool]:
        """``Pair.calls`` and ``Pair.once``."""
        rows = self.positions[pair.mask_slot.module] / (pair.groups if pair.stacked else 1)
        if rows % self.tokens == 0 or pair.stacked:
            return rows / self.tokens, False
        return rows / self.sequences, True

    def dense(self, stacks: list[Pair]) -> tuple[int, int]:
        """MACs per token and per sequence."""
        every = sum(count for rows, count in self.macs if rows == self.tokens)
        once = sum(count for rows, count in self.macs if rows != self.tokens)
        every += round(sum(pair.groups * pair.units * pair.unit_macs(1) for pair in stacks) * self.tokens)
        return every // self.tokens, once // self.sequences


def run_once(model: nn.Module, batch: Mapping[str, Any]) -> None:
    """One forward pass.

    Raises:
        UnsupportedModelError: it fails.
    """
    try:
        with torch.no_grad():
            model(**batch)
    except Exception as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} did not run on the input, so nothing could be proved: "
            f"{type(error).__name__}: {error}. Pass inputs=, a batch that it runs on"
        ) from error


def _capture(
    model: nn.Module, batch: Mapping[str, Any], candidates: list[Candidate]
) -> tuple[list[list[Candidate]], dict[str, Call], bool, set[str]]:
    """Candidates that need one proof, because they differ in nothing but their weights and the values that they
    are called with; the arguments of one block and attention of each such group, as they were before the call;
    whether layers share what they leave in a cache; and maps that are called while their block is not running.
    """
    alike = {}
    for candidate in candidates:
        inside = tuple(tuple(replace(_inside(pair), name="") for pair in choice) for choice in candidate.choices)
        alike[id(candidate)] = (_facts(model.get_submodule(candidate.block)), inside)
    watched: dict[str, Any] = {}
    for candidate in candidates:
        for name in (candidate.block, attention_of(model, candidate.choices[0][0])):
            watched[name] = (alike[id(candidate)], name == candidate.block)
    forms: dict[str, Any] = {}
    seen: set[Any] = set()
    calls: dict[str, Call] = {}
    held: dict[str, set[int]] = {}
    shared = False
    running: dict[str, int] = dict.fromkeys(watched, 0)
    astray: set[str] = set()

    def remember(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            held[name] = in_caches((args, kwargs))
            running[name] += 1
            if name in forms:
                return
            leaves, tree = pytree.tree_flatten((args, kwargs))
            form = repr((tree, [tuple(x.shape) if isinstance(x, Tensor) else type(x) for x in leaves]))
            forms[name] = form
            if (watched[name], form) not in seen:  # one copy is enough
                seen.add((watched[name], form))
                calls[name] = copy.deepcopy((args, kwargs))

        return hook

    def compare(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            nonlocal shared  # unless the layer was the first that wrote where it wrote, and will be the last
            running[name] -= 1
            after = in_caches((args, kwargs))
            shared = shared or (bool(after) and after == held[name])

        return hook

    def called(name: str, block: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            if not running[block]:
                astray.add(name)

        return hook

    handles = []
    for name in watched:
        module = model.get_submodule(name)
        handles.append(module.register_forward_pre_hook(remember(name), with_kwargs=True))
        handles.append(module.register_forward_hook(compare(name), with_kwargs=True))
    for candidate in candidates:
        for name in candidate.modules:
            handles.append(model.get_submodule(name).register_forward_pre_hook(called(name, candidate.block)))
    try:
        run_once(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    groups: dict[Any, list[Candidate]] = {}
    for candidate in candidates:
        block, attention = candidate.block, attention_of(model, candidate.choices[0][0])
        groups.setdefault((alike[id(candidate)], forms.get(block), forms.get(attention)), []).append(candidate)
    return list(groups.values()), calls, shared, astray


def _inside(pair: Pair) -> Pair:
    """The same pair, seen from its block."""
    cut = len(pair.block) + 1 if pair.block else 0
    slots = tuple(replace(slot, module=slot.module[cut:]) for slot in pair.slots)
    return replace(pair, block="", slots=slots)


def _outside(pair: Pair, block: str, name: str) -> Pair:
    """A pair that was proved in one block, in another that differs in nothing but its weights."""
    slots = tuple(replace(slot, module=f"{block}.{slot.module}".strip(".")) for slot in pair.slots)
    return replace(pair, name=name, block=block, slots=slots)
