"""Methods that score every unit once, without a search."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

import pathprune as pp
from baselines.problem import OneSize, Problem, by_unit, moments, probes, weights
from pathprune.budget import Selection
from pathprune.pairs import Pair
from pathprune.recovery.closed_form import consumers
from pathprune.slicing import PaddedLinear, features, linear_map


def random(problem: Problem) -> pp.SolutionPath:
    """Uniform random scores: the floor."""
    noise = torch.Generator().manual_seed(problem.seed)
    return problem.path(problem.split(torch.rand(sum(problem.sizes), generator=noise)))


def magnitude(problem: Problem) -> pp.SolutionPath:
    """Mean square of a unit's weights in all its maps, compared across all layers (Li et al., "Pruning Filters for
    Efficient ConvNets", ICLR 2017; groups as in Fang et al., "DepGraph", CVPR 2023).
    """
    scores = {}
    for pair in problem.pairs:
        square = sum(weights(problem, pair, slot).square().sum((1, 3)) for slot in pair.slots)
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
    targets = outputs(problem)

    def make(keep: float) -> nn.Module:
        selection = path.select(pp.Budget(keep=keep))
        kept = {pair.name: rearranged(pair, selection.keep[pair.name], gradients[pair.name]) for pair in problem.pairs}
        small = pp.slice_model(problem.dense, Selection(problem.pairs, kept, selection.budget))
        rescale(small, problem, targets)
        return small

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


READ = 16  # batches that the least squares read, as many as ours


def real_tokens(x: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """(B, T, features) -> (tokens, features), without padding."""
    mask = batch.get("attention_mask")
    return x.flatten(0, -2) if mask is None else x[mask.bool()]


@torch.no_grad()
def outputs(problem: Problem) -> dict[str, list[Tensor]]:
    """What the dense maps that read an inner axis return, (tokens, features) for each batch."""
    found: dict[str, list[Tensor]] = {pair.consumer.module: [] for pair in problem.pairs if pair.kind != "qk"}
    handles = [
        problem.dense.get_submodule(name).register_forward_hook(lambda _, args, output, seen=seen: seen.append(output))
        for name, seen in found.items()
    ]
    for batch in problem.passes(READ):
        problem.dense(**batch)
        for seen in found.values():
            seen[-1] = real_tokens(seen[-1], batch)
    for handle in handles:
        handle.remove()
    return found


@torch.no_grad()
def rescale(small: nn.Module, problem: Problem, targets: dict[str, list[Tensor]], ridge: float = 1e-2) -> None:
    """Scale the inputs of every map that reads a thinned axis, so that its output is nearest to the dense one's.

    Map by map in forward order, inputs taken from the model as it is so far: with X (tokens, inputs), Y (tokens,
    outputs) and weight W (outputs, inputs), the least squares over scales s of X diag(s) W^T = Y have the normal
    equations (X^T X * W^T W) s = diag(X^T Y W). Tokens count by the inverse norm of Y; a ridge pulls towards 1. As in
    the paper, the first map that wants a scale beyond 10 ends it.

    Args:
        targets: module -> Y for each batch (``outputs``).
    """
    for name in consumers(small, problem.dense):
        module = linear_map(small, name)
        weight = module.weight.double()
        gram = torch.zeros(features(module)[0], features(module)[0], dtype=torch.float64)
        cross = torch.zeros(len(gram), dtype=torch.float64)
        for batch, y in zip(problem.passes(READ), targets[name], strict=True):
            x = input_of(small, name, batch)
            x = real_tokens(module.crop(x) if isinstance(module, PaddedLinear) else x, batch)
            by_token = 1 / y.norm(dim=1, keepdim=True).clamp_min(1e-6)
            x, y = (x * by_token).double(), ((y if module.bias is None else y - module.bias) * by_token).double()
            gram += x.mT @ x
            cross += ((x.mT @ y) * weight.mT).sum(1)
        matrix = gram * (weight.mT @ weight)
        pull = ridge * matrix.diagonal().mean()
        scale = torch.linalg.solve(matrix + pull * torch.eye(len(matrix)).double(), cross + pull)
        if scale.abs().max() > 10:
            return
        module.weight.mul_(scale.to(module.weight))


class _Reached(Exception):
    """The forward pass has got as far as it is needed."""


def input_of(model: nn.Module, name: str, batch: dict[str, Tensor]) -> Tensor:
    """What one map reads."""
    seen: list[Tensor] = []

    def stop(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.append(args[0])
        raise _Reached

    handle = model.get_submodule(name).register_forward_pre_hook(stop)
    try:
        model(**batch)
    except _Reached:
        pass
    finally:
        handle.remove()
    return seen[0]


def least_squares(problem: Problem) -> OneSize:
    """Rank by a unit's share in its map's output, then solve for the weights that stay, layer by layer, in closed form
    (after Zhang and Yang, "CORP", 2026, arXiv 2602.05243).

    The score is the variance of the activation x squared norm of the weights that read it, a query-key dimension's
    the product of both mean squares. The solution is ours (``pathprune.recover``), which weights tokens and pulls
    towards the old weights; CORP has one for the logits, too, which ours has not.
    """
    found = moments(problem)
    scores = {}
    for pair in problem.pairs:
        if pair.kind == "qk":
            queries, keys = (found[pair.name, slot][1].sum(1) for slot in pair.slots)
            by_dim = queries * keys
        else:
            mean, square = found[pair.name, pair.consumer]
            reads = weights(problem, pair, pair.consumer).square().sum(-1)
            by_dim = ((square - mean.square()) * reads).sum(1)
        scores[pair.name] = by_unit(pair, by_dim)
    path = problem.path(relative(scores))

    def make(keep: float) -> nn.Module:
        small = pp.slice_model(problem.dense, path.select(pp.Budget(keep=keep)))
        return pp.recover(small, teacher=problem.dense, data=problem.batches, method="closed-form", progress=False)

    return make


def relative(scores: dict[str, Tensor]) -> dict[str, Tensor]:
    """Scores over their mean in each pair, for criteria whose numbers mean nothing across layers and kinds."""
    return {name: score / score.mean() for name, score in scores.items()}
