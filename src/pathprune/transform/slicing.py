"""Make the modules of a model physically smaller.

A sliced model is its dense model with smaller linear maps and nothing else: no attention code
is replaced. Where the layer's own code wants more than the small maps give, zeros are put in
*between* the linear maps, so that the model's own ``view(..., -1, head_dim)``, its
cache and every attention kernel work unchanged, while the parameters stay small:

* heads narrower on one side of the attention are padded to the other side's width;
* where the code does not follow a smaller width or number of heads (``Pair.narrow``,
  ``Pair.fewer``), what is kept stays in its dense place, with zeros around it;
* a layer that lost its attention has zero heads.

Here is what is left of the weights; modules of those shapes are made in ``pathprune.transform.shapes``, stacked experts
are in ``pathprune.transform.experts``.
"""

from __future__ import annotations

from typing import Any

from pathprune.family.pairs import Pair, Slot
from pathprune.family.selection import Selection
from pathprune.model.contexts import M, copied
from pathprune.model.linear import linear_map
from pathprune.transform.delta import at_size
from pathprune.transform.experts import check_experts, sliced_stacks
from pathprune.transform.folding import sliced_map
from pathprune.transform.modules import shape_attention, sized_map
from pathprune.transform.plan import plan
from pathprune.transform.record import Record


def slice_model(model: M, selection: Selection) -> M:
    """A new, physically smaller model; ``model`` is untouched.

    In exact arithmetic its outputs are those of ``masked(model, selection)``.
    Its configuration carries the widths, so that ``save_pretrained`` and ``from_pretrained`` work as for any
    model of ``transformers`` (``pathprune.checkpoint.hf``).

    Raises:
        MismatchError: the selection belongs to another model, or to other weights of it; or the widths of experts are
            such that their kernel cannot read them.
    """
    from pathprune.model.identity import check_base
    from pathprune.transform.attach import attach_record

    check_base(model, selection.pairs)
    small, record = slice_modules(model, selection)
    attach_record(small, record, selection)
    return small


def slice_modules(model: M, selection: Selection) -> tuple[M, Record]:
    """Slice any module tree that holds the selection's pairs; no identity is checked or recorded."""
    with at_size(model, selection):
        return _slice_modules(model, selection)


def _slice_modules(model: M, selection: Selection) -> tuple[M, Record]:
    axes, record = plan(model, selection)
    check_experts(model, record)
    memo: dict[int, Any] = {}
    parts: dict[str, list[tuple[Pair, Slot]]] = {}
    for pair in selection.pairs:
        for slot in pair.slots:
            parts.setdefault(slot.module, []).append((pair, slot))
    for name, axis in axes.items():
        old = linear_map(model, name)
        weight, bias = sliced_map(old, axis, parts[name], selection)
        new = sized_map(old, record["modules"][name], old.weight.device)
        new.weight.data.copy_(weight)
        new.weight.requires_grad_(old.weight.requires_grad)
        if new.bias is not None and bias is not None:
            new.bias.data.copy_(bias)
            new.bias.requires_grad_(old.weight.requires_grad if old.bias is None else old.bias.requires_grad)
        new.train(old.training)
        memo[id(old)] = new  # the copy of the model takes the small map in place of a copy of the large one
    for pair in selection.pairs:
        if pair.stacked and not selection.keep[pair.name].all():
            memo |= sliced_stacks(model, pair, selection)
    small = copied(model, memo)
    shape_attention(small, record)
    return small, record
