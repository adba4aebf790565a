"""The dynamics: differential inclusions on masks, discretised. Pure functions on flat tensors.

Source: Ding et al., "Adaptive Pruning of Pretrained Transformer via Differential Inclusions"
(SPP, ICLR 2025, arXiv 2501.03289), after Fu et al., "DessiLBI" (ICML 2020). Notation:

    M      mask, (N,)        one number a unit, all units of the model in one vector
    gamma  (N,)              augmented copy of M, sparse; its support is an architecture
    V      dual, (N,)        subgradient of Omega at gamma
    L      the loss at M, with the pretrained weights frozen
    nu     coupling of M and gamma; kappa damping; lam threshold; alpha step

Every function takes a state and returns a new one; nothing is changed in place.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

ADAM_BETAS = (0.9, 0.99)
ADAM_EPS = 1e-8
SPP_THRESHOLD = 3.0  # hard-coded in the published code


class BregmanState(NamedTuple):
    """State of the coupled iteration; all (N,)."""

    mask: Tensor
    gamma: Tensor
    dual: Tensor


def lbi_init(size: int) -> BregmanState:
    """M = 1, gamma = V = 0 (SPP, algorithm 1)."""
    return BregmanState(torch.ones(size), torch.zeros(size), torch.zeros(size))


def shrink(dual: Tensor, lam: float) -> Tensor:
    """Soft threshold, sign(V) max(|V| - lam, 0)."""
    return dual.sign() * (dual.abs() - lam).clamp_min(0)


def lbi_step(
    state: BregmanState, grad: Tensor, *, nu: float, kappa: float | Tensor, alpha: float, lam: float
) -> BregmanState:
    """One linearized Bregman iteration (SPP, equations 5 and 6).

        M'     = M - kappa alpha [grad L(M) + (M - gamma) / nu]
        V'     = V + alpha (M - gamma) / nu
        gamma' = kappa sign(V') max(|V'| - lam, 0)

    It converges for alpha < ``lbi_step_bound``.

    Args:
        state: at step k.
        grad: (N,), gradient of L at ``state.mask``.
        kappa: a number, or (N,) for a step scaled by unit (a diagonal metric).
    """
    pull = (state.mask - state.gamma) / nu
    mask = state.mask - kappa * alpha * (grad + pull)
    dual = state.dual + alpha * pull
    return BregmanState(mask, kappa * shrink(dual, lam), dual)


def lbi_step_bound(lipschitz: float, *, nu: float, kappa: float) -> float:
    """A stable alpha, 2 / (kappa (Lip + 2 / nu)).

    Departs from the text: SPP (theorem 1) has 1 / nu. M and gamma move together, and the coupled loss
    L(M) + |M - gamma|^2 / (2 nu) has curvature up to Lip + 2 / nu in (M, gamma): with 1 / nu the iteration
    oscillates or diverges once gamma has entered (tests/test_inclusion.py).

    Args:
        lipschitz: constant of the gradient of L.
        nu, kappa: as in ``lbi_step``.
    """
    return 2 / (kappa * (lipschitz + 2 / nu))


def lyapunov(
    state: BregmanState, before: BregmanState, loss: float, *, nu: float, kappa: float, alpha: float, lam: float
) -> float:
    """Lyapunov function of the iteration, which decreases below the step bound.

        F = alpha [L(M) + |M - gamma|^2 / (2 nu)] + B(gamma, gamma_before)

    with the Bregman distance of Omega(g) = lam |g|_1 + |g|^2 / (2 kappa) at the dual of ``before``,
    and the mask's half of it (DessiLBI, section 4)

        B = Omega(gamma) - Omega(gamma_before) - <V_before, gamma - gamma_before>
            + |M - M_before|^2 / (2 kappa)
    """

    def omega(gamma: Tensor) -> float:
        return float(lam * gamma.abs().sum() + gamma.square().sum() / (2 * kappa))

    coupled = loss + float((state.mask - state.gamma).square().sum()) / (2 * nu)
    distance = omega(state.gamma) - omega(before.gamma) - float(before.dual @ (state.gamma - before.gamma))
    return alpha * coupled + distance + float((state.mask - before.mask).square().sum()) / (2 * kappa)


class Adam(NamedTuple):
    """First and second moments, of the gradient's shape, and the number of updates."""

    first: Tensor
    second: Tensor
    updates: int


def adam_init(*shape: int) -> Adam:
    return Adam(torch.zeros(shape), torch.zeros(shape), 0)


def adam_direction(adam: Adam, grad: Tensor) -> tuple[Tensor, Adam]:
    """Bias-corrected direction first / (sqrt(second) + eps) (Kingma and Ba, algorithm 1), and the new moments."""
    b1, b2 = ADAM_BETAS
    first = b1 * adam.first + (1 - b1) * grad
    second = b2 * adam.second + (1 - b2) * grad.square()
    updates = adam.updates + 1
    direction = (first / (1 - b1**updates)) / ((second / (1 - b2**updates)).sqrt() + ADAM_EPS)
    return direction, Adam(first, second, updates)


class ReleasedState(NamedTuple):
    """State of the iteration in the published code; all (N,)."""

    mask: Tensor
    gamma: Tensor
    dual: Tensor
    adam: Adam


def released_init(size: int) -> ReleasedState:
    return ReleasedState(torch.ones(size), torch.zeros(size), torch.zeros(size), adam_init(size))


def released_step(state: ReleasedState, grad: Tensor, *, lr: float, weight_decay: float = 0.01) -> ReleasedState:
    """One step as in the published code, which departs from the paper's text:

    M'     = (1 - lr decay) M - lr Adam(grad L(M))     no coupling term
    V'     = V + lr (M' - gamma)
    gamma' = max(V' - 3, 0)
    """
    direction, adam = adam_direction(state.adam, grad)
    mask = (1 - lr * weight_decay) * state.mask - lr * direction
    dual = state.dual + lr * (mask - state.gamma)
    return ReleasedState(mask, (dual - SPP_THRESHOLD).clamp_min(0), dual, adam)


class SampledState(NamedTuple):
    """State of the sampled path; all (N,). The dual is the ranking. Learned beside it are the fill, in standard
    deviations from the mean, and the slope: where a fraction r of the model is kept, a unit that stays has the
    mask 1 + (1 - r) slope; and of what M maps put out, how they are scaled and, in standard deviations, shifted
    ((2, M); ``pathprune.family.path``).
    """

    dual: Tensor
    fill: Tensor
    slope: Tensor
    output: Tensor
    dual_adam: Adam
    fill_adam: Adam
    slope_adam: Adam
    output_adam: Adam


def sampled_init(curvature: Tensor, outputs: int = 0) -> SampledState:
    """Start from the ranks of a curvature diagonal, scaled to [0, 1], from the mean, and from masks of 1.

    Args:
        curvature: (N,).
        outputs: M.
    """
    size = len(curvature)
    ranks = torch.empty_like(curvature, dtype=torch.float32)
    ranks[curvature.argsort(stable=True)] = torch.linspace(0, 1, size).to(ranks)
    zeros, still = torch.zeros_like(ranks), torch.zeros(2, outputs)
    adams = (adam_init(size), adam_init(size), adam_init(size), adam_init(2, outputs))
    return SampledState(ranks, zeros, zeros, still, *adams)


def sampled_gate(dual: Tensor, lam: float, temperature: float) -> Tensor:
    """Derivative of sigmoid((V - lam) / T): what a mask's gradient counts for at each unit, (N,).

    The forward pass runs on the mask cut at lam; this is the straight-through surrogate's slope.
    """
    gate = torch.sigmoid((dual - lam) / temperature)
    return gate * (1 - gate) / temperature


def sampled_step(
    state: SampledState,
    mask_grad: Tensor,
    fill_grad: Tensor,
    output_grad: Tensor,
    *,
    cost: Tensor,
    room: Tensor,
    lam: float,
    temperature: float,
    weight: float,
    lr: float,
    fill_lr: float,
    slope_lr: float,
    output_lr: float,
) -> SampledState:
    """One mirror-descent step on the whole path, seen at one of its points.

        V' = V - lr       Adam(weight (dL/dM / cost - price) s)    s = sigmoid'((V - lam) / T)
        c' = c - fill_lr  Adam(weight dL/dc)
        a' = a - slope_lr Adam(weight dL/dM room)
        o' = o - output_lr Adam(weight dL/do)

    A visited size is fixed: a unit comes in only where others of the same cost go out. The price of a unit
    of cost is what those near the threshold give for it on average, sum(s dL/dM) / sum(s cost). So V moves
    by what a unit is worth beyond its price, and nothing moves where all give the same.

    Args:
        mask_grad, fill_grad, output_grad: (N,), (N,) and (2, M), gradients of L at the mask of the level that was
            visited.
        cost: (N,), of each unit.
        room: (N,), derivative of each unit's mask with respect to its slope: 1 - r where it stayed, or 0.
        lam: the dual's threshold at that level.
        weight: of the level; small models lose more, and count for less.
    """
    gate = sampled_gate(state.dual, lam, temperature)
    price = (gate * mask_grad).sum() / (gate * cost).sum().clamp_min(1e-30)
    dual, dual_adam = adam_direction(state.dual_adam, weight * (mask_grad / cost - price) * gate)
    fill, fill_adam = adam_direction(state.fill_adam, weight * fill_grad)
    slope, slope_adam = adam_direction(state.slope_adam, weight * mask_grad * room)
    output, output_adam = adam_direction(state.output_adam, weight * output_grad)
    return SampledState(
        state.dual - lr * dual,
        state.fill - fill_lr * fill,
        state.slope - slope_lr * slope,
        state.output - output_lr * output,
        dual_adam,
        fill_adam,
        slope_adam,
        output_adam,
    )
