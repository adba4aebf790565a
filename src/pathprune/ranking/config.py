"""How a search is set up."""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import wraps
from numbers import Real
from typing import ParamSpec, TypeVar

from torch import Tensor

from pathprune.errors import SettingError
from pathprune.family.order import Unit, check_widths
from pathprune.model.contexts import check_seed
from pathprune.objectives.base import Objective
from pathprune.objectives.choose import objective_name
from pathprune.registry import DYNAMICS

P = ParamSpec("P")
R = TypeVar("R")

CURVATURE_SHARE = 6  # one step in so many


BASIS_SHARE = 4  # of these batches, one in so many is read once more


FEW_STEPS = 20


OUTPUT_LR = 0.01


RATES = ("fill_lr", "slope_lr", "output_lr")


@dataclass(frozen=True)
class SearchConfig:
    """How a search is set up; validated when built.

    Args:
        objective: name of the objective, or of a user's own class; what ``"auto"`` chose, not ``"auto"`` itself.
        dynamics: ``"sampled"``, ``"lbi"``, ``"spp-released"`` (``pathprune.ranking.dynamics``), or a registered one.
        steps: forward-backward passes in all; before the first update one in six measures curvature, and a quarter
            as many what bases need.
        seed: of everything random.
        unit, multiple: see ``SolutionPath``.
        basis: rotate heads into balanced bases first (``pathprune.ranking.basis``). Not for the published code.
        fill: put the mean in a removed dimension's place.
        compensate: tell what is removed from what stays, by the covariance over the first 64 batches
            (``pathprune.transform.reconstruction``). Only with a fill, and for the sampled path.
        lr: of the sampled path's dual at the start; it falls to zero along a cosine.
        fill_lr: of its fills, in standard deviations of the activation they stand for.
        slope_lr: of its slopes, by which units that stay are scaled as others go; 0 leaves them as they are.
        output_lr: of the scales and shifts of what output projections and down maps put out, which grow as others go,
            too, shifts in standard deviations; 0 does without. ``None`` is 0.01 for texts and the objective ``logits``,
            and 0 for all others, which it does not help (docs/ablation.md). Only with a fill.
        temperature: of the sampled path's surrogate gate.
        lowest_level: smallest fraction of the prunable parameters that the sampled path visits.
        bf16: multiply matrices in bfloat16, weights staying as they are: up to twice as fast where the hardware can.

    Raises:
        SettingError: a value is out of range.

    Example:
        >>> config = pp.SearchConfig(steps=100, unit="head")
        >>> config.curvature_steps, config.basis_steps, config.path_steps
        (16, 4, 80)
    """

    objective: str = "auto"
    dynamics: str = "sampled"
    steps: int = 400
    seed: int = 0
    unit: Unit = "mixed"
    multiple: int = 8
    basis: bool = True
    fill: bool = True
    compensate: bool = True
    lr: float = 0.005
    fill_lr: float = 0.005
    slope_lr: float = 0.02
    output_lr: float | None = None
    temperature: float = 0.05
    lowest_level: float = 0.1
    bf16: bool = False

    def __post_init__(self) -> None:
        if self.dynamics not in DYNAMICS:
            raise SettingError(
                f"dynamics={self.dynamics!r} is not one of {', '.join(DYNAMICS)}{DYNAMICS.hint(self.dynamics)}"
            )
        check_widths(self.unit, self.multiple)
        check_seed(self.seed)
        if not isinstance(self.steps, int) or self.steps < 3:
            raise SettingError(
                f"steps={self.steps!r} must be an integer, at least 3: for bases, for curvature, and for the path"
            )
        numbers = {name: getattr(self, name) for name in ("lr", "temperature", "lowest_level", *RATES)}
        if self.output_lr is None:
            del numbers["output_lr"]
        for name, value in numbers.items():
            if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
                raise SettingError(f"{name}={value!r} is not a finite number")
        if not 0 < self.lowest_level < 1:
            raise SettingError(f"lowest_level={self.lowest_level} must lie between 0 and 1")
        if self.lr <= 0 or self.temperature <= 0:
            raise SettingError(f"lr={self.lr} and temperature={self.temperature} must be positive")
        if negative := [f"{name}={numbers[name]}" for name in RATES if numbers.get(name, 0) < 0]:
            raise SettingError(f"{' and '.join(negative)} must not be negative")

    def suited(self, objective: Objective, batch: Mapping[str, Tensor]) -> SearchConfig:
        """With what goes by the objective and the data filled in: its name, and the default of ``output_lr``."""
        name, rate = objective_name(objective), self.output_lr
        if rate is None:
            rate = OUTPUT_LR if name == "logits" and "input_ids" in batch else 0.0
        return replace(self, objective=name, output_lr=rate)

    @property
    def adjusts(self) -> bool:
        """Whether gains and shifts of outputs are learned."""
        return bool(self.output_lr) and self.fill and DYNAMICS[self.dynamics].OUTPUTS

    @property
    def compensates(self) -> bool:
        return self.compensate and self.fill and DYNAMICS[self.dynamics].COMPENSATION

    @property
    def curvature_steps(self) -> int:
        """None where the dynamics asks for no curvature."""
        return max(1, self.steps // CURVATURE_SHARE) if DYNAMICS[self.dynamics].CURVATURE else 0

    @property
    def basis_steps(self) -> int:
        """None where the dynamics knows no rotations."""
        wanted = self.basis and self.curvature_steps and DYNAMICS[self.dynamics].BASES
        return max(1, self.curvature_steps // BASIS_SHARE) if wanted else 0

    @property
    def path_steps(self) -> int:
        return self.steps - self.curvature_steps - self.basis_steps


def known_settings(function: Callable[P, R]) -> Callable[P, R]:
    """Say what was meant where a keyword does not exist, in place of Python's own TypeError."""
    parameters = inspect.signature(function).parameters

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if unknown := sorted(set(kwargs) - set(parameters)):
            known = sorted(field.name for field in fields(SearchConfig))
            close = difflib.get_close_matches(unknown[0], parameters, 1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise SettingError(f"unknown search setting {unknown[0]!r}; SearchConfig has {', '.join(known)}{hint}")
        return function(*args, **kwargs)

    return call
