"""The three dynamics as the search loop drives them.

A driver says which mask to visit, learns from the loss's gradients with respect to masks and
fills, and in the end ranks the units. It keeps all that changes, and all that was measured, in
``state``, tensors by name, so that a checkpoint is complete. The equations are in ``pathprune.ranking.inclusion``.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from pathprune.ranking import inclusion

GOLDEN = (math.sqrt(5) - 1) / 2


State = dict[str, Tensor]


class Visited(NamedTuple):
    """One size of the family.

    Attributes:
        mask: (N,), what each unit is multiplied by.
        room: (N,), derivative of the mask with respect to the slope.
        edge: the ranking's value where the cut was made.
        gone: share of the prunable parameters that it lacks.
    """

    mask: Tensor
    room: Tensor
    edge: float
    gone: float


class Visit(Protocol):
    """What a driver may ask of the search: the family that a ranking gives."""

    def __call__(self, ranking: Tensor, slope: Tensor, level: float) -> Visited:
        """What the family would ship at ``level``."""


class Sampled:
    """Each step visits one random size of the family, exactly as it would ship."""

    ROWS = False  # of curvature the mean square is all it needs

    def __init__(self, config: Any, state: State, params: Tensor, mlp: Tensor, visit: Visit) -> None:
        self.config, self.state, self.visit, self.gone = config, state, visit, 0.0
        self.cost = params / params.float().mean()

    @staticmethod
    def begin(config: Any, probes: Tensor, params: Tensor, outputs: int) -> State:
        """Rank by curvature per parameter."""
        return _unpack(inclusion.sampled_init(probes.square().mean(0) / params, outputs))

    def level(self, step: int) -> float:
        """A low-discrepancy sequence on [lowest_level, 1]."""
        low: float = self.config.lowest_level
        return low + (1 - low) * ((0.5 + GOLDEN * step) % 1)

    def mask(self, step: int) -> tuple[Tensor, float]:
        level = self.level(step)
        self.visited = self.visit(self.state["dual"], self.state["slope"], level)
        self.gone = self.visited.gone
        return self.visited.mask, level

    def learn(self, step: int, mask_grad: Tensor, fill_grad: Tensor, output_grad: Tensor) -> None:
        cool = 0.5 * (1 + math.cos(math.pi * step / self.config.path_steps))
        state = inclusion.sampled_step(
            inclusion.SampledState(
                self.state["dual"],
                self.state["fill"],
                self.state["slope"],
                self.state["output"],
                *(
                    inclusion.Adam(self.state[f"{name}_first"], self.state[f"{name}_second"], step)
                    for name in ("dual", "fill", "slope", "output")
                ),
            ),
            mask_grad,
            fill_grad,
            output_grad,
            cost=self.cost,
            room=self.visited.room,
            lam=self.visited.edge,
            temperature=self.config.temperature,
            weight=1 / (1.05 - self.level(step)),
            lr=self.config.lr * cool,
            fill_lr=self.config.fill_lr * cool,
            slope_lr=self.config.slope_lr * cool,
            output_lr=self.config.output_lr * cool,
        )
        self.state = _unpack(state)

    def gamma(self) -> Tensor:
        """Where half of the units are in the support: comparable over steps, unlike the level just visited."""
        return (self.state["dual"] - self.state["dual"].median()).clamp_min(0)

    def ranking(self) -> Tensor:
        return self.state["dual"]

    def fill(self) -> Tensor:
        return self.state["fill"]

    def slope(self) -> Tensor:
        return self.state["slope"]

    def output(self) -> Tensor:
        return self.state["output"]


class Lbi:
    """The paper's text, with nu and the steps taken from curvature.

    Without labels the loss is flat at M = 1, so the coupling alone must not tear the network
    apart: 1/nu is the lower quartile of the curvature, which leaves three quarters of the masks
    nearer to 1 than to 0 while gamma is zero. A diagonal metric, kappa = 1 / (curvature + 1/nu),
    lets flat and steep units move in the same number of steps.
    """

    ROWS = True  # the step bound needs each sample's
    gone = 0.0
    SAFETY = 0.5  # of the step bound
    FIRST_ENTRY = 0.2  # of the steps, for a unit whose mask stays at 1

    def __init__(self, config: Any, state: State, params: Tensor, mlp: Tensor, visit: Visit) -> None:
        self.state = state

    @classmethod
    def begin(cls, config: Any, probes: Tensor, params: Tensor, outputs: int) -> State:
        curvature = probes.square().mean(0)
        curvature = curvature.clamp_min(1e-3 * float(curvature.mean()) + 1e-30)
        pull = float(curvature.quantile(0.25))  # 1/nu
        kappa = 1 / (curvature + pull)  # (N,)
        scaled = probes * kappa.sqrt() / math.sqrt(len(probes))  # (samples, N)
        steepest = float(torch.linalg.eigvalsh(scaled @ scaled.mT)[-1]) + 2 * float((kappa * pull).max())
        alpha = cls.SAFETY * 2 / steepest
        lam = cls.FIRST_ENTRY * config.path_steps * alpha * pull
        start = inclusion.lbi_init(len(curvature))._asdict()
        constants = torch.tensor([1 / pull, alpha, lam], dtype=torch.float64)
        return {**start, "time": torch.zeros(len(curvature)), "kappa": kappa, "constants": constants}

    def mask(self, step: int) -> tuple[Tensor, float]:
        return self.state["mask"], float((self.state["gamma"] != 0).float().mean())

    def learn(self, step: int, mask_grad: Tensor, fill_grad: Tensor, output_grad: Tensor) -> None:
        before = inclusion.BregmanState(self.state["mask"], self.state["gamma"], self.state["dual"])
        nu, alpha, lam = self.state["constants"].tolist()
        state = inclusion.lbi_step(before, mask_grad, nu=nu, kappa=self.state["kappa"], alpha=alpha, lam=lam)
        self.state = {**self.state, **state._asdict(), "time": self.state["time"] + (state.gamma != 0)}

    def gamma(self) -> Tensor:
        return self.state["gamma"]

    def ranking(self) -> Tensor:
        return _by_entry(self.state["time"], self.state["dual"])

    def fill(self) -> Tensor:
        return torch.zeros_like(self.state["mask"])

    slope = fill

    def output(self) -> Tensor:
        return torch.zeros(2, 0)


class Released:
    """The paper's published code: uncoupled AdamW on the masks; attention and MLP ranked apart."""

    ROWS = False
    gone = 0.0
    ENTRY = 0.5  # of the steps, for a unit whose mask stays at 1

    def __init__(self, config: Any, state: State, params: Tensor, mlp: Tensor, visit: Visit) -> None:
        self.lr = inclusion.SPP_THRESHOLD / (self.ENTRY * config.path_steps)
        self.state, self.mlp = state, mlp

    @staticmethod
    def begin(config: Any, probes: Tensor, params: Tensor, outputs: int) -> State:
        size = probes.shape[1]
        return {**_unpack(inclusion.released_init(size)), "time": torch.zeros(size)}

    def mask(self, step: int) -> tuple[Tensor, float]:
        return self.state["mask"], float((self.state["gamma"] != 0).float().mean())

    def learn(self, step: int, mask_grad: Tensor, fill_grad: Tensor, output_grad: Tensor) -> None:
        s = self.state
        adam = inclusion.Adam(s["adam_first"], s["adam_second"], step)
        state = inclusion.released_step(
            inclusion.ReleasedState(s["mask"], s["gamma"], s["dual"], adam), mask_grad, lr=self.lr
        )
        self.state = {**_unpack(state), "time": s["time"] + (state.gamma != 0)}

    def gamma(self) -> Tensor:
        return self.state["gamma"]

    def ranking(self) -> Tensor:
        ranking = torch.empty_like(self.state["time"])
        for part in (self.mlp, ~self.mlp):
            ranking[part] = _by_entry(self.state["time"][part], self.state["dual"][part])
        return ranking

    def fill(self) -> Tensor:
        return torch.zeros_like(self.state["mask"])

    slope = fill

    def output(self) -> Tensor:
        return torch.zeros(2, 0)


def _unpack(state: inclusion.SampledState | inclusion.ReleasedState) -> State:
    """Name the tensors of a state; the update count is the step itself."""
    tensors: State = {}
    for name, part in state._asdict().items():
        if isinstance(part, inclusion.Adam):
            prefix = name.removesuffix("_adam")
            tensors |= {f"{prefix}_first": part.first, f"{prefix}_second": part.second}
        else:
            tensors[name] = part
    return tensors


def _by_entry(time: Tensor, dual: Tensor) -> Tensor:
    """Ranks in [0, 1] by time in the support, ties broken by the dual."""
    by_dual = dual.argsort(stable=True)
    by_both = by_dual[time[by_dual].argsort(stable=True)]
    ranks = torch.empty_like(time)
    ranks[by_both] = torch.linspace(0, 1, len(time)) if len(time) > 1 else torch.ones(len(time))
    return ranks


Driver = Sampled | Lbi | Released
