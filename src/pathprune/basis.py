"""Rotate heads into balanced bases, where units are ordered low-rank directions.

Query and key of a head meet only in their product, value and output projection likewise, so an
invertible map of the head's inner axis may be pushed through: q' = A^-T q, k' = A k leaves
q'.k' = q.k, and v' = A v, W_o' = W_o A^-1 leaves W_o v. Of all such bases the *balanced* one
gives both sides the same diagonal second moment, so that dropping its last dimensions is the
best low-rank approximation of the product on the calibration data. (The construction is that of
balanced truncation; Moore, IEEE Trans. Autom. Control 26, 1981.)

Keys and values are centred first. A key's mean adds the same number to all logits of a query,
which the softmax ignores; a value's mean passes through attention unchanged, because attention
weights sum to one, and is kept as the fill of the removed dimensions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from pathprune.outputs import module_mask
from pathprune.pairs import Pair, PairList, Slot
from pathprune.slicing import axis_first

Floats = npt.NDArray[np.floating]

RIDGE = 1e-6  # of the mean variance; keeps dead directions from dividing by zero


@dataclass
class Moments:
    """Running sums of an inner activation over tokens, in float64.

    Attributes:
        count: tokens seen, by weight.
        first: (H, D), sum.
        second: sum of outer products, (H, D, D), or of squares, (H, D), where no basis is wanted.
    """

    count: float = 0
    first: Tensor = field(default_factory=lambda: torch.zeros(()))
    second: Tensor = field(default_factory=lambda: torch.zeros(()))

    def add(self, y: Tensor, heads: int, outer: bool, *, relative: bool = False) -> None:
        """Add (tokens, H D) activations.

        Args:
            relative: weight each token by its inverse length, as for a relative error. Language models have a few
                tokens with massive activations (Sun et al., COLM 2024), which would own every mean otherwise.
        """
        y = y.detach().double()
        weight = torch.ones_like(y[:, :1])
        if relative:
            weight = 1 / y.norm(dim=-1, keepdim=True).clamp_min(1e-30)
        self.count += float(weight.sum())
        self.first = self.first + (weight * y).sum(0).unflatten(-1, (heads, -1))
        heads_first = (weight.sqrt() * y).unflatten(-1, (heads, -1)).transpose(0, 1)  # (H, tokens, D)
        self.second = self.second + (heads_first.mT @ heads_first if outer else heads_first.square().sum(1))

    @property
    def mean(self) -> Tensor:
        return self.first / self.count

    def moment(self, centred: bool) -> Tensor:
        """(H, D, D)."""
        second = self.second / self.count
        return second - self.mean.unsqueeze(-1) * self.mean.unsqueeze(-2) if centred else second


@dataclass
class Calibration:
    """What forward passes over unlabelled data say about every pair.

    Attributes:
        basis: pair name -> (G, D, D), where the pair may be rotated.
        mean, std: pair name -> (G, D), of the inner activation in that basis, where a constant
            may take its place.
    """

    basis: dict[str, Floats] = field(default_factory=dict)
    mean: dict[str, Floats] = field(default_factory=dict)
    std: dict[str, Floats] = field(default_factory=dict)


def calibrate(
    model: nn.Module, pairs: PairList, batches: Iterable[Mapping[str, Any]], *, rotate: bool, fill: bool
) -> Calibration:
    """Bases, and moments for the fill, from forward passes over ``batches``."""
    moments: dict[Slot, Moments] = {}
    if not rotate and not fill:
        return Calibration()
    with torch.no_grad(), _gathered(model, pairs, moments) as start:
        for batch in batches:
            start(batch)
            model(**batch)

    found = Calibration()
    for pair in pairs:
        rotation = None
        if rotate and pair.rotatable:
            rotation = _balance(model, pair, moments)
            found.basis[pair.name] = rotation.cpu().float().numpy()
        if fill and pair.fillable:
            inner = moments[pair.mask_slot]
            mean, second = inner.mean, inner.second / inner.count
            if rotation is not None:
                mean = (rotation @ mean.unsqueeze(-1)).squeeze(-1)
                second = rotation @ second @ rotation.mT
            if second.dim() == 3:
                second = second.diagonal(dim1=-2, dim2=-1)
            found.mean[pair.name] = mean.cpu().float().numpy()
            found.std[pair.name] = (second - mean.square()).clamp_min(0).sqrt().cpu().float().numpy()
    return found


def _balance(model: nn.Module, pair: Pair, moments: Mapping[Slot, Moments]) -> Tensor:
    """(G, D, D), the map A of the masked side (key or value)."""
    ours = moments[pair.mask_slot].moment(centred=True)
    if pair.kind == "qk":
        theirs = moments[pair.slots[0]].moment(centred=False)  # (G R, D, D)
    else:
        module: Any = model.get_submodule(pair.consumer.module)
        weight = axis_first(module.weight.detach(), module, "in").double()
        heads = weight[torch.from_numpy(pair.consumer.index(pair.groups, pair.width)).flatten(0, 1)]  # (G R, D, d)
        theirs = heads @ heads.mT
    theirs = theirs.unflatten(0, (pair.groups, -1)).sum(1)
    left, right = _factor(ours), _factor(theirs)
    u, s, _ = torch.linalg.svd(left.mT @ right)
    # ours = L L^T and A = S^1/2 U^T L^-1 give A ours A^T = S; the partner A^-T gives S as well.
    return s.sqrt().unsqueeze(-1) * torch.linalg.solve_triangular(left.mT, u, upper=True).mT


def _factor(moment: Tensor) -> Tensor:
    """Cholesky factor, with a ridge."""
    scale = moment.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(1e-30)
    eye = torch.eye(moment.shape[-1], dtype=moment.dtype, device=moment.device)
    return torch.linalg.cholesky(moment + RIDGE * scale[:, None, None] * eye)


@contextmanager
def _gathered(model: nn.Module, pairs: PairList, moments: dict[Slot, Moments]) -> Iterator[Any]:
    """Hooks that gather moments at every inner activation; yields a function to announce a batch."""
    current: Mapping[str, Any] = {}
    encoded: Tensor | None = None

    def keep_encoded(module: nn.Module, args: Any, output: Any) -> None:
        nonlocal encoded
        encoded = output[0]

    def start(batch: Mapping[str, Any]) -> None:
        nonlocal current
        current = batch

    def gather(pair: Pair, slot: Slot) -> Any:
        store = moments.setdefault(slot, Moments())
        index = torch.from_numpy(slot.index(pair.groups, pair.width).ravel())

        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor | None = None) -> None:
            y = args[0] if output is None else output
            # Keys and values of cross-attention lie in the decoder, and see the encoder's tokens.
            crossed = args[0] is encoded
            real = current.get("attention_mask") if crossed else module_mask(model, current, slot.module)
            if real is not None and real.shape != y.shape[:-1]:  # it sees something else than tokens
                real = None
            y = y.flatten(0, -2) if real is None else y[real.bool()]  # padding tokens do not count
            if slot.fused:
                y = y[:, index.to(y.device)]
            # For keys and values all tokens count alike, as they do in the balance.
            store.add(y, pair.groups * slot.repeat, outer=pair.rotatable, relative=pair.kind == "mlp")

        return hook

    handles = []
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        both: Any = model
        handles.append(both.get_encoder().register_forward_hook(keep_encoded))
    try:
        for pair in pairs:
            if not (pair.rotatable or pair.fillable):
                continue
            for slot in dict.fromkeys((pair.mask_slot, *(s for s in pair.slots if pair.kind == "qk"))):
                module = model.get_submodule(slot.module)
                if slot.side == "out":
                    handles.append(module.register_forward_hook(gather(pair, slot)))
                else:
                    handles.append(module.register_forward_pre_hook(gather(pair, slot)))
        yield start
    finally:
        for handle in handles:
            handle.remove()
