"""Methods that learn masks with the objective's gradients, weights frozen."""

from __future__ import annotations

import math
from typing import Any

import torch

import pathprune as pp
from baselines.problem import OneSize, Problem, mask_gradients, probes
from pathprune.objectives.targets import Targets
from pathprune.ranking.inclusion import adam_direction, adam_init

LASSO_LR = 0.05  # chosen from 0.02 to 0.2


def ours(problem: Problem) -> pp.SolutionPath:
    """``pathprune.search`` as it comes."""
    return searched(problem, **problem.settings)


def spp_released(problem: Problem) -> pp.SolutionPath:
    """The published code of Ding et al. (SPP, ICLR 2025), with its unit, one order for all heads of a layer.

    Masks are learned for each head, and ranks averaged. It was written for the loss of a task; without labels its
    gradient begins at zero.
    """
    return searched(problem, dynamics="spp-released", unit="shared", basis=False, fill=False)


def lbi(problem: Problem) -> pp.SolutionPath:
    """The text of Ding et al. (SPP, ICLR 2025): linearized Bregman iteration, with nu and steps from curvature."""
    return searched(problem, dynamics="lbi", basis=False, fill=False)


def searched(problem: Problem, **settings: Any) -> pp.SolutionPath:
    return pp.search(
        problem.model,
        problem.batches,
        objective=problem.objective,
        steps=problem.steps,
        seed=problem.seed,
        progress=False,
        **settings,
    )


def lasso(problem: Problem) -> OneSize:
    """Masks learned under the loss + lambda |M|_1, weighted by parameters; one lambda and one run for each size (the
    plain penalty that Ding et al., SPP, ICLR 2025, figure 1, compare with; as in Liu et al., "Network Slimming", 2017).

    Lambda is what zeroes the asked share of the parameters if the loss is the quadratic of its Gauss-Newton diagonal
    h: mask i is zero for lambda cost_i > h_i. Adam with a cosine, masks in [0, 1]. At the end the masks are ranked,
    units of equal masks by h, and rounded to zero and one.
    """
    begun = max(1, problem.steps // 25)
    costs = problem.costs / problem.costs.double().mean()
    curvature = (probes(problem, begun).square().mean(0) / costs).float()
    order = curvature.argsort()
    share = costs[order].cumsum(0) / costs.sum()
    tie_break = torch.empty_like(curvature)
    tie_break[order] = torch.linspace(0, 1e-3, len(order))
    targets = Targets(problem.model, problem.objective)

    def make(keep: float) -> pp.Selection:
        lam = curvature[order][int((share <= 1 - keep).sum())]
        mask, adam = torch.ones_like(curvature), adam_init(len(curvature))
        steps = problem.steps - begun
        with mask_gradients(problem, targets) as gradient:
            for step, batch in enumerate(problem.passes(steps)):
                direction, adam = adam_direction(adam, gradient(mask, batch) + lam * costs)
                mask = (mask - LASSO_LR * cooled(step, steps) * direction).clamp(0, 1).float()
        return problem.path(problem.split(mask + tie_break)).select(pp.Budget(keep=keep))

    return make


def cooled(step: int, steps: int) -> float:
    return 0.5 * (1 + math.cos(math.pi * step / steps))


def upop(problem: Problem) -> OneSize:
    """Progressive pruning (Shi et al., "UPop", ICML 2023), one run for each size.

    Gradients in the masks add up over steps: where removing a unit raises the loss, its sum falls. At step t of T, the
    units with the largest sums, per parameter, a share p_t = p sqrt((1 - cos(pi t / T)) / 2) of all parameters, have
    the mask 1 - p_t / p, and the others 1: the mask of what goes falls to zero by the end. That is the schedule of its
    code. Weights stay frozen here, and the sums begin with the random probe's squares (negative), because the
    objective's gradient is zero at the dense model.
    """
    begun = max(1, problem.steps // 25)
    start = -probes(problem, begun).square().mean(0)
    targets = Targets(problem.model, problem.objective)

    def make(keep: float) -> pp.Selection:
        sums, steps = start.clone(), problem.steps - begun
        mask = torch.ones_like(sums)
        with mask_gradients(problem, targets) as gradient:
            for step, batch in enumerate(problem.passes(steps)):
                sums += gradient(mask, batch)
                removed = (1 - keep) * math.sqrt((1 - math.cos(math.pi * (step + 1) / steps)) / 2)
                chosen = problem.path(problem.per_cost(-sums)).select(pp.Budget(keep=1 - removed))
                hard = torch.cat([torch.from_numpy(chosen.keep[pair.name]).flatten() for pair in problem.pairs])
                mask = torch.where(hard, 1.0, 1 - removed / (1 - keep))
        return chosen

    return make
