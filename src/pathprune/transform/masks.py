"""Masks on units, attached at the pair's boundary for as long as a context lasts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pathprune.family.pairs import Pair, Slot
from pathprune.family.selection import Selection
from pathprune.model.contexts import eager
from pathprune.transform.delta import at_size
from pathprune.transform.reconstruction import Compensator, compensators

Arrays = Mapping[str, "np.ndarray[tuple[int, ...], np.dtype[np.floating]]"]


@contextmanager
def masked(model: nn.Module, selection: Selection) -> Iterator[nn.Module]:
    """The dense model with a selection's masks, until the context ends.

    Inside the context the model computes what ``slice_model(model, selection)`` computes, at
    the dense model's size and speed. Afterwards it is what it was. Until then whatever was compiled by
    ``torch.compile`` runs as it was written, as compiled code would pass over the masks.

    Raises:
        MismatchError: the selection belongs to another model.

    Example:
        >>> half = path.select(pp.Budget(keep=0.5))
        >>> with torch.no_grad(), pp.masked(model, half):
        ...     expected = model(**batches[0]).last_hidden_state
        >>> small = pp.slice_model(model, half)
        >>> torch.allclose(small(**batches[0]).last_hidden_state, expected, atol=1e-4)
        True
    """
    from pathprune.model.identity import check_base

    check_base(model, selection.pairs)
    thinned = [pair for pair in selection.pairs if not selection.keep[pair.name].all()]
    masks = {pair.name: torch.from_numpy(selection.mask(pair)) for pair in thinned}
    fill = {name: torch.from_numpy(array) for name, array in selection.fill.items()}
    device = next(model.parameters()).device
    covariance = {name: array for name, array in selection.covariance.items() if name in masks}
    told = compensators(selection.centre, covariance, device, torch.float64)
    outputs = {name: torch.from_numpy(array) for name, array in selection.output.items() if name in masks}
    attached = attach_masks(model, selection.pairs, masks, fill, selection.basis, told, outputs)
    # Not for the model's own compiled parts alone: what torch.compile(model) gave is not seen from here.
    with torch.compiler.set_stance("force_eager"), at_size(model, selection), attached:
        yield model


@contextmanager
def attach_masks(
    model: nn.Module,
    pairs: Sequence[Pair],
    masks: Mapping[str, Tensor],
    fill: Mapping[str, Tensor] | None = None,
    basis: Arrays | None = None,
    told: Mapping[str, Compensator] | None = None,
    outputs: Mapping[str, Tensor] | None = None,
) -> Iterator[None]:
    """Multiply every unit by its mask, until the context ends.

    With a rotation A of the head's D inner dimensions and a fill c, an inner vector y becomes
    A^-1 (m * A y + (1 - m) * c). Masking one map is enough where nothing mixes dimensions between
    the maps (the key's for a ``qk`` pair, because the logit is a product); otherwise every map is masked.

    Args:
        masks: pair name -> (G, U), or (B, G, U) for one mask a sample. Looked up at every forward
            pass, so that a search can change it between passes; a pair without one is dense.
        fill: pair name -> (G, D); looked up at every forward pass, too.
        basis: pair name -> (G, D, D).
        told: pair name -> what tells the units whose mask is zero from the others
            (``pathprune.transform.reconstruction``); such a pair's masks are (G, U).
        outputs: pair name -> (2, d), what the consumer puts out is multiplied by the one and shifted by the other;
            looked up at every forward pass, too.
    """
    handles: list[Any] = []
    fill = {} if fill is None else fill  # an empty one may be filled later
    basis, told = basis or {}, told or {}
    try:
        for pair in pairs:
            if outputs is not None and pair.adjustable:
                adjust = _OutputHook(pair, outputs)
                handles.append(model.get_submodule(pair.consumer.module).register_forward_hook(adjust))
            if pair.name in told:
                consumer = _ConsumerHook(pair, masks, fill, basis.get(pair.name), told[pair.name])
                handles.append(model.get_submodule(pair.consumer.module).register_forward_pre_hook(consumer))
                continue
            for slot in pair.mask_slots:
                module = model.get_submodule(slot.module)
                if slot.parameter:
                    stack = _StackHook(pair, slot, masks)
                    handles.append(module.register_forward_pre_hook(stack.before))
                    handles.append(module.register_forward_hook(stack.after, always_call=True))
                    continue
                hook = _MaskHook(pair, slot, masks, fill, basis.get(pair.name))
                if slot.side == "out":
                    handles.append(module.register_forward_hook(hook.on_output))
                else:
                    handles.append(module.register_forward_pre_hook(hook.on_input))
        with eager(model):
            yield
    finally:
        for handle in handles:
            handle.remove()


class _MaskHook:
    def __init__(
        self,
        pair: Pair,
        slot: Slot,
        masks: Mapping[str, Tensor],
        fill: Mapping[str, Tensor],
        basis: np.ndarray[tuple[int, ...], np.dtype[np.floating]] | None,
    ) -> None:
        self.pair, self.slot, self.masks, self.fill = pair, slot, masks, fill
        self.index = torch.from_numpy(slot.index(pair.groups, pair.width).ravel()) if slot.fused else None
        self.rotation = self.inverse = None
        if basis is not None:
            self.rotation = torch.from_numpy(basis).double()
            self.inverse = torch.linalg.inv(self.rotation)

    def on_output(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return self(output)

    def on_input(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (self(args[0]), *args[1:])

    def __call__(self, y: Tensor) -> Tensor:
        mask = self.masks.get(self.pair.name)
        if mask is None:
            return y
        if self.index is None:
            return self._masked(y, mask)
        index = self.index.to(y.device)
        return y.index_copy(-1, index, self._masked(y.index_select(-1, index), mask))

    def _masked(self, y: Tensor, mask: Tensor) -> Tensor:
        heads = y.unflatten(-1, (self.pair.groups, self.slot.repeat, self.pair.width))  # (..., G, R, D)
        mask = self.pair.by_dim(mask.to(y))  # (G, D) or (B, G, D)
        constant = self.fill.get(self.pair.name)
        fill = None if constant is None else (1 - mask) * constant.to(y)
        if self.rotation is None or self.inverse is None:
            scale = self._lift(mask.unsqueeze(-2), heads)
            if fill is None:
                return (heads * scale).flatten(-3)
            return torch.addcmul(self._lift(fill.unsqueeze(-2), heads), heads, scale).flatten(-3)
        rotation, inverse = self.rotation.to(y), self.inverse.to(y)
        project = self._lift(inverse @ (mask.unsqueeze(-1) * rotation), heads)  # (..., G, D, D)
        heads = torch.einsum("...grd,...ged->...gre", heads, project)
        if fill is not None:
            heads = heads + self._lift(torch.einsum("...gd,ged->...ge", fill, inverse).unsqueeze(-2), heads)
        return heads.flatten(-3)

    def _lift(self, by_group: Tensor, heads: Tensor) -> Tensor:
        """Where there is one value a sample, (B, G, x, y), give each row of ``heads`` its sample's."""
        if by_group.dim() == 3:
            return by_group
        samples, rows = len(by_group), len(heads)
        if rows != samples:  # windows or tokens in the batch's place: consecutive rows are of one sample
            by_group = by_group[torch.arange(rows, device=by_group.device) * samples // rows]
        return by_group[(slice(None),) + (None,) * (heads.dim() - 4)]


class _ConsumerHook:
    """Puts what stays, and what it tells of the rest, in place of a consumer's input (``transform.reconstruction``)."""

    def __init__(
        self,
        pair: Pair,
        masks: Mapping[str, Tensor],
        fill: Mapping[str, Tensor],
        basis: np.ndarray[tuple[int, ...], np.dtype[np.floating]] | None,
        compensator: Compensator,
    ) -> None:
        self.pair, self.masks, self.fill, self.compensator = pair, masks, fill, compensator
        index = pair.consumer.index(pair.groups, pair.width)  # (G, R, D)
        self.shape = index.shape
        self.index = torch.from_numpy(index.ravel()) if pair.consumer.fused else None
        self.rotation = self.inverse = None
        if basis is not None:
            self.rotation = torch.from_numpy(basis).double()
            self.inverse = torch.linalg.inv(self.rotation)

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        mask = self.masks.get(self.pair.name)
        if mask is None:
            return None
        if self.index is None:
            return (self._told(args[0], mask), *args[1:])
        index = self.index.to(args[0].device)
        return (args[0].index_copy(-1, index, self._told(args[0].index_select(-1, index), mask)), *args[1:])

    def _told(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self._rotated(x, self.rotation)
        x = self.compensator(x, self.pair.by_dim(mask), self.fill[self.pair.name])
        return self._rotated(x, self.inverse)

    def _rotated(self, x: Tensor, rotation: Tensor | None) -> Tensor:
        if rotation is None:
            return x
        return torch.einsum("...grd,ged->...gre", x.unflatten(-1, self.shape), rotation.to(x)).flatten(-3)


class _OutputHook:
    """Scales and shifts what a consumer puts out."""

    def __init__(self, pair: Pair, outputs: Mapping[str, Tensor]) -> None:
        self.pair, self.outputs = pair, outputs

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        found = self.outputs.get(self.pair.name)
        if found is None:
            return None
        gain, shift = found.to(output.device)
        return (output * gain + shift).to(output.dtype)  # in 16 bits, a gain near 1 would be 1


class _StackHook:
    """Masks one stacked parameter while its module runs, by standing in the parameter's way."""

    def __init__(self, pair: Pair, slot: Slot, masks: Mapping[str, Tensor]) -> None:
        self.pair, self.slot, self.masks = pair, slot, masks

    def before(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        mask = self.masks.get(self.pair.name)
        if mask is None:
            return
        weight = getattr(module, self.slot.parameter)
        mask = mask.to(weight)
        if mask.dim() == 3:
            # All samples share the stack. A probe's gradients of different samples are independent, so that
            # sharing the sum's out as g / sqrt(B) leaves their mean square as it would be.
            mask = 1 + (mask - 1).sum(0) / math.sqrt(len(mask))
        module.__dict__[self.slot.parameter] = weight * mask.unsqueeze(3 - self.slot.dim)

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        module.__dict__.pop(self.slot.parameter, None)
