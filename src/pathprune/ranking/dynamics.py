"""The dynamics as a search drives them, and what another package's must offer.

A driver says which mask a step visits, learns from the loss's gradients there, and in the end ranks the units. All that
changes is in a state, tensors by name, which a step replaces and a checkpoint holds; the driver itself changes nothing.
The equations are in ``pathprune.ranking.inclusion``.
"""

from __future__ import annotations

import math
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from pathprune.ranking import inclusion
from pathprune.ranking.config import SearchConfig
from pathprune.ranking.units import Units

GOLDEN = (math.sqrt(5) - 1) / 2


State = dict[str, Tensor]


class Visited(NamedTuple):
    """What a step visits.

    Attributes:
        mask: (N,), what each unit is multiplied by.
        density: share of the model that it keeps, for the trajectory.
        sparsity: share of the prunable parameters that it lacks, by which scales and shifts of outputs grow.
        by_slope: (N,), derivative of the mask with respect to the slope.
        threshold: the ranking's value where the cut was made.
    """

    mask: Tensor
    density: float
    sparsity: float = 0.0
    by_slope: Tensor = torch.zeros(())
    threshold: float = 0.0


class Gradients(NamedTuple):
    """Of the loss, at what a step visited.

    Attributes:
        mask: (N,).
        fill: (N,), by the fill in standard deviations.
        output: (2, M), by the scales and shifts of M features of outputs.
    """

    mask: Tensor
    fill: Tensor
    output: Tensor


class Member(Protocol):
    """What a driver may ask of the search: one size of the family that a ranking gives."""

    def __call__(self, ranking: Tensor, slope: Tensor, density: float) -> Visited:
        """What the family would ship at ``density``."""


class Driver(Protocol):
    """One dynamics; registered by name in ``pathprune.registry.DYNAMICS``, made anew for each search.

    A class of its own needs the methods without a body here; by subclassing this one it has the others. What it is
    given, it must not change in place.

    Attributes:
        CURVATURE: whether it begins from curvature, which a sixth of the steps then measure.
        ROWS: whether it wants the gradients of every sample, of which the mean square would do otherwise.
        BASES: whether heads may be rotated for it; only with curvature.
        COMPENSATION: whether what is removed may be reconstructed from what stays: its masks are those of a family,
            exactly zero where a unit is removed.
        OUTPUTS: whether it learns scales and shifts of outputs; its masks are those of a family, too.

    Example:
        Units in the order of their curvature, without learning::

            class ByCurvature(Driver):
                CURVATURE = True

                def begin(self, probes, outputs):
                    return {"worth": probes.square().mean(0) / self.units.params}

                def visit(self, state, step, member):
                    return Visited(torch.ones(len(self.units)), 1.0)

                def update(self, state, step, visited, gradients):
                    return state

                def ranking(self, state):
                    return state["worth"]

            pathprune.registry.DYNAMICS.register("by-curvature", ByCurvature)
            pathprune.search(model, data, dynamics="by-curvature")
    """

    CURVATURE: ClassVar[bool] = False
    ROWS: ClassVar[bool] = False
    BASES: ClassVar[bool] = False
    COMPENSATION: ClassVar[bool] = False
    OUTPUTS: ClassVar[bool] = False
    config: SearchConfig
    units: Units

    def __init__(self, config: SearchConfig, units: Units) -> None:
        self.config, self.units = config, units

    def begin(self, probes: Tensor, outputs: int) -> State:
        """The state before the first step.

        Args:
            probes: (samples, N) or, without ``ROWS``, (1, N), gradients whose mean square is the curvature; zeros
                without ``CURVATURE``.
            outputs: M, features of outputs that are scaled and shifted; 0 without ``OUTPUTS``.
        """
        ...

    def visit(self, state: State, step: int, member: Member) -> Visited:
        """What step number ``step``, from 0 on, visits."""
        ...

    def update(self, state: State, step: int, visited: Visited, gradients: Gradients) -> State:
        """The state after the step."""
        ...

    def ranking(self, state: State) -> Tensor:
        """(N,), larger for a unit that stays longer."""
        ...

    def gamma(self, state: State) -> Tensor:
        """(N,), the sparse copy of the mask, whose norms the trajectory shows."""
        return torch.zeros(len(self.units))

    def fill(self, state: State) -> Tensor:
        """(N,), what takes a removed unit's place: standard deviations from the mean."""
        return torch.zeros(len(self.units))

    def slope(self, state: State) -> Tensor:
        """(N,): at a size that lacks the share r, a unit that stays is multiplied by 1 + r slope."""
        return torch.zeros(len(self.units))

    def output(self, state: State) -> Tensor:
        """(2, M), scales less 1 and shifts of outputs, in standard deviations; they grow by r, too."""
        return torch.zeros(2, 0)


class Sampled(Driver):
    """Each step visits one random size of the family, exactly as it would ship."""

    CURVATURE = BASES = COMPENSATION = OUTPUTS = True

    def __init__(self, config: SearchConfig, units: Units) -> None:
        super().__init__(config, units)
        self.cost = units.params / units.params.float().mean()

    def begin(self, probes: Tensor, outputs: int) -> State:
        """Rank by curvature per parameter."""
        return _unpack(inclusion.sampled_init(probes.square().mean(0) / self.units.params, outputs))

    def density(self, step: int) -> float:
        """A low-discrepancy sequence on [lowest_level, 1]."""
        low = self.config.lowest_level
        return low + (1 - low) * ((0.5 + GOLDEN * step) % 1)

    def visit(self, state: State, step: int, member: Member) -> Visited:
        return member(state["dual"], state["slope"], self.density(step))

    def update(self, state: State, step: int, visited: Visited, gradients: Gradients) -> State:
        config = self.config
        cool = 0.5 * (1 + math.cos(math.pi * step / config.path_steps))
        learned = ("dual", "fill", "slope", "output")
        adams = (inclusion.Adam(state[f"{name}_first"], state[f"{name}_second"], step) for name in learned)
        return _unpack(
            inclusion.sampled_step(
                inclusion.SampledState(state["dual"], state["fill"], state["slope"], state["output"], *adams),
                *gradients,
                cost=self.cost,
                room=visited.by_slope,
                lam=visited.threshold,
                temperature=config.temperature,
                weight=1 / (1.05 - visited.density),
                lr=config.lr * cool,
                fill_lr=config.fill_lr * cool,
                slope_lr=config.slope_lr * cool,
                output_lr=(config.output_lr or 0.0) * cool,
            )
        )

    def gamma(self, state: State) -> Tensor:
        """Where half of the units are in the support: comparable over steps, unlike the size just visited."""
        return (state["dual"] - state["dual"].median()).clamp_min(0)

    def ranking(self, state: State) -> Tensor:
        return state["dual"]

    def fill(self, state: State) -> Tensor:
        return state["fill"]

    def slope(self, state: State) -> Tensor:
        return state["slope"]

    def output(self, state: State) -> Tensor:
        return state["output"]


class Lbi(Driver):
    """The paper's text, with nu and the steps taken from curvature.

    Without labels the loss is flat at M = 1, so the coupling alone must not tear the network
    apart: 1/nu is the lower quartile of the curvature, which leaves three quarters of the masks
    nearer to 1 than to 0 while gamma is zero. A diagonal metric, kappa = 1 / (curvature + 1/nu),
    lets flat and steep units move in the same number of steps.
    """

    CURVATURE = BASES = True
    ROWS = True  # for the step bound
    SAFETY = 0.5  # of the step bound
    FIRST_ENTRY = 0.2  # of the steps, for a unit whose mask stays at 1

    def begin(self, probes: Tensor, outputs: int) -> State:
        curvature = probes.square().mean(0)
        curvature = curvature.clamp_min(1e-3 * float(curvature.mean()) + 1e-30)
        pull = float(curvature.quantile(0.25))  # 1/nu
        kappa = 1 / (curvature + pull)  # (N,)
        scaled = probes * kappa.sqrt() / math.sqrt(len(probes))  # (samples, N)
        steepest = float(torch.linalg.eigvalsh(scaled @ scaled.mT)[-1]) + 2 * float((kappa * pull).max())
        alpha = self.SAFETY * 2 / steepest
        lam = self.FIRST_ENTRY * self.config.path_steps * alpha * pull
        start = inclusion.lbi_init(len(curvature))._asdict()
        constants = torch.tensor([1 / pull, alpha, lam], dtype=torch.float64)
        return {**start, "time": torch.zeros(len(curvature)), "kappa": kappa, "constants": constants}

    def visit(self, state: State, step: int, member: Member) -> Visited:
        return Visited(state["mask"], _support(state))

    def update(self, state: State, step: int, visited: Visited, gradients: Gradients) -> State:
        before = inclusion.BregmanState(state["mask"], state["gamma"], state["dual"])
        nu, alpha, lam = state["constants"].tolist()
        after = inclusion.lbi_step(before, gradients.mask, nu=nu, kappa=state["kappa"], alpha=alpha, lam=lam)
        return {**state, **after._asdict(), "time": state["time"] + (after.gamma != 0)}

    def gamma(self, state: State) -> Tensor:
        return state["gamma"]

    def ranking(self, state: State) -> Tensor:
        return _by_entry(state["time"], state["dual"])


class Released(Driver):
    """The paper's published code: uncoupled AdamW on the masks; attention and MLP ranked apart. It asks for no
    curvature, and knows no rotations.
    """

    ENTRY = 0.5  # of the steps, for a unit whose mask stays at 1

    def begin(self, probes: Tensor, outputs: int) -> State:
        size = len(self.units)
        return {**_unpack(inclusion.released_init(size)), "time": torch.zeros(size)}

    def visit(self, state: State, step: int, member: Member) -> Visited:
        return Visited(state["mask"], _support(state))

    def update(self, state: State, step: int, visited: Visited, gradients: Gradients) -> State:
        adam = inclusion.Adam(state["adam_first"], state["adam_second"], step)
        after = inclusion.released_step(
            inclusion.ReleasedState(state["mask"], state["gamma"], state["dual"], adam),
            gradients.mask,
            lr=inclusion.SPP_THRESHOLD / (self.ENTRY * self.config.path_steps),
        )
        return {**_unpack(after), "time": state["time"] + (after.gamma != 0)}

    def gamma(self, state: State) -> Tensor:
        return state["gamma"]

    def ranking(self, state: State) -> Tensor:
        ranking = torch.empty_like(state["time"])
        for part in (self.units.mlp, ~self.units.mlp):
            ranking[part] = _by_entry(state["time"][part], state["dual"][part])
        return ranking


def _support(state: State) -> float:
    """Share of the units that are in gamma's support."""
    return float((state["gamma"] != 0).float().mean())


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
