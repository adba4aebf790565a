"""Find the pairs of a model by structure, and prove each before it is offered.

Candidates are read off the roles of linear maps and how their shapes meet (``pathprune.discovery.layouts.propose``).
A candidate counts only when the sublayer, sliced at random, computes what the masked sublayer
computes, on arguments captured from a real forward pass (``pathprune.discovery.proof``). What cannot be
proved is refused with its reason; nothing is guessed.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from pathprune.discovery.dummy_inputs import example_inputs
from pathprune.discovery.layouts.candidate import Candidate, Layout
from pathprune.discovery.layouts.propose import propose
from pathprune.discovery.proof import Call, prove
from pathprune.discovery.trace import CallCount, capture_calls, placed_in_block, relative_to_block
from pathprune.errors import DataError, UnsupportedModelError
from pathprune.family.pair_list import PairList
from pathprune.family.pairs import Pair
from pathprune.model.attention import attention_of
from pathprune.model.contexts import eager, evaluating
from pathprune.model.identity import check_usable, identify
from pathprune.model.limits import Limits
from pathprune.model.linear import is_map


def find_pairs(
    model: nn.Module, inputs: Mapping[str, Any] | None = None, *, layouts: Sequence[Layout] = ()
) -> PairList:
    """All prunable pairs of a model, each proved on arguments that a forward pass gave its sublayer.

    Args:
        model: of ``transformers`` or any other library.
        inputs: keyword arguments of a forward pass; by default a tiny input made from the
            model's configuration. Sublayers that it does not reach are refused.
        layouts: your own, for this call; they are asked before those that are registered
            (``pathprune.registry.LAYOUTS``).

    Returns:
        The pairs in forward order; ``.base`` identifies the model, ``.refused`` names the
        sublayers that looked prunable but could not be proved, with the reason.

    Raises:
        UnsupportedModelError: no pair was found or proved; the message says what was found.
        DataError: the model cannot read ``inputs``.

    Example:
        >>> pairs = pp.find_pairs(model)
        >>> pairs[0].name, pairs[0].shape
        ('encoder.layer.0.attention.qk', (4, 8))
        >>> f"{pairs.prunable_params / pairs.base.params:.0%} of the model can be pruned"
        '76% of the model can be pruned'
    """
    check_usable(model)
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
        count = CallCount(model, batch)
        candidates, refused = propose(model, count.order, layouts)
        if not candidates:
            linears = sum(is_map(module) for module in model.modules())
            raise UnsupportedModelError(
                f"{type(model).__name__}: no attention or MLP in a known layout among its {linears} linear maps. "
                f"{_reasons(refused)}What is found are attention's query, key, value and output maps and MLPs' up and "
                "down maps, under the names that transformers and timm give them"
            )
        found: dict[int, list[Pair]] = {}
        groups, calls, shared, astray = capture_calls(model, batch, candidates)
        for fewer in (True, False):
            for alike in groups:
                first = next((candidate for candidate in alike if candidate.block in calls), None)
                if first is None or any(m not in count.positions for m in first.modules):
                    refused |= {candidate.block: "the forward pass of the input never called it" for candidate in alike}
                    continue
                if outside := [(one, m) for one in alike for m in sorted(one.modules & astray)]:
                    refused |= {one.block: f"{m} is called from outside of it, too" for one, m in outside}
                    continue
                inside = Candidate("", tuple(tuple(map(relative_to_block, choice)) for choice in first.choices))
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
                    found[id(candidate)] = [placed_in_block(pair, candidate.block, names[pair.kind]) for pair in held]
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
        return tuple(
            (pair.kind, pair.groups, pair.width, relative_to_block(pair).slots) for pair in pairs if pair.kind != "mlp"
        )

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


def _reasons(refused: Mapping[str, str]) -> str:
    return "".join(f"{name}: {reason}. " for name, reason in list(refused.items())[:5])
