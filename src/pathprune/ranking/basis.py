"""Rotate heads into balanced bases, where units are ordered low-rank directions.

Query and key of a head meet only in their product, value and output projection likewise, so an
invertible map of the head's inner axis may be pushed through: q' = A^-T q, k' = A k leaves
q'.k' = q.k, and v' = A v, W_o' = W_o A^-1 leaves W_o v. Of all such bases the *balanced* one gives
what flows through a dimension and what the loss feels of it the same diagonal second moment: to
drop the last dimensions is then to drop what is least in the product of both. (The construction is that
of balanced truncation; Moore, IEEE Trans. Autom. Control 26, 1981.)

* What flows are keys, and the heads' outputs, which the output projection reads: values that attention
  averages away count for nothing. Both are centred. A key's mean adds the same number to all logits of a
  query, which the softmax ignores; the mean of a head's output is kept, as the fill of the removed dimensions.
* What the loss feels is the gradient of a random probe there (``Objective.probe``), whose second moment is the
  loss's Gauss-Newton matrix in the activation: it knows the queries and the softmax, the output projection and all
  that follows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pathprune.data.checks import check_moments
from pathprune.family.pair_list import PairList
from pathprune.family.pairs import Pair
from pathprune.model.contexts import eager
from pathprune.model.outputs import module_mask, relative_weights
from pathprune.types import Floats

FEW = 4  # times the median: a few channels of language models are far larger than all others
RIDGE = 1e-6  # of the mean variance; keeps dead directions from dividing by zero


@dataclass
class Moments:
    """Running sums of an inner activation over tokens, in float64, about the first token: what varies little beside its
    mean would drown in the rounding of its square.

    Attributes:
        pilot: (H D,), the first token.
        count: tokens seen, by weight.
        first: (H, D), sum.
        second: sum of outer products, (H, D, D), or of squares, (H, D), where no basis is wanted.
    """

    pilot: Tensor | None = None
    count: float = 0
    first: Tensor = field(default_factory=lambda: torch.zeros(()))
    second: Tensor = field(default_factory=lambda: torch.zeros(()))

    def add(self, y: Tensor, heads: int, outer: bool, *, relative: bool = False) -> None:
        """Add (tokens, H D) activations.

        Args:
            relative: weight each token by its inverse length, as for a relative error. Language models have a few
                tokens with massive activations (Sun et al., COLM 2024), which would own every mean otherwise.
        """
        if not len(y):
            return
        y = y.detach().double()
        weight = torch.ones_like(y[:, :1])
        if relative:
            weight = relative_weights(y.norm(dim=-1, keepdim=True))
        if self.pilot is None:
            self.pilot = y[0]
        y = y - self.pilot
        self.count += float(weight.sum())
        self.first = self.first + (weight * y).sum(0).unflatten(-1, (heads, -1))
        heads_first = (weight.sqrt() * y).unflatten(-1, (heads, -1)).transpose(0, 1)  # (H, tokens, D)
        self.second = self.second + (heads_first.mT @ heads_first if outer else heads_first.square().sum(1))

    def central(self) -> tuple[Tensor, Tensor]:
        """(H, D), the mean, and (H, D, D) or (H, D), the covariance or the variance."""
        mean, second = self.first / self.count, self.second / self.count
        square = mean.square() if second.dim() == 2 else mean.unsqueeze(-1) * mean.unsqueeze(-2)
        pilot = 0 if self.pilot is None else self.pilot.view_as(mean)
        return mean + pilot, second - square


@dataclass
class Calibration:
    """What forward passes over unlabelled data say about every pair.

    Attributes:
        basis: pair name -> (G, D, D), where the pair may be rotated.
        mean, std: pair name -> (G, D), of the inner activation in that basis, where a constant
            may take its place.
        out: pair name -> (d,), spread of what the consumer puts out, where that may be shifted.
    """

    basis: dict[str, Floats] = field(default_factory=dict)
    mean: dict[str, Floats] = field(default_factory=dict)
    std: dict[str, Floats] = field(default_factory=dict)
    out: dict[str, Floats] = field(default_factory=dict)


def calibrate(
    model: nn.Module,
    pairs: PairList,
    batches: Iterable[Mapping[str, Any]],
    gramians: Mapping[str, Tensor],
    *,
    fill: bool,
    spreads: bool,
) -> Calibration:
    """Bases for the pairs that have a gramian, and moments for the fill, from forward passes over ``batches``.

    Args:
        gramians: pair name -> (G, D, D), as ``sensitivity`` leaves them.
        fill: whether means and spreads of inner activations are wanted.
        spreads: whether those of what consumers put out are; only with a fill.
    """
    moments: dict[str, Moments] = {}
    outputs: dict[str, Moments] = {}
    wanted = [pair for pair in pairs if pair.name in gramians or (fill and pair.fillable)]
    if not wanted:
        return Calibration()
    adjusted = [pair for pair in wanted if spreads and pair.adjustable]
    with torch.no_grad(), _gathered(model, wanted, moments, adjusted, outputs) as start:
        for batch in batches:
            start(batch)
            model(**batch)

    found = Calibration()
    for pair in wanted:
        if not moments[pair.name].count:  # a part of the model that the data does not reach
            continue
        check_moments(moments[pair.name].second, pair.name)
        # Heads of one group share their values, hence the basis and the fill: both are for the mean over them.
        mean, spread = (part.unflatten(0, (pair.groups, -1)).mean(1) for part in moments[pair.name].central())
        if pair.name in gramians:
            rotation = balance(spread, gramians[pair.name].to(spread))
            found.basis[pair.name] = rotation.cpu().float().numpy()
            mean, spread = (rotation @ mean.unsqueeze(-1)).squeeze(-1), rotation @ spread @ rotation.mT
        if fill and pair.fillable:
            if spread.dim() == 3:
                spread = spread.diagonal(dim1=-2, dim2=-1)
            found.mean[pair.name] = mean.cpu().float().numpy()
            found.std[pair.name] = spread.clamp_min(0).sqrt().cpu().float().numpy()
            if pair.name in outputs:
                out = outputs[pair.name].central()[1][0].clamp_min(0).sqrt()
                found.out[pair.name] = out.clamp_max(FEW * out.median()).cpu().float().numpy()
    return found


def balance(ours: Tensor, theirs: Tensor) -> Tensor:
    """(G, D, D), A that gives A ours A^T = A^-T theirs A^-1 = S, diagonal and in descending order, both moments taken
    relative to their mean variance: how large gradients are must not show in the size of the weights.
    """
    left, right = _factor(ours), _factor(theirs)
    u, s, _ = torch.linalg.svd(left.mT @ right)
    # With ours = L L^T, A = S^1/2 U^T L^-1.
    return s.sqrt().unsqueeze(-1) * torch.linalg.solve_triangular(left.mT, u, upper=True).mT


def _factor(moment: Tensor) -> Tensor:
    """Cholesky factor of a moment (G, D, D) over its mean variance, with a ridge."""
    variance = moment.diagonal(dim1=-2, dim2=-1)
    mean = variance.mean().clamp_min(1e-60)
    ridge = RIDGE * (variance.mean(-1) / mean).clamp_min(RIDGE)
    eye = torch.eye(moment.shape[-1], dtype=moment.dtype, device=moment.device)
    return torch.linalg.cholesky(moment / mean + ridge[:, None, None] * eye)


@contextmanager
def sensitivity(model: nn.Module, pairs: Iterable[Pair], gramians: dict[str, Tensor]) -> Iterator[None]:
    """Add the second moments (G, D, D) of the gradient at every inner activation to ``gramians``, by pair name, at
    each backward pass until the context ends.
    """

    def watch(pair: Pair) -> Any:
        index = torch.from_numpy(pair.consumer.index(pair.groups, pair.width).ravel())

        def add(grad: Tensor) -> None:
            rows = grad.flatten(0, -2).index_select(-1, index.to(grad.device)).double()
            heads = rows.unflatten(-1, (pair.groups, -1, pair.width)).permute(1, 3, 0, 2).flatten(2)  # (G, D, rows R)
            gramian = (heads @ heads.mT).cpu()
            gramians[pair.name] = gramians[pair.name] + gramian if pair.name in gramians else gramian

        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor | None = None) -> None:
            (args[0] if output is None else output).register_hook(add)

        return hook

    with _hooked(model, pairs, watch):
        yield


@contextmanager
def _gathered(
    model: nn.Module,
    pairs: Iterable[Pair],
    moments: dict[str, Moments],
    adjusted: Iterable[Pair],
    outputs: dict[str, Moments],
) -> Iterator[Any]:
    """Hooks that gather moments at the inner activations of ``pairs``, and of what the consumers of ``adjusted`` put
    out; yields a function to announce a batch.
    """
    current: Mapping[str, Any] = {}
    encoded: Tensor | None = None

    def keep_encoded(module: nn.Module, args: Any, output: Any) -> None:
        nonlocal encoded
        encoded = output[0]

    def start(batch: Mapping[str, Any]) -> None:
        nonlocal current
        current = batch

    def rows(y: Tensor, args: tuple[Tensor, ...], module: str) -> Tensor:
        """Those of real tokens."""
        # Keys of cross-attention lie in the decoder, and see the encoder's tokens.
        crossed = args[0] is encoded
        real = current.get("attention_mask") if crossed else module_mask(model, current, module)
        if real is not None and real.shape != y.shape[:-1]:  # it sees something else than tokens
            real = None
        return y.flatten(0, -2) if real is None else y[real.bool()]

    def gather(pair: Pair) -> Any:
        slot, store = pair.consumer, moments.setdefault(pair.name, Moments())
        index = torch.from_numpy(slot.index(pair.groups, pair.width).ravel())

        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor | None = None) -> None:
            y = rows(args[0] if output is None else output, args, slot.module)
            # In attention all tokens count alike, as they do in the balance.
            store.add(
                y.index_select(-1, index.to(y.device)),
                pair.groups * slot.repeat,
                outer=pair.rotatable,
                relative=pair.kind == "mlp",
            )

        return hook

    def watch(pair: Pair) -> Any:
        module, store = pair.consumer.module, outputs.setdefault(pair.name, Moments())
        return lambda _, args, output: store.add(rows(output, args, module), 1, outer=False, relative=True)

    handles = [model.get_submodule(pair.consumer.module).register_forward_hook(watch(pair)) for pair in adjusted]
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        both: Any = model
        handles.append(both.get_encoder().register_forward_hook(keep_encoded))
    try:
        with _hooked(model, pairs, gather):
            yield start
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _hooked(model: nn.Module, pairs: Iterable[Pair], make: Callable[[Pair], Any]) -> Iterator[None]:
    """A hook where each pair's inner activation is read: at what the key puts out, or at what the output projection
    or down map is given.
    """
    handles = []
    try:
        for pair in pairs:
            module = model.get_submodule(pair.consumer.module)
            if pair.consumer.side == "out":
                handles.append(module.register_forward_hook(make(pair)))
            else:
                handles.append(module.register_forward_pre_hook(make(pair)))
        with eager(model):
            yield
    finally:
        for handle in handles:
            handle.remove()
