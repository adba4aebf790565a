"""Second moments of what the consumers read: gathered once, they refit the weights of every size in closed form.

The map that reads a pair's inner axis (output projection, down) computes W x. Where only the units K stay, it
computes W' x_K + c, with W' fitted by least squares to W x over the dense model's tokens. All that such a fit needs,
whatever K, is the moment matrix of (x, 1): one pass over a few batches serves every size, and every path over the
same pairs.

Tokens are weighted by the inverse squared norm of the consumer's output, so that a fit is to relative errors: a few
tokens with massive activations (Sun et al., COLM 2024) would own it otherwise. Least squares for the weights that
stay are those of Optimal Brain Surgeon (Hassibi and Stork, NeurIPS 1992) and many after it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from pathprune.data import Batches
from pathprune.errors import DataError
from pathprune.modes import evaluating
from pathprune.pairs import BaseModel, Pair, PairList

RIDGE = 0.5  # of the inputs' mean variance; upstream errors, of which the statistics know nothing, want a strong one


@dataclass(frozen=True)
class Statistics:
    """What refits the consumers of one model.

    Args:
        base: the model that they were gathered from.
        moments: pair name -> (G R D + 1, G R D + 1), weighted sum over tokens of the outer product of
            (x, 1) with itself; x is what the consumer reads of the pair, by group, head and dimension.
    """

    base: BaseModel
    moments: dict[str, Tensor]


def gather_statistics(
    model: nn.Module,
    pairs: PairList,
    data: Iterable[Mapping[str, Tensor]],
    *,
    count: int = 64,
    progress: bool | None = None,
) -> Statistics:
    """Run the dense model over unlabelled data. What ``slice_model`` takes to refit the weights that stay.

    Args:
        model: the dense model; untouched.
        pairs: its pairs (``path.pairs``). Those whose removed units could not be replaced by a constant either
            (query-key pairs, stacked experts, pairs with a norm or a gate between) are left out.
        data: re-iterable of model-input dicts, as for ``search``. A map with N inputs wants several N tokens.
        count: at most this many batches are read.
        progress: show a bar; by default only on a terminal.

    Raises:
        MismatchError: the pairs are of another model.
        DataError: empty data, wrong keys, or activations that are not finite.
    """
    from pathprune.discovery import check_base

    if count < 1:
        raise DataError(f"count={count} must be positive")
    check_base(model, pairs)
    batches = Batches(model, data)
    real: list[Tensor | None] = [None]
    hooks = {pair.name: _Hook(pair, real) for pair in pairs if pair.fillable}
    handles = [
        model.get_submodule(pair.consumer.module).register_forward_hook(hooks[pair.name])
        for pair in pairs
        if pair.name in hooks
    ]
    try:
        with torch.no_grad(), evaluating(model):
            hidden = None if progress is None else not progress
            for batch in tqdm(islice(batches.once(), count), desc="statistics", unit="batch", disable=hidden):
                real[0] = batch.get("attention_mask")
                model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    moments = {name: hook.moment for name, hook in hooks.items() if hook.moment is not None}
    for name, moment in moments.items():
        if not torch.isfinite(moment).all():
            raise DataError(f"what {name} computes is not finite; check the data, or load the model in float32")
    return Statistics(pairs.base, moments)


class _Hook:
    """Adds up the moments of one consumer's input."""

    def __init__(self, pair: Pair, real: list[Tensor | None]) -> None:
        self.index = torch.from_numpy(pair.consumer.index(pair.groups, pair.width).ravel())
        self.real = real
        self.moment: Tensor | None = None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        x = args[0].index_select(-1, self.index.to(args[0].device))
        x = torch.cat([x, torch.ones_like(x[..., :1])], -1)
        real = self.real[0]
        if real is not None and real.shape == x.shape[:-1]:  # padding tokens do not count
            x, output = x[real.bool()], output[real.bool()]
        wide = torch.promote_types(x.dtype, torch.float32)
        weight = 1 / output.flatten(0, -2).to(wide).norm(dim=1, keepdim=True).clamp_min(1e-6)
        x = x.flatten(0, -2).to(wide) * weight
        self.moment = x.mT @ x if self.moment is None else self.moment + x.mT @ x


def refit(moment: Tensor, weight: Tensor, kept: Tensor, start: Tensor, *, biased: bool) -> Tensor:
    """Least squares for the rows of a consumer's weight that stay.

    Where there is a constant, inputs are centred, and the constant leaves the mean output as it was: the search
    learns what the mean should be for the whole model (the fill), which here is not known.

    Args:
        moment: (N + 1, N + 1), of the inputs and 1.
        weight: (N, out), of all inputs.
        kept: (K,), the inputs that stay.
        start: (K, out), or (K + 1, out) with the constant: what the ridge pulls towards.
        biased: whether there is a constant.

    Returns:
        Of the shape of ``start``.
    """
    second, mean = moment[:-1, :-1], moment[:-1, -1:] / moment[-1, -1]
    rows = start
    if biased:
        second, rows = second - moment[-1, -1] * mean @ mean.mT, start[:-1]
    gram = second[kept][:, kept]
    pull = RIDGE * gram.diagonal().sum() / max(len(kept), 1)
    fitted = torch.linalg.solve(gram + pull * torch.eye(len(kept)).to(gram), second[kept] @ weight + pull * rows)
    if not biased:
        return fitted
    return torch.cat([fitted, start[-1:] + mean[kept].mT @ (rows - fitted)])
