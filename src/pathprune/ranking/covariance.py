"""Means and covariances of what consumers read, gathered in one pass over data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from pathprune.data.batches import Batch, Batches
from pathprune.data.checks import check_moments
from pathprune.errors import MismatchError, SettingError
from pathprune.family.pairs import Pair
from pathprune.family.path import SolutionPath
from pathprune.model.contexts import eager, evaluating
from pathprune.model.identity import check_base
from pathprune.model.outputs import module_mask, relative_weights
from pathprune.progress import track
from pathprune.types import Floats


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
        SettingError: ``count`` is not positive.

    Example:
        >>> scores = {pair.name: torch.rand(pair.shape) for pair in path.pairs}
        >>> random_path = pp.compensate(model, pp.SolutionPath.from_scores(path.pairs, scores), batches)
        >>> sorted(random_path.covariance)[0]
        'encoder.layer.0.attention.vo'
    """
    if path.fill_sum:
        raise MismatchError(
            "the path is of a model with sorted units, whose sums go by its covariances; compensate the path of the "
            "search, then sort_units or elastic"
        )
    if count < 1:
        raise SettingError(f"count={count} must be positive")
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
    hooks = {pair.name: InputMoments(pair, basis.get(pair.name)) for pair in pairs if pair.fillable}
    handles = [model.get_submodule(hook.module).register_forward_hook(hook) for hook in hooks.values()]
    try:
        with torch.no_grad(), eager(model), evaluating(model):
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


class InputMoments:
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


RIDGE = 0.1  # of the inputs' mean variance
