"""The dynamics against closed forms on quadratics L(M) = (M - a)' H (M - a) / 2, and against torch's optimizers."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pathprune.ranking.inclusion import (
    ADAM_BETAS,
    ADAM_EPS,
    SPP_THRESHOLD,
    BregmanState,
    adam_direction,
    adam_init,
    lbi_init,
    lbi_step,
    lbi_step_bound,
    lyapunov,
    released_init,
    released_step,
    sampled_gate,
    sampled_init,
    sampled_step,
    shrink,
)


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@dataclass(frozen=True)
class Quadratic:
    """A random loss and settings of the iteration."""

    curvature: Tensor  # H, (N, N)
    minimiser: Tensor  # a, (N,)
    nu: float
    kappa: float
    lam: float

    @classmethod
    def random(cls, seed: int, *, dense: bool, nu: float = 1.0, kappa: float = 1.0, lam: float = 0.5) -> Quadratic:
        generator = torch.Generator().manual_seed(seed)
        root = torch.randn(5, 5, generator=generator) / 2
        diagonal = torch.diag(torch.rand(5, generator=generator) * 2 + 0.1)
        curvature = root @ root.T + 0.1 * torch.eye(5) if dense else diagonal
        sign = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0])
        return cls(curvature, sign * (0.5 + torch.rand(5, generator=generator)), nu, kappa, lam)

    @property
    def lipschitz(self) -> float:
        return float(torch.linalg.eigvalsh(self.curvature)[-1])

    @property
    def bound(self) -> float:
        return lbi_step_bound(self.lipschitz, nu=self.nu, kappa=self.kappa)

    def loss(self, mask: Tensor) -> float:
        return float((mask - self.minimiser) @ self.curvature @ (mask - self.minimiser)) / 2

    def run(self, alpha: float, steps: int) -> list[BregmanState]:
        states = [lbi_init(len(self.minimiser))]
        for _ in range(steps):
            grad = self.curvature @ (states[-1].mask - self.minimiser)
            states.append(lbi_step(states[-1], grad, nu=self.nu, kappa=self.kappa, alpha=alpha, lam=self.lam))
        return states

    def energy(self, alpha: float, steps: int) -> list[float]:
        """The Lyapunov function from the first step on."""
        states = self.run(alpha, steps)
        settings = {"nu": self.nu, "kappa": self.kappa, "alpha": alpha, "lam": self.lam}
        return [
            lyapunov(state, before, self.loss(state.mask), **settings) for before, state in itertools.pairwise(states)
        ]


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize(("nu", "kappa", "lam"), [(1.0, 1.0, 0.5), (0.3, 2.0, 0.1), (3.0, 0.5, 1.0)])
def test_lbi_converges_to_the_minimiser(dense: bool, nu: float, kappa: float, lam: float) -> None:
    """V stays bounded only where gamma = M, and then M can rest only where the gradient is zero."""
    for seed in range(2):
        problem = Quadratic.random(seed, dense=dense, nu=nu, kappa=kappa, lam=lam)
        last = problem.run(0.5 * problem.bound, 4000)[-1]
        torch.testing.assert_close(last.mask, problem.minimiser, rtol=0, atol=1e-7)
        torch.testing.assert_close(last.gamma, problem.minimiser, rtol=0, atol=1e-7)


@pytest.mark.parametrize("seed", range(4))
def test_units_of_a_diagonal_loss_enter_by_the_closed_form(seed: int) -> None:
    """While gamma = 0, M_k = m + (1 - m) q^k with m = h a / (h + 1/nu), and V_k sums alpha M / nu."""
    problem = Quadratic.random(seed, dense=False, nu=0.7, kappa=1.3, lam=2.0)
    alpha = 0.2 * problem.bound
    h, a = torch.diag(problem.curvature).numpy(), problem.minimiser.numpy()
    rest = h * a / (h + 1 / problem.nu)
    q = 1 - problem.kappa * alpha * (h + 1 / problem.nu)
    k = np.arange(2000)[:, None]
    dual = alpha / problem.nu * (k * rest + (1 - rest) * (1 - q**k) / (1 - q))  # (steps, N)
    expected = (np.abs(dual) > problem.lam).argmax(axis=0)

    gammas = torch.stack([state.gamma for state in problem.run(alpha, 1999)])
    np.testing.assert_array_equal((gammas != 0).to(torch.int8).argmax(dim=0).numpy(), expected)
    assert (expected > 0).all()
    assert len(set(expected.tolist())) > 2, "units enter at different times"


@st.composite
def quadratics(draw: st.DrawFn) -> Quadratic:
    scale = st.floats(-1.5, 1.5).map(lambda x: 10**x)
    return Quadratic.random(
        draw(st.integers(0, 10**6)), dense=draw(st.booleans()), nu=draw(scale), kappa=draw(scale), lam=draw(scale)
    )


@given(quadratics(), st.floats(0.05, 0.98))
def test_the_lyapunov_function_decreases_below_the_step_bound(problem: Quadratic, share: float) -> None:
    energy = np.array(problem.energy(share * problem.bound, 300))
    assert np.isfinite(energy).all()
    assert (np.diff(energy) <= 1e-9 * energy.max()).all()


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_it_increases_above_the_step_bound(seed: int, dense: bool) -> None:
    problem = Quadratic.random(seed, dense=dense)
    energy = np.array(problem.energy(1.5 * problem.bound, 150))
    assert (np.diff(energy) > 0).any()
    assert energy[-1] > 1e6 * energy[0], "it diverges"


def test_the_step_bound_is_that_of_the_coupled_loss() -> None:
    """L(M) + |M - gamma|^2 / (2 nu) has curvature up to 2 / nu even where L is flat."""
    for lipschitz, nu, kappa in [(0.0, 1.0, 1.0), (1.0, 0.5, 2.0), (10.0, 5.0, 0.3)]:
        joint = torch.tensor([[lipschitz + 1 / nu, -1 / nu], [-1 / nu, 1 / nu]])
        stable = 2 / (kappa * float(torch.linalg.eigvalsh(joint)[-1]))
        assert 0.8 * stable <= lbi_step_bound(lipschitz, nu=nu, kappa=kappa) <= stable * (1 + 1e-12)


def test_a_step_may_be_scaled_by_unit() -> None:
    state = BregmanState(torch.randn(4), torch.randn(4), torch.randn(4))
    grad, kappa = torch.randn(4), torch.tensor([0.5, 1.0, 2.0, 3.0])
    together = lbi_step(state, grad, nu=0.7, kappa=kappa, alpha=0.1, lam=0.2)
    for i in range(4):
        one = BregmanState(*(part[i : i + 1] for part in state))
        alone = lbi_step(one, grad[i : i + 1], nu=0.7, kappa=float(kappa[i]), alpha=0.1, lam=0.2)
        for part, expected in zip(together, alone, strict=True):
            torch.testing.assert_close(part[i : i + 1], expected)


@given(st.lists(st.floats(-10, 10), min_size=1), st.floats(0, 5), st.floats(0.1, 10))
def test_the_dual_is_a_subgradient_of_omega_at_gamma(values: list[float], lam: float, kappa: float) -> None:
    dual = torch.tensor(values)
    shrunk = shrink(dual, lam)
    torch.testing.assert_close(shrunk, torch.nn.functional.softshrink(dual, lam), rtol=0, atol=0)
    gamma = kappa * shrunk
    rest = dual - gamma / kappa  # must lie in lam d|gamma|
    assert (rest.abs() <= lam + 1e-12).all()
    torch.testing.assert_close(rest[gamma != 0], lam * gamma[gamma != 0].sign())


def test_lbi_starts_as_the_paper_does() -> None:
    mask, gamma, dual = lbi_init(3)
    assert mask.tolist() == [1, 1, 1]
    assert gamma.tolist() == dual.tolist() == [0, 0, 0]


def gradients(steps: int = 12, size: int = 5) -> Tensor:
    """Of very different sizes, some zero."""
    generator = torch.Generator().manual_seed(0)
    grads = torch.randn(steps, size, generator=generator) * torch.tensor([1e-6, 1e-2, 1.0, 1e3, 1.0])
    grads[:, 4] = 0
    return grads


def test_adam_is_torch_s() -> None:
    weight = torch.nn.Parameter(torch.zeros(5))
    theirs = torch.optim.Adam([weight], lr=0.01, betas=ADAM_BETAS, eps=ADAM_EPS)
    ours, state = torch.zeros(5), adam_init(5)
    for grad in gradients():
        weight.grad = grad.clone()
        theirs.step()
        direction, state = adam_direction(state, grad)
        ours = ours - 0.01 * direction
        torch.testing.assert_close(ours, weight.detach(), rtol=1e-12, atol=1e-15)


def test_the_released_step_is_adamw_and_the_written_recurrence() -> None:
    lr, decay = 0.3, 0.05
    weight = torch.nn.Parameter(torch.ones(5))
    theirs = torch.optim.AdamW([weight], lr=lr, betas=ADAM_BETAS, eps=ADAM_EPS, weight_decay=decay)
    state = released_init(5)
    gamma, dual = np.zeros(5), np.zeros(5)
    entered = []
    for grad in gradients(40):
        weight.grad = grad.clone()
        theirs.step()
        state = released_step(state, grad, lr=lr, weight_decay=decay)
        torch.testing.assert_close(state.mask, weight.detach(), rtol=1e-12, atol=1e-15)
        dual = dual + lr * (weight.detach().numpy() - gamma)
        gamma = np.maximum(dual - SPP_THRESHOLD, 0)
        np.testing.assert_allclose(state.dual.numpy(), dual, rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(state.gamma.numpy(), gamma, rtol=1e-12, atol=1e-14)
        entered.append(gamma > 0)
    assert not entered[0].any()
    assert len({tuple(support) for support in entered}) > 3, "units entered, at different times"


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=30))
def test_the_sampled_path_starts_from_ranks(curvature: list[float]) -> None:
    values = torch.tensor(curvature)
    dual = sampled_init(values).dual
    expected = torch.linspace(0, 1, len(values)).to(dual)
    torch.testing.assert_close(dual.sort().values, expected)
    for i, one in enumerate(curvature):
        assert all(dual[j] > dual[i] for j, other in enumerate(curvature) if other > one)


def test_the_gate_is_the_slope_of_a_sigmoid() -> None:
    dual = torch.linspace(-0.5, 1.5, 21, requires_grad=True)
    lam, temperature = 0.5, 0.05
    (slope,) = torch.autograd.grad(torch.sigmoid((dual - lam) / temperature).sum(), dual)
    gate = sampled_gate(dual.detach(), lam, temperature)
    torch.testing.assert_close(gate, slope)
    assert int(gate.argmax()) == 10, "steepest at the threshold"
    torch.testing.assert_close(gate, gate.flip(0))


SETTINGS: dict[str, Any] = {"lam": 0.5, "temperature": 0.05, "weight": 1.0, "lr": 0.01}
SETTINGS |= {"fill_lr": 0.02, "slope_lr": 0.03}
SETTINGS |= {"output_lr": 0.04, "output_grad": torch.zeros(2, 0)}
SETTINGS |= {"cost": torch.ones(5), "room": torch.ones(5)}


def test_a_sampled_step_trades_units_near_the_threshold_only() -> None:
    start = sampled_init(torch.arange(5.0))._replace(dual=torch.tensor([-1.0, 0.45, 0.5, 0.55, 2.0]))
    grad = torch.tensor([-1.0, -0.01, -0.02, -0.03, -1.0])  # all are worth something, the fourth most
    moved = sampled_step(start, grad, torch.zeros(5), **SETTINGS).dual - start.dual
    torch.testing.assert_close(moved[[1, 3]], torch.tensor([-0.01, 0.01]), rtol=1e-3, atol=0)
    assert moved[2].abs() < 1e-4, "worth its price"
    assert (moved[[0, 4]].abs() < 1e-4).all()


@given(st.lists(st.floats(0.1, 10), min_size=5, max_size=5), st.floats(-10, 10))
def test_units_worth_the_same_for_their_cost_stay_where_they_are(costs: list[float], worth: float) -> None:
    start, cost = sampled_init(torch.arange(5.0)), torch.tensor(costs)
    moved = sampled_step(start, worth * cost, torch.zeros(5), **{**SETTINGS, "cost": cost}).dual - start.dual
    assert moved.abs().max() < 1e-6


def test_the_price_balances_the_budget() -> None:
    """To first order the step changes no size: what moves in costs what moves out."""
    start, cost = sampled_init(torch.arange(5.0)), torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    grad = torch.tensor([0.3, -1.0, 0.2, 2.0, -3.0])
    first = sampled_step(start, grad, torch.zeros(5), **{**SETTINGS, "cost": cost}).dual_adam.first
    torch.testing.assert_close((first * cost).sum(), torch.tensor(0.0), rtol=0, atol=1e-12)
    assert first.abs().max() > 1e-3


def test_a_sampled_step_moves_fills_everywhere_and_duals_without_gradient_nowhere() -> None:
    start = sampled_init(torch.arange(5.0))
    grad = torch.tensor([1.0, -1.0, 0.0, 2.0, -3.0])
    step = sampled_step(start, torch.zeros(5), grad, **SETTINGS)
    torch.testing.assert_close(step.fill - start.fill, -0.02 * grad.sign(), check_dtype=False)
    torch.testing.assert_close(step.dual, start.dual, check_dtype=False)


def test_slopes_move_where_they_have_room() -> None:
    start, room = sampled_init(torch.arange(5.0)), torch.tensor([0.0, 0.5, 0.5, 0.5, 0.0])
    step = sampled_step(start, torch.tensor([1.0, 1.0, -1.0, 0.0, 1.0]), torch.zeros(5), **{**SETTINGS, "room": room})
    torch.testing.assert_close(step.slope, torch.tensor([0, -0.03, 0.03, 0, 0]), check_dtype=False)


def test_outputs_move_against_their_gradient() -> None:
    start, grad = sampled_init(torch.arange(5.0), 3), torch.tensor([[1.0, -2.0, 0.0], [0.0, 3.0, -1.0]])
    step = sampled_step(start, torch.zeros(5), torch.zeros(5), **{**SETTINGS, "output_grad": grad})
    torch.testing.assert_close(step.output, -0.04 * grad.sign(), check_dtype=False)


def test_the_level_s_weight_scales_what_adam_remembers() -> None:
    start = sampled_init(torch.arange(5.0), 5)
    grad = torch.arange(5.0)
    settings = {**SETTINGS, "output_grad": grad.expand(2, 5)}
    light, heavy = (sampled_step(start, grad, grad, **{**settings, "weight": w}) for w in (1.0, 3.0))
    for part in ("dual_adam", "fill_adam", "slope_adam", "output_adam"):
        torch.testing.assert_close(getattr(heavy, part).first, 3 * getattr(light, part).first)


def test_steps_return_new_states() -> None:
    grad = torch.ones(4)
    lbi, released, sampled = lbi_init(4), released_init(4), sampled_init(torch.arange(4.0))
    tensors = [*lbi, *released[:3], *released.adam[:2], *sampled[:4], *sampled.dual_adam[:2], *sampled.fill_adam[:2]]
    before = [tensor.clone() for tensor in tensors]
    lbi_step(lbi, grad, nu=1, kappa=1, alpha=1, lam=0.1)
    released_step(released, grad, lr=1)
    sampled_step(sampled, grad, grad, **{**SETTINGS, "cost": grad, "room": grad})
    assert all(torch.equal(tensor, other) for tensor, other in zip(tensors, before, strict=True))
    assert grad.tolist() == [1, 1, 1, 1]
