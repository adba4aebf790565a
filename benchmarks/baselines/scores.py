"""Methods that score every unit once, without a search."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

import pathprune as pp
from baselines.problem import OneSize, Problem, by_unit, moments, probes, weights
from pathprune.family.pairs import Pair
from pathprune.family.selection import Selection


def random(problem: Problem) -> pp.SolutionPath:
    """Uniform random scores: the floor."""
    noise = torch.Generator().manual_seed(problem.seed)
    return problem.path(problem.split(torch.rand(sum(problem.sizes), generator=noise)))


def magnitude(problem: Problem) -> pp.SolutionPath:
    """Mean square of a unit's weights in all its maps, compared across all layers (Li et al., "Pruning Filters for
    Efficient ConvNets", ICLR 2017; groups as in Fang et al., "DepGraph", CVPR 2023). Scores relative to their mean in
    the layer are better at 75 %, and on DINOv2 at 25 %, and worse elsewhere.
    """
    scores = {}
    for pair in problem.pairs:
        square = sum((weights(problem, pair, slot).square().sum((1, 3)) for slot in pair.slots), torch.zeros(()))
        scores[pair.name] = by_unit(pair, square) / pair.unit_params
    return problem.path(scores)


def taylor(problem: Problem) -> pp.SolutionPath:
    """|gradient x mask|, a first-order estimate (Molchanov et al., "Importance Estimation", CVPR 2019).

    Without labels the objective's gradient is zero at the dense model, so the gradient is that of the objective's
    random probe, sample by sample: mean of its absolute value, per parameter.
    """
    return problem.path(problem.per_cost(probes(problem).abs().mean(0)))


def wanda(problem: Problem) -> pp.SolutionPath:
    """|weight| x norm of its input, summed over a unit's weights (Sun et al., "Wanda", ICLR 2024; structured as in
    "Wanda-sp" of An et al., AAAI 2024).

    Values and neurons by the map that reads them; a query-key dimension, which no weight reads, by the norms of query
    and key. Both papers take the same share of every layer; scores relative to their mean in the layer do better.
    """
    found = moments(problem)
    scores = {}
    for pair in problem.pairs:
        norms = [found[pair.name, slot][1].sqrt() for slot in pair.slots if (pair.name, slot) in found]
        if pair.kind == "qk":
            queries, keys = (norm.square().sum(1).sqrt() for norm in norms)
            by_dim = queries * keys
        else:
            by_dim = (weights(problem, pair, pair.consumer).abs().sum(-1) * norms[0]).sum(1)
        scores[pair.name] = by_unit(pair, by_dim)
    return problem.path(relative(scores))


def flap(problem: Problem) -> pp.SolutionPath:
    """Variance of a unit's activation x squared norm of the weights that read it, and the mean activation folded into
    the bias (An et al., "Fluctuation-based Adaptive Structured Pruning", AAAI 2024).

    As there: whole heads and neurons; scores standardised within each layer, those of heads squared before; then one
    ranking of all. Query heads that share a key head share its mean.
    """
    found = moments(problem)
    scores, fill = {}, {}
    for pair in problem.pairs:
        if pair.kind == "qk":
            continue
        mean, square = found[pair.name, pair.consumer]  # (G, R, D)
        score = ((square - mean.square()) * weights(problem, pair, pair.consumer).square().sum(-1)).sum(1)
        score = score.square() if pair.kind == "vo" else score
        score = (score - score.mean()) / score.std()
        fill[pair.name] = mean.mean(1)
        scores[pair.name] = score
        if pair.kind == "vo":
            heads = score.mean(1, keepdim=True)
            scores |= {other.name: heads.expand(other.shape) for other in problem.pairs if other.block == pair.block}
    return problem.path(scores, unit="head", fill=fill)


def fisher(problem: Problem) -> OneSize:
    """Fisher information of the masks, then rearranged and rescaled (Kwon et al., "A Fast Post-Training Pruning
    Framework for Transformers", NeurIPS 2022).

    The three stages of the paper: a search by the diagonal, per parameter; a greedy exchange of units within each
    layer by its block of the matrix; masks of the units that stay, tuned by least squares. The units are ours, heads
    and neurons being among them. Without labels the gradients are those of the objective's random probe.
    """
    rows = probes(problem)  # (samples, N)
    path = problem.path(problem.per_cost(rows.square().mean(0)))
    gradients = {name: part.numpy() for name, part in problem.split(rows).items()}
    overlap = overlaps(problem)

    def make(keep: float) -> pp.Selection:
        selection = path.select(pp.Budget(keep=keep))
        kept = {pair.name: rearranged(pair, selection.keep[pair.name], gradients[pair.name]) for pair in problem.pairs}
        scale = {name: rescaled(kept[name], overlap[name]) for name in overlap}
        return Selection(problem.pairs, kept, selection.budget, scale=scale)

    return make


def rearranged(pair: Pair, keep: npt.NDArray[np.bool_], gradients: npt.NDArray[np.floating]) -> npt.NDArray[np.bool_]:
    """As many units of each head (or of the MLP) as before, chosen so that together they matter least.

    Greedy, as in the paper's code: units are taken up in ascending order, and of those in hand, once they are more
    than may go, the one without which the others' squared gradient sum is smallest is put back.

    Args:
        keep: (G, U).
        gradients: (samples, G, U).
    """
    result = keep.copy()
    left = np.flatnonzero(keep.any(axis=1))
    for heads in [left] if pair.rotary else left[:, None]:  # with rotary embedding, all keep the same dimensions
        if not len(heads):
            continue
        lost = int((~keep[heads[0]]).sum())
        block = gradients[:, heads].sum(1).astype(np.float64)
        matrix = block.T @ block
        gone: list[int] = []
        total = np.zeros(len(matrix))  # gradient sum of those in hand, times every unit's gradient
        for unit in np.argsort(matrix.diagonal(), kind="stable"):
            gone.append(int(unit))
            total += matrix[unit]
            if len(gone) > lost:
                back = gone.pop(int(np.argmin(matrix.diagonal()[gone] - 2 * total[gone])))
                total -= matrix[back]
        result[heads] = True
        result[heads[:, None], gone] = False
    return result


@torch.no_grad()
def overlaps(problem: Problem) -> dict[str, Tensor]:
    """Pair name -> (G U, G U), how much the units' shares in the consumer's output overlap, over one pass of the data.

    With X (tokens, D) the consumer's input and W (D, outputs) its weight, the share of unit u is X_u W_u, and
    <X_u W_u, X_v W_v> = (X^T X)_uv (W W^T)_uv; query heads of one unit add up. Tokens count by the inverse norm of
    the output, and padding does not.
    """
    found: dict[str, Tensor] = {}

    def gather(pair: Pair) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            x = args[0] / output.norm(dim=-1, keepdim=True).clamp_min(1e-6)
            x = (x.flatten(0, -2) if mask is None else x[mask.bool()]).double()
            found[pair.name] = found.get(pair.name, 0) + x.mT @ x

        return hook

    pairs = [pair for pair in problem.pairs if pair.kind != "qk"]
    handles = [problem.dense.get_submodule(pair.consumer.module).register_forward_hook(gather(pair)) for pair in pairs]
    try:
        for batch in problem.batches:
            mask = batch.get("attention_mask")
            problem.dense(**batch)
    finally:
        for handle in handles:
            handle.remove()
    for pair in pairs:
        index = torch.from_numpy(pair.consumer.index(pair.groups, pair.width)).transpose(0, 1).flatten(1)  # (R, G D)
        rows = weights(problem, pair, pair.consumer).transpose(0, 1).flatten(1, 2).double()  # (R, G D, outputs)
        places, flat = index.flatten(), rows.flatten(0, 1)
        by_place = found[pair.name].cpu()[places[:, None], places] * (flat @ flat.mT)
        found[pair.name] = by_place.unflatten(1, (len(rows), -1)).unflatten(0, (len(rows), -1)).sum((0, 2))
    return found


def rescaled(keep: npt.NDArray[np.bool_], overlap: Tensor, ridge: float = 0.1) -> npt.NDArray[np.floating]:
    """Factors (G, U) of the units that stay, so that the consumer's output is nearest to the one with all units.

    They solve the least squares with the ``overlap`` of those that stay as matrix, and with their overlap with all
    units as right side; a ridge pulls towards 1. As in the paper, factors beyond 10 are not taken.
    """
    left = torch.from_numpy(np.flatnonzero(keep))
    matrix = overlap[left[:, None], left]
    pull = ridge * matrix.diagonal().mean()
    factors = torch.linalg.solve(matrix + pull * torch.eye(len(left)).double(), overlap[left].sum(1) + pull)
    result = np.ones(keep.shape)
    if len(left) and factors.abs().max() <= 10:
        result[keep] = factors.numpy()
    return result


def least_squares(problem: Problem) -> pp.SolutionPath:
    """Rank by one score, then solve for the weights that stay, layer by layer, in closed form (after Zhang and Yang,
    "CORP", 2026, arXiv 2602.05243).

    The score is the diagonal of the Fisher information, per parameter, which did better than activation energy, the
    paper's kind of score. The solution is ours (``reconstruction``), which weights tokens and has a ridge; CORP
    has one for the attention's logits, too, which ours has not.
    """
    path = problem.path(problem.per_cost(probes(problem).square().mean(0)))
    return pp.compensate(problem.dense, path, problem.batches, progress=False)


def relative(scores: dict[str, Tensor]) -> dict[str, Tensor]:
    """Scores over their mean in each pair, for criteria whose numbers mean nothing across layers and kinds."""
    return {name: score / score.mean() for name, score in scores.items()}
