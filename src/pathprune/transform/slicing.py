"""Make the modules of a model physically smaller.

A sliced model is its dense model with smaller linear maps and nothing else: no attention code
is replaced. Where the layer's own code wants more than the small maps give, zeros are put in
*between* the linear maps, so that the model's own ``view(..., -1, head_dim)``, its
cache and every attention kernel work unchanged, while the parameters stay small:

* heads narrower on one side of the attention are padded to the other side's width;
* where the code does not follow a smaller width or number of heads (``Pair.narrow``,
  ``Pair.fewer``), what is kept stays in its dense place, with zeros around it;
* a layer that lost its attention has zero heads.

``sliced_tensors`` gives the small model's weights, one by one, from wherever the dense ones are: from a model for
``slice_model``, from files for ``pathprune.checkpoint.load_slice``. Modules of those shapes are made in
``pathprune.transform.modules``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pathprune.family.pairs import Pair, Slot
from pathprune.family.selection import Selection
from pathprune.model.contexts import M, copied
from pathprune.model.identity import check_base
from pathprune.model.linear import linear_map
from pathprune.transform.attach import attach_record
from pathprune.transform.delta import weights_at
from pathprune.transform.experts import check_experts, scaled_stack, stacks
from pathprune.transform.folding import Moments, sliced_map
from pathprune.transform.modules import shape_attention, sized_map
from pathprune.transform.plan import Axis, plan
from pathprune.transform.record import Record
from pathprune.transform.weights import WeightSource


def slice_model(model: M, selection: Selection) -> M:
    """A new, physically smaller model; ``model`` is untouched.

    In exact arithmetic its outputs are those of ``masked(model, selection)``.
    Its configuration carries the widths, so that ``save_pretrained`` and ``from_pretrained`` work as for any
    model of ``transformers`` (``pathprune.checkpoint.hf``).

    Raises:
        MismatchError: the selection belongs to another model, or to other weights of it; or the widths of experts are
            such that their kernel cannot read them.

    Example:
        >>> small = pp.slice_model(model, path.select(pp.Budget(keep=0.5)))
        >>> small.num_parameters() < model.num_parameters()
        True
    """
    check_base(model, selection.pairs)
    small, record = slice_modules(model, selection)
    attach_record(small, record, selection)
    return small


@torch.no_grad()
def slice_modules(model: M, selection: Selection) -> tuple[M, Record]:
    """Slice any module tree that holds the selection's pairs; no identity is checked or recorded."""
    axes, record = plan(model, selection)
    check_experts(model, record)
    memo: dict[int, Any] = {}  # the copy of the model takes what is small in place of a copy of what is large
    for name in axes:
        dense = linear_map(model, name)
        memo[id(dense)] = sized_map(dense, record["modules"][name], torch.device("meta")).train(dense.training)
    moments = Moments(selection.fill, selection.centre, selection.covariance)
    for name, tensor in sliced_tensors(weights_at(model, selection), model, axes, selection, moments):
        owner, _, attribute = name.rpartition(".")
        module: Any = model.get_submodule(owner)
        old = getattr(module, attribute)
        if tensor is old:
            continue  # the copy of the model copies it
        parameter = nn.Parameter(tensor, requires_grad=(module.weight if old is None else old).requires_grad)
        if owner in axes:
            setattr(memo[id(module)], attribute, parameter)
        else:
            memo[id(old)] = parameter
    small = copied(model, memo)
    shape_attention(small, record)
    return small, record


def sliced_tensors(
    source: WeightSource, model: nn.Module, axes: Mapping[str, Axis], selection: Selection, moments: Moments
) -> Iterator[tuple[str, Tensor]]:
    """Name and value of each of the small model's tensors; those that stay as they are come last, as the source has
    them.

    Args:
        source: of the dense model's weights.
        model: the dense model, which need have no weights.
        axes: from ``plan``.
    """
    slots: dict[str, list[tuple[Pair, Slot]]] = {}
    for pair in selection.pairs:
        for slot in pair.slots:
            slots.setdefault(slot.module, []).append((pair, slot))
    given = set()
    for module, axis in axes.items():
        weight, bias = sliced_map(source, module, linear_map(model, module), axis, slots[module], selection, moments)
        given |= {f"{module}.weight", f"{module}.bias"}
        yield f"{module}.weight", weight
        if bias is not None:
            yield f"{module}.bias", bias
    for pair in selection.pairs:
        if pair.stacked and not selection.keep[pair.name].all():
            for stack in stacks(pair, selection.keep[pair.name]):
                given.add(stack.name)
                kept = source.read(stack.name, stack.dim, stack.indices)
                yield stack.name, scaled_stack(kept, stack, pair, selection)
    for name in source.names:
        if name not in given:
            yield name, source.whole(name)
