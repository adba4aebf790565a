"""What one forward pass shows of a model: which maps run, how often, and on what."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pathprune.discovery.layouts.candidate import Candidate
from pathprune.discovery.proof import Call, in_caches
from pathprune.errors import UnsupportedModelError
from pathprune.family.pairs import Pair
from pathprune.model.attention import attention_of
from pathprune.model.linear import Map, features, is_map
from pathprune.model.outputs import samples


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


class CallCount:
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


def capture_calls(
    model: nn.Module, batch: Mapping[str, Any], candidates: list[Candidate]
) -> tuple[list[list[Candidate]], dict[str, Call], bool, set[str]]:
    """Candidates that need one proof, because they differ in nothing but their weights and the values that they
    are called with; the arguments of one block and attention of each such group, as they were before the call;
    whether layers share what they leave in a cache; and maps that are called while their block is not running.
    """
    alike = {}
    for candidate in candidates:
        inside = tuple(
            tuple(replace(relative_to_block(pair), name="") for pair in choice) for choice in candidate.choices
        )
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


def relative_to_block(pair: Pair) -> Pair:
    """The same pair, seen from its block."""
    cut = len(pair.block) + 1 if pair.block else 0
    slots = tuple(replace(slot, module=slot.module[cut:]) for slot in pair.slots)
    return replace(pair, block="", slots=slots)


def placed_in_block(pair: Pair, block: str, name: str) -> Pair:
    """A pair that was proved in one block, in another that differs in nothing but its weights."""
    slots = tuple(replace(slot, module=f"{block}.{slot.module}".strip(".")) for slot in pair.slots)
    return replace(pair, name=name, block=block, slots=slots)
