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

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pathprune.errors import MismatchError
from pathprune.family.pairs import Pair
from pathprune.types import Floats

if TYPE_CHECKING:
    pass


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
