"""Other libraries, driven as their own examples drive them."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from baselines.problem import OneSize, Problem
from pathprune.model.attention import HEADS, TOTALS, WIDTHS, attention_of
from pathprune.model.linear import linear_map

TRIES = 10  # of a pruning ratio, by bisection


def torch_pruning(problem: Problem) -> OneSize:
    """Torch-Pruning (Fang et al., "DepGraph", CVPR 2023; benchmarks/peers.txt), one run for each size.

    As in its examples for transformers: ``BasePruner`` with ``num_heads``, global pruning, the output projections
    ignored (its ``--bottleneck``), so that only inner widths shrink. Importance is its Hessian's, not normalised by
    layer, which did better than its Taylor's and than either normalised; the squared gradients that it wants are those
    of the objective's random probe, batch by batch, and are handed over directly, because its own ``accumulate_grad``
    keeps the last one only (1.6.1). Head dimensions leave; where rotary embedding forbids that, whole heads, as in its
    example for LLMs; and with grouped queries the MLPs alone, because there the search of its dependency graph does
    not end (with transformers 5.23, on two layers of random Llama). The pruning ratio is bisected for the largest
    model within the size; where no ratio reaches the size, because a layer that would lose everything is passed over,
    ranking is by layer, as in most of the examples. Widths need not be multiples of 8.
    """
    squares = squared_gradients(problem)

    def make(keep: float) -> nn.Module:
        for ranked_globally in (True, False):
            best, low, high = None, 0.0, 1.0
            for _ in range(TRIES):
                ratio = (low + high) / 2
                small = pruned(problem, squares, ratio, ranked_globally)
                if prunable_left(small, problem) <= keep * problem.pairs.prunable_params:
                    best, high = small, ratio
                else:
                    low = ratio
            if best is not None:
                return best
        raise RuntimeError(f"no pruning ratio up to {low:.3f} leaves {keep:.0%} of the prunable parameters")

    return make


def squared_gradients(problem: Problem) -> dict[str, Tensor]:
    """Parameter name -> square of the probe's gradient, mean over batches. The probe's noise is each sample's own, so
    that the square of a batch's sum is in expectation the sum of the samples' squares.
    """
    model = copy.deepcopy(problem.model)
    names = {f"{slot.module}.weight" for pair in problem.pairs for slot in pair.slots}
    noise = torch.Generator().manual_seed(problem.seed)
    watched = {name: p.requires_grad_() for name, p in model.named_parameters() if name in names}
    squares = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in watched.items()}
    for batch in problem.batches:
        value = problem.objective.probe(model(**batch), batch, noise)
        for name, gradient in zip(watched, torch.autograd.grad(value, list(watched.values())), strict=True):
            squares[name] += gradient.float().square() / len(problem.batches)
    return squares


def pruned(problem: Problem, squares: dict[str, Tensor], ratio: float, ranked_globally: bool) -> nn.Module:
    """A copy of the dense model, pruned by Torch-Pruning."""
    import torch_pruning as tp

    model = copy.deepcopy(problem.dense).requires_grad_(True)  # it traces the graph of gradients
    for name, parameter in model.named_parameters():
        parameter.grad = squares.get(name)
    heads = {
        linear_map(model, slot.module): pair.groups * slot.repeat
        for pair in problem.pairs
        if pair.kind != "mlp"
        for slot in pair.slots
        if slot.side == "out"
    }
    traced = [pair for pair in problem.pairs if pair.kind == "mlp" or len({slot.repeat for slot in pair.slots}) == 1]
    inner = {slot.module for pair in traced for slot in pair.slots if slot.side == "out"}
    whole_heads = any(pair.rotary for pair in problem.pairs)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Unwrapped parameters")  # those of norms, which stay as they are
        pruner = tp.pruner.BasePruner(
            model,
            problem.batches[0],
            importance=tp.importance.GroupHessianImportance(normalizer=None),
            global_pruning=ranked_globally,
            pruning_ratio=ratio,
            head_pruning_ratio=ratio,
            prune_head_dims=not whole_heads,
            prune_num_heads=whole_heads,
            ignored_layers=[m for name, m in model.named_modules() if not list(m.children()) and name not in inner],
            num_heads=heads,
            output_transform=lambda outputs: outputs[0].sum(),
        )
    for group in pruner.step(interactive=True):
        group.prune()
    for pair in problem.pairs:
        if pair.kind == "qk":
            query: Any = linear_map(model, pair.slots[0].module)
            resize(model.get_submodule(attention_of(model, pair)), query.out_features, pruner.num_heads[query])
    return model.requires_grad_(False)


def resize(attention: Any, width: int, heads: int) -> None:
    """Give an attention module the sizes of its maps, as the examples do by hand."""
    for names, size in ((WIDTHS, width // heads), (HEADS, heads), (TOTALS, width)):
        for name in names:
            if isinstance(getattr(attention, name, None), int):
                setattr(attention, name, size)
    if hasattr(attention, "num_key_value_groups"):
        attention.num_key_value_groups = width // attention.k_proj.out_features


def prunable_left(model: nn.Module, problem: Problem) -> int:
    """Parameters of the pairs' maps; biases only where they are as long as the inner axis."""
    maps = {(slot.module, slot.side, slot.bias) for pair in problem.pairs for slot in pair.slots}
    left = 0
    for name, side, biased in maps:
        module = linear_map(model, name)
        left += module.weight.numel() + (module.weight.shape[0] if side == "out" and biased else 0)
    return left
