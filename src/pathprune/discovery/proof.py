"""Prove a candidate: sliced, the sublayer computes what it computes masked.

In float64, on the arguments of a real call, for random selections with unequal widths, a head
gone, and everything gone, with random fills and rotations where the pair would allow them. The
first form of the pairs that holds is taken, from the one that leaves the least behind (the
layer's code follows smaller heads) to the one that always holds if anything does (kept
dimensions stay in their places, zeros in the others). What cannot be proved is refused.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property, partial
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.cache_utils import Cache, CacheLayerMixin

from pathprune.discovery.layouts.candidate import Candidate
from pathprune.family.pair_list import BaseModel, PairList
from pathprune.family.pairs import Kind, Pair
from pathprune.family.selection import Selection
from pathprune.model.contexts import copied
from pathprune.transform.masks import attach_masks
from pathprune.transform.slicing import slice_modules
from pathprune.types import Ints

TOLERANCE = 1e-9

Call = tuple[tuple[Any, ...], dict[str, Any]]


class Float64(TorchDispatchMode):
    """While it is active, nothing is rounded to a lower precision, as many models do inside (norms, softmax,
    rotary embedding): what differs in float64 is then wrong, not rounded.
    """

    LOWER = (torch.float32, torch.float16, torch.bfloat16)

    def __enter__(self) -> Float64:
        self.before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)  # what is made without a dtype has this one
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        torch.set_default_dtype(self.before)
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("dtype") in self.LOWER:
            kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


class Bench:
    """One sublayer and the arguments of one call of it, in float64.

    Args:
        shared: whether other layers read what this one leaves in a cache, which is then a part of what it gives.
    """

    def __init__(self, scope: nn.Module, call: Call, shared: bool) -> None:
        self.shared = shared
        self.scope = copied(scope).double()
        self.scope.eval()  # by itself: some layers' own train() returns nothing
        for module in self.scope.modules():  # grouped kernels know no float64
            config: Any = getattr(module, "config", None)
            if getattr(config, "_experts_implementation", None):
                config._experts_implementation = "eager"
        self.call = pytree.tree_map(lambda x: x.double() if _floating(x) else x, call)

    def run(self, module: nn.Module) -> list[list[Tensor]]:
        """What it gives: its output (the first tensor; attention weights, by head, may follow), then all that it was
        given and may have written into, as other layers may read that.

        Twice where attention may be fused or not (timm), which takes the scale from different places.
        """
        switches: list[Any] = [m for m in module.modules() if isinstance(getattr(m, "fused_attn", None), bool)]
        outputs = []
        for _ in range(1 + bool(switches)):
            args, kwargs = copy.deepcopy(self.call)  # layers may write into what they are given, a cache for one
            with Float64():
                output = module(*args, **kwargs)
            outputs.append([*islice(_tensors(output), 1), *_tensors((args, kwargs), self.shared)])
            for switch in switches:
                switch.fused_attn = not switch.fused_attn
        return outputs

    @cached_property
    def dense(self) -> list[list[Tensor]]:
        """``run`` without any mask."""
        return self.run(self.scope)

    def refutes(self, members: Sequence[Pair]) -> str | None:
        """Why the members, as they are, do not hold; None if they do."""
        rng = np.random.default_rng(0)
        for trial, keep in enumerate(_trials(rng, members)):
            # None in the first trial: it would be seen to change the output even where all units are zero.
            fill = {p.name: rng.normal(size=(p.groups, p.width)) for p in members if p.fillable and trial}
            basis = {}
            if trial == 1:
                basis = {p.name: rng.normal(size=(p.groups, p.width, p.width)) for p in members if p.rotatable}
            scale = {p.name: rng.uniform(0.5, 1.5, p.shape) for p in members if p.scalable}
            pairs = PairList(members, BaseModel("", "", "", 0, 0))
            selection = Selection(pairs, keep, fill=fill, basis=basis, scale=scale)
            masks = {pair.name: torch.from_numpy(selection.mask(pair)) for pair in members}
            constants = {name: torch.from_numpy(array) for name, array in fill.items()}
            try:
                with torch.no_grad():
                    with attach_masks(self.scope, members, masks, constants, basis):
                        expected = self.run(self.scope)
                    sliced, _ = slice_modules(self.scope, selection)
                    got = self.run(sliced)
                    visible = trial > 0 or max(map(_distance, self.dense, expected)) > TOLERANCE
            except Exception as error:
                return f"sliced, it does not run: {type(error).__name__}: {error}"
            gap = max(map(_distance, expected, got))
            if not gap <= TOLERANCE:
                return f"sliced and masked outputs differ by {gap:.1e} (relative; at most {TOLERANCE:.0e})"
            if not visible:
                return "masking its units does not change its output"
            if any(pair.kind == "vo" and pair.mixing for pair in members):
                gap = max(map(_distance, expected, self._values_masked(members, masks)))
                if not gap <= TOLERANCE:
                    return f"its values and what reads them do not belong together: outputs differ by {gap:.1e}"
        return None

    def _values_masked(self, members: Sequence[Pair], masks: dict[str, Tensor]) -> list[list[Tensor]]:
        """The output where values are masked by themselves, as if nothing stood between them and their reader."""
        alone = [replace(pair, mixing=False) if pair.kind == "vo" else pair for pair in members]
        with torch.no_grad(), attach_masks(self.scope, alone, masks):
            return self.run(self.scope)


def prove(
    candidate: Candidate,
    scope: nn.Module,
    call: Call,
    columns: int,
    *,
    shared: bool = False,
    narrow: bool = True,
    fewer: bool = True,
) -> tuple[list[Pair], dict[Kind, str]]:
    """The pairs of a candidate, seen from its block, in the first form that holds; and refused kinds with the reason.

    Args:
        scope: the block.
        call: its arguments.
        columns: width of the cos and sin that the attention is handed by name; zero if it is not.
        shared: whether the model's layers read what others leave in a cache.
        narrow, fewer: whether forms of attention with narrower or fewer heads may be taken.
    """
    bench = Bench(scope, call, shared)
    held: list[Pair] = []
    refused: dict[Kind, str] = {}
    for choice in candidate.choices:
        held, refused = _alone(bench, choice)
        # What is masked at every map is exact in any layout: a fused one must show itself in the values or neurons.
        shown = [pair for pair in held if pair.kind == "vo" or (pair.kind == "mlp" and not pair.mixing)]
        if shown or len(candidate.choices) == 1:
            break
    else:
        reason = next(iter(refused.values()), "its neurons show in none")
        return [], {pair.kind: f"fused in no known layout ({reason})" for pair in candidate.choices[0]}
    if not held:
        return [], refused
    failure: str | None = None
    for form in _forms(held, len(candidate.choices[0]), columns, narrow, fewer):
        if form == held and len(held) == 1:
            return held, refused  # already proved
        failure = bench.refutes(form)
        if failure is None:
            return form, refused
    return [], {**refused, **{pair.kind: str(failure) for pair in held}}


def _alone(bench: Bench, choice: Sequence[Pair]) -> tuple[list[Pair], dict[Kind, str]]:
    """Each pair in place, by itself: what, if anything, stands between its maps."""
    held: list[Pair] = []
    refused: dict[Kind, str] = {}
    for pair in choice:
        first = None
        for variant in _between(pair):
            reason = bench.refutes([variant])
            first = first or reason
            if reason is None:
                held.append(variant)
                break
        else:
            refused[pair.kind] = str(first)
    return held, refused


def _between(pair: Pair) -> Iterator[Pair]:
    in_place = replace(pair, narrow=False, fewer=False)
    if pair.stacked:  # stacked maps have nothing between them but their expert's own code
        yield pair
        return
    yield in_place
    if pair.kind == "qk" and pair.width % 2 == 0:
        yield replace(in_place, rotary="halves")
        yield replace(in_place, rotary="neighbours")
    yield replace(in_place, mixing=True)


def _forms(
    held: list[Pair], expected: int, columns: int, may_be_narrow: bool, may_be_fewer: bool
) -> Iterator[list[Pair]]:
    """From what leaves the least behind to what is always right."""
    if held[0].stacked:
        yield held
        return
    free = not any(pair.mixing for pair in held)
    if held[0].kind == "mlp":
        if free:
            yield [replace(held[0], narrow=True, fewer=True)]
        yield held
        return
    if len(held) == expected and not any(slot.layout in ("rows", "turns") for pair in held for slot in pair.slots):
        width = held[0].width
        rotary = [pair for pair in held if pair.rotary]
        narrow = may_be_narrow and free and all(pair.width == width for pair in held)
        narrow = narrow and (not rotary or columns in (width, width // 2))
        for fewer in (True, False) if may_be_fewer else (False,):
            for rescale in (False, True) if narrow else ():
                yield [replace(pair, narrow=True, fewer=fewer, rescale=rescale) for pair in held]
        if may_be_fewer:
            yield [replace(pair, fewer=True) for pair in held]
    yield held


Keep = dict[str, npt.NDArray[np.bool_]]


def _trials(rng: np.random.Generator, members: Sequence[Pair]) -> Iterator[Keep]:
    """Rectangles with unequal widths and, where there are several heads, one gone; nothing at all; and where
    dimensions are coupled, halves of the units that tell any two units apart.
    """

    def some(pair: Pair) -> Ints:
        return rng.permutation(pair.units)[: max(1, pair.units * (1 + (pair.kind == "qk")) // 3)]

    for _ in range(2):
        yield _rectangles(members, rng, some)
    yield {pair.name: np.zeros(pair.shape, dtype=bool) for pair in members}
    coupled = [pair.units for pair in members if pair.rotary]
    for bit in range((max(coupled, default=1) - 1).bit_length()):
        yield _rectangles(members, rng, partial(_with_bit, bit))


def _with_bit(bit: int, pair: Pair) -> Ints:
    units = np.arange(pair.units)
    chosen = units[units >> bit & 1 == 1]
    return chosen if len(chosen) else units[:1]


def _rectangles(members: Sequence[Pair], rng: np.random.Generator, choose: Callable[[Pair], Ints]) -> Keep:
    keep = {}
    alive = np.ones(members[0].groups, dtype=bool)
    if len(alive) > 1 and not members[0].stacked:
        alive[rng.integers(len(alive))] = False
    for pair in members:
        keep[pair.name] = np.zeros(pair.shape, dtype=bool)
        common = choose(pair)
        for head in np.flatnonzero(alive):
            keep[pair.name][head, common if pair.rotary else choose(pair)] = True
    return keep


def _floating(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def _cache(x: Any) -> bool:
    return isinstance(x, Cache | CacheLayerMixin)


def _tensors(x: Any, caches: bool = False) -> Iterator[Tensor]:
    """All floating tensors in nested containers, caches among them if asked for."""
    for leaf in pytree.tree_leaves(x, is_leaf=_cache):
        if _floating(leaf):
            yield leaf.detach()
        elif caches and _cache(leaf):
            yield from _tensors(vars(leaf), caches)


def in_caches(call: Call) -> set[int]:
    """The layers' caches, by identity, that hold something among the arguments of a call."""
    held: set[int] = set()
    for cache in filter(_cache, pytree.tree_leaves(call, is_leaf=_cache)):
        if isinstance(cache, Cache):
            held |= in_caches(((vars(cache),), {}))
        elif cache.is_initialized:
            held.add(id(cache))
    return held


def _distance(one: list[Tensor], other: list[Tensor]) -> float:
    """Largest relative difference, tensor by tensor."""
    if [x.shape for x in one] != [x.shape for x in other]:
        return float("inf")
    gaps = [
        float((x - y).abs().max() / x.abs().max().clamp_min(1e-30))
        for x, y in zip(one, other, strict=True)
        if x.numel()
    ]
    return max(gaps, default=0.0)
