"""Masks on units, attached at the pair's boundary for as long as a context lasts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from pathprune.budget import Selection
from pathprune.pairs import Pair

Arrays = Mapping[str, "np.ndarray[tuple[int, ...], np.dtype[np.floating]]"]


@contextmanager
def masked(model: nn.Module, selection: Selection) -> Iterator[nn.Module]:
    """The dense model with a selection's hard masks, until the context ends.

    Inside the context the model computes what ``slice_model(model, selection)`` computes, at
    the dense model's size and speed. The model is not changed.

    Raises:
        MismatchError: the selection belongs to another model.
    """
    from pathprune.discovery import check_base

    check_base(model, selection.pairs)
    masks = {name: torch.from_numpy(keep) for name, keep in selection.keep.items() if not keep.all()}
    fill = {name: torch.from_numpy(array) for name, array in selection.fill.items()}
    with attach_masks(model, selection.pairs, masks, fill, selection.basis):
        yield model


@contextmanager
def attach_masks(
    model: nn.Module,
    pairs: Sequence[Pair],
    masks: Mapping[str, Tensor],
    fill: Mapping[str, Tensor] | None = None,
    basis: Arrays | None = None,
) -> Iterator[None]:
    """Multiply every unit by its mask, until the context ends.

    With a rotation A of the head's D inner dimensions and a fill c, an inner vector y becomes
    A^-1 (m * A y + (1 - m) * c). Masking the key alone is enough for a ``qk`` pair, because the
    logit is a product.

    Args:
        masks: pair name -> (G, U), or (B, G, U) for one mask a sample. Looked up at every forward
            pass, so that a search can change it between passes; a pair without one is dense.
        fill: pair name -> (G, D); looked up at every forward pass, too.
        basis: pair name -> (G, D, D).
    """
    handles = []
    try:
        for pair in pairs:
            hook = _MaskHook(pair, masks, {} if fill is None else fill, (basis or {}).get(pair.name))
            module = model.get_submodule(pair.mask_slot.module)
            if pair.mask_slot.side == "out":
                handles.append(module.register_forward_hook(hook.on_output))
            else:
                handles.append(module.register_forward_pre_hook(hook.on_input))
        yield
    finally:
        for handle in handles:
            handle.remove()


class _MaskHook:
    def __init__(
        self,
        pair: Pair,
        masks: Mapping[str, Tensor],
        fill: Mapping[str, Tensor],
        basis: np.ndarray[tuple[int, ...], np.dtype[np.floating]] | None,
    ) -> None:
        self.pair, self.masks, self.fill = pair, masks, fill
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
        mask = mask.to(y)
        if self.pair.dims_per_unit > 1:
            mask = torch.cat([mask] * self.pair.dims_per_unit, dim=-1)  # (G, D)
        per_sample = mask.dim() == 3
        heads = y.unflatten(-1, (*self.pair.shape[:1], self.pair.width))  # (..., G, D)
        constant = self.fill.get(self.pair.name)
        fill = None if constant is None else (1 - mask) * constant.to(y)
        if self.rotation is None or self.inverse is None:
            scale, shift = mask, fill
            if per_sample:  # broadcast over the positions between batch and heads
                lift = (slice(None),) + (None,) * (heads.dim() - 3)
                scale, shift = scale[lift], None if shift is None else shift[lift]
            heads = heads * scale if shift is None else torch.addcmul(shift, heads, scale)
            return heads.flatten(-2)
        rotation, inverse = self.rotation.to(y), self.inverse.to(y)
        project = inverse @ (mask.unsqueeze(-1) * rotation)  # (..., G, D, D)
        if per_sample:
            heads = torch.einsum("b...gd,bged->b...ge", heads, project)
        else:
            heads = torch.einsum("...gd,ged->...ge", heads, project)
        if fill is not None:
            shift = torch.einsum("...gd,ged->...ge", fill, inverse)
            heads = heads + (shift[(slice(None),) + (None,) * (heads.dim() - 3)] if per_sample else shift)
        return heads.flatten(-2)
