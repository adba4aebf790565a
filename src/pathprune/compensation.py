"""Compensation: what leaves is told from what stays, in closed form, at every size of a family.

The map that reads a pair's inner axis (output projection, down) computes x W. Where the units K stay and R leave, it
is given, in place of x_R,

    c_R + m (x_K - mu_K) B,    B = C_KK^-1 C_KR

with mu and C the mean and covariance of x in the dense model (C with a ridge on its diagonal), c the fill
(``constant``) and m the scale of the units that stay. Both are linear in what stays, so that slicing folds
them into the small map's weight and bias:

    W'_K = m (W_K + B W_R) = m C_KK^-1 (C W)_K,    b' = b + c_R W_R + mu_K (W_K - W'_K)

C is all that this needs, whatever K: gathered once, it serves every size. With C W beside it, its rows and columns K
serve the size K. These are the least squares of Optimal Brain Surgeon (Hassibi and Stork, NeurIPS 1992) and many after
it; what is ours is that the search visits every size with them in place, so that units are ranked by what the others
cannot make up for, and c and m make up for what is left: the errors of the layers below, of which C knows nothing.

Tokens are weighted by the inverse squared norm of the consumer's output, so that a fit is to relative errors: a few
tokens with massive activations (Sun et al., COLM 2024) would own it otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from pathprune.data import Batch, Batches, check_moments
from pathprune.errors import DataError, MismatchError
from pathprune.modes import evaluating
from pathprune.outputs import module_mask, relative_weights
from pathprune.pairs import Pair
from pathprune.progress import track

if TYPE_CHECKING:
    from pathprune.path import SolutionPath

RIDGE = 0.1  # of the inputs' mean variance

Floats = npt.NDArray[np.floating]


def compensate(
    model: nn.Module,
    path: SolutionPath,
    data: Iterable[Mapping[str, Tensor]],
    *,
    count: int = 64,
    progress: bool | None = None,
) -> SolutionPath:
    """A path of the same family whose sizes make up, in closed form, for the units that they lack.

    A search does this by itself; here is the same for rankings from elsewhere. Where the path has no fill, the mean
    takes a removed dimension's place. Query-key pairs, stacked experts, and pairs with a norm or a gate between their
    maps are left as they are.

    Args:
        model: the dense model; untouched.
        data: re-iterable of model-input dicts, unlabelled. A map with N inputs wants several N tokens.
        count: at most this many batches are read.
        progress: show a bar, or lines where there is no terminal; by default a bar on a terminal and nothing elsewhere.

    Raises:
        MismatchError: the path is of another model, or of one whose units are sorted.
        DataError: empty data, wrong keys, or activations that are not finite.
    """
    from pathprune.discovery import check_base

    if path.fill_sum:
        raise MismatchError(
            "the path is of a model with sorted units, whose sums go by its covariances; compensate the path of the "
            "search, then sort_units or elastic"
        )
    if count < 1:
        raise DataError(f"count={count} must be positive")
    check_base(model, path.pairs)
    centre, covariance = gather(model, path.pairs, Batches(model, data), path.basis, count=count, progress=progress)
    means = {
        pair.name: centre[pair.name].reshape(pair.groups, -1, pair.width).mean(1)
        for pair in path.pairs
        if pair.name in centre
    }
    return replace(path, fill={**means, **path.fill}, centre=centre, covariance=covariance)


def gather(
    model: nn.Module,
    pairs: Iterable[Pair],
    batches: Batches,
    basis: Mapping[str, Floats],
    *,
    count: int,
    progress: bool | None,
    seen: Callable[[Batch, Any], None] = lambda batch, outputs: None,
) -> tuple[dict[str, Floats], dict[str, Floats]]:
    """Pair name -> (N,) mean and (N, N) covariance of what the consumer reads of the pair, N = G R D by group, head and
    dimension, in the bases (G, D, D); of the pairs that take a fill. The covariance has the ridge on its diagonal.

    Args:
        seen: is shown what the model puts out for each batch.
    """
    hooks = {pair.name: _Hook(pair, basis.get(pair.name)) for pair in pairs if pair.fillable}
    handles = [model.get_submodule(hook.module).register_forward_hook(hook) for hook in hooks.values()]
    try:
        with torch.no_grad(), evaluating(model):
            first = islice(batches.once(), count)
            for batch in track(first, desc="statistics", unit="batch", progress=progress, leave=False):
                for hook in hooks.values():
                    hook.real = module_mask(model, batch, hook.module)
                seen(batch, model(**batch))
    finally:
        for handle in handles:
            handle.remove()
    centre, covariance = {}, {}
    for name, hook in hooks.items():
        if hook.moment is None:  # a part of the model that the data does not reach
            continue
        check_moments(hook.moment, name)
        mean, spread = hook.central()
        # An input that never changes has no variance: there the ridge is by its size, or anything.
        ridge = torch.maximum(RIDGE * spread.diagonal().mean(), 1e-6 * mean.square().mean())
        spread.diagonal().add_(ridge if ridge > 0 else 1.0)
        centre[name], covariance[name] = mean.cpu().float().numpy(), spread.cpu().float().numpy()
    return centre, covariance


class _Hook:
    """Adds up the moments of one consumer's input, about its mean in the first batch: what varies little beside its
    mean would drown in the rounding of its square.
    """

    def __init__(self, pair: Pair, basis: Floats | None) -> None:
        index = pair.consumer.index(pair.groups, pair.width)  # (G, R, D)
        self.shape, self.index = index.shape, torch.from_numpy(index.ravel())
        self.module, self.basis = pair.consumer.module, basis
        self.real: Tensor | None = None
        self.pilot: Tensor | None = None
        self.moment: Tensor | None = None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        x = args[0].index_select(-1, self.index.to(args[0].device))
        if self.real is not None and self.real.shape == x.shape[:-1]:  # padding tokens do not count
            real = self.real.bool()
            x, output = x[real], output[real]
            if not len(x):
                return
        wide = torch.promote_types(x.dtype, torch.float32)
        weight = relative_weights(output.flatten(0, -2).to(wide).norm(dim=1, keepdim=True))
        x = x.flatten(0, -2).to(wide)
        if self.pilot is None:
            self.pilot = x.mean(0)
        x = torch.cat([x - self.pilot, torch.ones_like(x[:, :1])], 1) * weight
        with torch.autocast(x.device.type, enabled=False):
            moment = x.mT @ x
        self.moment = moment if self.moment is None else self.moment + moment

    def central(self) -> tuple[Tensor, Tensor]:
        """Mean and covariance, in the basis."""
        assert self.moment is not None
        assert self.pilot is not None
        moment = self.moment.double() / self.moment[-1, -1].double()
        off = moment[-1, :-1]
        spread = moment[:-1, :-1] - off.unsqueeze(1) * off
        mean = self.pilot + off
        if self.basis is None:
            return mean, spread
        rotation = torch.from_numpy(self.basis).to(moment)

        def rotated(rows: Tensor) -> Tensor:
            return torch.einsum("ged,grd...->gre...", rotation, rows.unflatten(0, self.shape)).flatten(0, 2)

        return rotated(mean), rotated(rotated(spread).mT)


def untold(pair: Pair, value: Tensor, covariance: Tensor) -> Tensor:
    """(G, U), the share of each unit's variance that the units of more value do not tell.

    By the Cholesky factor in the order of value: its squared diagonal is what is left of each input's variance, given
    those before it. Where units go from the last on, that is what each is worth at the moment it goes.

    Args:
        value: (G, U).
        covariance: (N, N), of what the consumer reads of the pair.
    """
    unit = by_place(pair.by_dim(torch.arange(value.numel()).reshape(value.shape)), len(covariance))
    order = value.flatten()[unit].argsort(descending=True, stable=True)
    left = cholesky(covariance[order][:, order].double()).diagonal().square()
    zeros = torch.zeros(value.numel(), dtype=torch.float64)
    share = zeros.index_add(0, unit[order], left) / zeros.index_add(0, unit, covariance.diagonal().double())
    return share.reshape(value.shape).to(value)


class Compensator:
    """Tells the inputs of a consumer that leave from those that stay.

    With P the inverse of C, B is also -P_KR P_RR^-1: whichever of K and R is the smaller is solved for, which is a
    third of the work over all sizes, for P's memory.

    Args:
        centre, covariance: (N,) and (N, N), of what the consumer reads; the fit is made in their precision.
    """

    def __init__(self, centre: Tensor, covariance: Tensor) -> None:
        self.centre, self.covariance = centre, covariance
        self.latest: tuple[Tensor, tuple[Tensor, Tensor, Tensor]] | None = None

    @cached_property
    def precision(self) -> Tensor:
        """(N, N), the covariance's inverse."""
        return torch.cholesky_inverse(cholesky(self.covariance))

    def __call__(self, x: Tensor, mask: Tensor, fill: Tensor) -> Tensor:
        """What the consumer reads in place of ``x``.

        Args:
            x: (..., N).
            mask: (G, D), zero where a unit leaves, else its scale. The gradient of a zero is of what its unit would
                bring back: what it is, less what the others tell of it.
            fill: (G, D).
        """
        mask, fill = mask.to(self.centre.device), fill.to(self.centre.device)
        mask, fill = by_place(mask, len(self.centre)), constant(fill, self.centre)
        left, gone, fitted = self.fit(mask.detach() != 0)
        rows = x.flatten(0, -2)  # of two dimensions, whose columns are read several times faster
        told: Tensor = _Told.apply(rows, mask.to(x), fill.to(x), self.centre.to(x), left, gone, fitted.to(x))
        return told.view_as(x)

    def fit(self, keep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(K,) and (R,), what stays and what leaves, and (K, R), B; that of the latest ``keep`` (N,) is remembered.

        Raises:
            MismatchError: the covariance is none.
        """
        if self.latest is None or not torch.equal(self.latest[0], keep):
            left, gone = keep.nonzero()[:, 0], (~keep).nonzero()[:, 0]
            if len(left) < len(gone):
                rows = self.covariance.index_select(0, left)
                fitted = solve(rows.index_select(1, left), rows.index_select(1, gone))
            else:
                rows = self.precision.index_select(0, gone)
                fitted = -solve(rows.index_select(1, gone), rows.index_select(1, left)).mT
            self.latest = keep, (left, gone, fitted)
        return self.latest[1]


def solve(covariance: Tensor, right: Tensor) -> Tensor:
    """(K, d), the covariance's inverse (K, K) times ``right`` (K, d).

    Raises:
        MismatchError: the covariance is none.
    """
    return torch.cholesky_solve(right, cholesky(covariance))


def cholesky(covariance: Tensor) -> Tensor:
    """The covariance's lower factor.

    Raises:
        MismatchError: it is not positive definite.
    """
    factor, failed = torch.linalg.cholesky_ex(covariance)
    if failed:
        raise MismatchError(
            "a covariance of the path is not positive definite; gather it anew with "
            "pathprune.compensate(model, path, data), or search with compensate=False"
        )
    return factor


def folded(
    covariance: Tensor, normal: Tensor, rows: Tensor, scale: Tensor, centre: Tensor, constant: Tensor
) -> tuple[Tensor, Tensor]:
    """What a consumer has for the K units that stay: (K, d), W'_K, and (d,), b' - b - c W.

    Args:
        covariance, normal, rows: (K, K), (K, d) and (K, d), the part of C, of C W and of W.
        scale, centre, constant: (K,), the part of m, of mu and of c.
    """
    ours = scale.unsqueeze(1) * solve(covariance, normal)
    return ours, centre @ (rows - ours) - constant @ rows


def by_place(by_dim: Tensor, inner: int) -> Tensor:
    """From (G, D) to (N,), the places in what the consumer reads."""
    return by_dim.unsqueeze(1).expand(-1, inner // by_dim.numel(), -1).flatten()


def constant(fill: Tensor, centre: Tensor) -> Tensor:
    """(N,), c: a fill (G, D), which heads of one group share, as far apart for each head as their means (N,) are."""
    fill = fill.to(centre)
    means = centre.unflatten(0, (len(fill), -1, fill.shape[1]))  # (G, R, D)
    return by_place(fill, len(centre)) + (means - means.mean(1, keepdim=True)).flatten()


def compensators(
    centre: Mapping[str, Floats],
    covariance: Mapping[str, Floats],
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Compensator]:
    """Pair name -> its compensator."""
    return {
        name: Compensator(*(torch.from_numpy(part).to(device, dtype) for part in (centre[name], array)))
        for name, array in covariance.items()
    }


class _Told(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor, fill: Tensor, centre: Tensor, *fit: Tensor) -> Tensor:
        left, gone, fitted = fit
        stays = (x.index_select(-1, left) - centre[left]) * mask[left]
        told = fill[gone] + stays @ fitted
        out = torch.empty_like(x).index_copy_(-1, left, centre[left] + stays).index_copy_(-1, gone, told)
        ctx.save_for_backward(x, mask, centre, told, *fit)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, mask, centre, told, left, gone, fitted = ctx.saved_tensors
        for_told = grads[0].index_select(-1, gone)
        for_stays = grads[0].index_select(-1, left) + for_told @ fitted.mT
        for_x = torch.zeros_like(x).index_copy_(-1, left, for_stays * mask[left])
        wide = torch.promote_types(x.dtype, torch.float32)

        def total(by_token: Tensor) -> Tensor:
            return by_token.sum(0, dtype=wide).to(mask)

        for_mask, for_fill = torch.zeros_like(mask), torch.zeros_like(mask)
        for_mask[left] = total(for_stays * (x.index_select(-1, left) - centre[left]))
        for_mask[gone] = total(for_told * (x.index_select(-1, gone) - told))
        for_fill[gone] = total(for_told)
        return for_x, for_mask, for_fill, None, None, None, None
