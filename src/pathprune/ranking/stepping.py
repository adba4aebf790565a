"""A search, one step at a time."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import cached_property
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pathprune.data.checks import check_finite
from pathprune.errors import SettingError
from pathprune.family.artifact import named_folder
from pathprune.family.learned import LEARNED, at_sparsity
from pathprune.family.path import SolutionPath
from pathprune.model.identity import check_usable
from pathprune.objectives.base import Objective
from pathprune.ranking.checkpoint import (
    Progress,
    Row,
    read_checkpoint,
    remove_checkpoint,
    write_beginning,
    write_checkpoint,
    write_statistics,
)
from pathprune.ranking.config import SearchConfig
from pathprune.ranking.dynamics import Driver, Gradients
from pathprune.ranking.measuring import Measuring
from pathprune.ranking.problem import Problem, frozen
from pathprune.ranking.randomness import Randomness
from pathprune.registry import DYNAMICS
from pathprune.transform.masks import attach_masks
from pathprune.transform.reconstruction import Compensator, compensators
from pathprune.versions import library_versions


class Step(NamedTuple):
    """What one step saw.

    Attributes:
        step: its number, from 0 on.
        loss: the objective at the mask that it visited.
        density: share of the prunable parameters that this mask kept.
    """

    step: int
    loss: float
    density: float


class Search:
    """One search, from its start or a checkpoint to the path, stepped from outside; ``pathprune.search`` is a loop over
    it.

    While it works the weights are frozen, dropout is off, and random numbers are those of the seed; after every call
    the model and the caller's random state are as they were. In a ``with`` block the weights stay frozen and the hooks
    of the steps stay on until it ends, however it ends: many steps then cost less. A step that fails, or that Ctrl-C
    interrupts, never happened.

    Args:
        model: dense, on the device to search on.
        data: re-iterable of model-input dicts, each one batch; started over when it ends.
        config: how it is set up.
        objective: a name, or an object with the methods of ``Objective``; by default what ``config`` names.
        out: folder for checkpoints; what it holds of another search is replaced.
        progress: show bars while it measures; see ``pathprune.search``.

    Attributes:
        problem: the model, its pairs, the data and the objective, as the search sees them.

    Raises:
        UnsupportedModelError: no pair could be proved.
        SettingError: a value is out of range.
        DataError: empty data, or wrong keys.
        ArtifactError: ``out`` can be no folder.

    Example:
        >>> with pp.Search(model, batches, pp.SearchConfig(steps=20)) as search:
        ...     search.start()
        ...     while search.steps_left:
        ...         seen = search.step()
        >>> search.steps_done, seen.step, seen.density <= 1
        (16, 15, True)
        >>> small = pp.slice_model(model, search.path().select(pp.Budget(keep=0.5)))
    """

    def __init__(
        self,
        model: nn.Module,
        data: Iterable[Mapping[str, Tensor]],
        config: SearchConfig | None = None,
        *,
        objective: str | Objective | None = None,
        out: str | os.PathLike[str] | None = None,
        progress: bool | None = False,
    ) -> None:
        config = SearchConfig() if config is None else config
        self.out = None if out is None else named_folder(out)
        self._bars = progress
        check_usable(model)
        self._random = Randomness(config.seed, next(model.parameters()).device)
        with self._drawing():
            self.problem = Problem(model, data, config, config.objective if objective is None else objective)
        self._driver: Driver = DYNAMICS[config.dynamics](self.problem.config, self.problem.units)
        self._progress: Progress | None = None
        self._stream: Iterator[dict[str, Tensor]] | None = None
        self._held: ExitStack | None = None
        self._hooked = False
        self._masks: dict[str, Tensor] = {}
        self._fills: dict[str, Tensor] = {}
        self._outputs: dict[str, Tensor] = {}

    def __enter__(self) -> Search:
        if self._held is not None:
            raise SettingError("the search is in a with block already; leave that one first")
        with ExitStack() as stack:
            stack.enter_context(frozen(self.problem.model))
            self._held = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        held, self._held, self._hooked = self._held, None, False
        if held is not None:
            held.close()

    def start(self) -> None:
        """Measure bases, fills, covariances and curvature of the dense model: a good sixth of the steps.

        Raises:
            DataError: what was measured is not finite.
            SettingError: the search was started before.
            ArtifactError: ``out`` cannot be written.
        """
        self._check_new()
        config = self.problem.config
        if self.out is not None:
            write_beginning(self.out, self.problem)
        with self._working():
            measuring = Measuring(self.problem, self._bars)
            self._statistics = measuring.statistics()
            if self.out is not None and config.compensates:
                write_statistics(self.out, self._statistics)
            probes = torch.zeros(1, len(self.problem.units))
            if config.curvature_steps:
                probes = measuring.curvature(self._statistics, rows=self._driver.ROWS)
            outputs = sum(map(len, self._statistics.spreads.values()))
            self._progress = Progress(self._driver.begin(probes, outputs))

    def resume(self) -> None:
        """Go on from the checkpoint in ``out``; from the start, where that was left before the first step.

        Raises:
            MismatchError: it is of another model, of other settings or other data.
            ArtifactError: there is none, or it is not valid.
            SettingError: the search was started before, or has no ``out``.
        """
        self._check_new()
        held = read_checkpoint(self._folder(), self.problem)
        if held is None:
            self.start()
        else:
            self._statistics, self._progress = held

    @property
    def steps_done(self) -> int:
        """Steps on the path so far."""
        return 0 if self._progress is None else len(self._progress.rows)

    @property
    def steps_left(self) -> int:
        """Steps on the path that are to come."""
        return self.problem.config.path_steps - self.steps_done

    def step(self) -> Step:
        """One forward and backward pass on the next batch, and one update.

        Raises:
            DataError: the loss is not finite.
            SettingError: the search was not started, or all steps are done.
        """
        state, rows = self._now()
        if not self.steps_left:
            raise SettingError(f"all {len(rows)} steps are done; take the path by search.path()")
        # A step that fails leaves no stream: the next one reads the same batch anew.
        stream, self._stream = self._stream or self._rewound(), None
        number, driver = len(rows), self._driver
        with self._working():
            self._hook()
            batch = next(stream)
            visited = driver.visit(state, number, self.problem.member)
            leaves = tuple(
                part.detach().to(self.problem.batches.device).requires_grad_()
                for part in (visited.mask, driver.fill(state), driver.output(state))
            )
            loss = self._loss(batch, visited.sparsity, *leaves)
            value = check_finite(loss, f"at step {number}, with {visited.density:.0%} of the model kept")
            grads = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
            after = driver.update(state, number, visited, Gradients(*(grad.float().cpu() for grad in grads)))
            row = Row(value, visited.density, self.problem.units.sums(driver.gamma(after).abs()))
            self._progress = Progress(after, (*rows, row))  # one assignment: Ctrl-C falls before or after it
        self._stream = stream
        return Step(number, value, visited.density)

    def checkpoint(self) -> None:
        """Leave in ``out`` all that is needed to go on after the latest step.

        Raises:
            ArtifactError: ``out`` cannot be written.
            SettingError: the search was not started, or has no ``out``.
        """
        write_checkpoint(self._folder(), self.problem, self._statistics, self._now())

    def path(self) -> SolutionPath:
        """The family that the latest step left; the search may go on afterwards.

        Raises:
            SettingError: the search was not started.
        """
        progress, driver = self._now(), self._driver
        state, statistics = progress.state, self._statistics
        return self.problem.path(
            driver.ranking(state),
            driver.slope(state),
            fill={name: part.numpy() for name, part in statistics.fill(driver.fill(state)).items()},
            output={name: part.numpy() for name, part in statistics.output(driver.output(state)).items()},
            basis=statistics.calibration.basis,
            centre=statistics.centre,
            covariance=statistics.covariance,
            trajectory=progress.trajectory(len(self.problem.pairs)),
            config={**asdict(self.problem.config), "data": self.problem.data},
            versions=library_versions(),
        )

    def save(self) -> SolutionPath:
        """Leave the path in ``out``, in place of the checkpoint.

        Raises:
            ArtifactError: ``out`` cannot be written.
            SettingError: the search was not started, or has no ``out``.
        """
        folder, path = self._folder(), self.path()
        path.save(folder)
        remove_checkpoint(folder)
        return path

    def _loss(self, batch: dict[str, Tensor], sparsity: float, mask: Tensor, fill: Tensor, output: Tensor) -> Tensor:
        """Of the model with a mask (N,), fills (N,) and outputs (2, M)."""
        problem, dense = self.problem, torch.tensor(LEARNED["output"].dense).to(output)
        self._masks.clear()
        self._outputs.clear()
        with problem.precision():
            target = problem.targets(batch)
            masks = problem.units.split(mask)
            self._masks.update(masks)
            self._fills.update(self._statistics.fill(fill))
            self._outputs.update(
                (name, at_sparsity(dense, part, sparsity))
                for name, part in self._statistics.output(output).items()
                if not masks[name].all()
            )
            outputs = problem.model(**batch)
        return problem.objective.loss(outputs, batch, target)

    @cached_property
    def _compensators(self) -> dict[str, Compensator]:
        """They remember the covariances' inverses."""
        statistics = self._statistics
        return compensators(statistics.centre, statistics.covariance, self.problem.batches.device)

    def _hook(self) -> None:
        """Masks, fills and compensation, until the block ends."""
        if self._hooked or self._held is None:
            return
        basis = self._statistics.calibration.basis
        arrays = (self._masks, self._fills, basis, self._compensators, self._outputs)
        self._held.enter_context(attach_masks(self.problem.model, self.problem.pairs, *arrays))
        self._hooked = True

    @contextmanager
    def _drawing(self) -> Iterator[None]:
        with torch.inference_mode(False), torch.enable_grad(), self._random.drawn():
            yield

    @contextmanager
    def _working(self) -> Iterator[None]:
        with ExitStack() as stack:
            if self._held is None:
                stack.enter_context(self)
            stack.enter_context(self._drawing())
            yield

    def _rewound(self) -> Iterator[dict[str, Tensor]]:
        """The batches that are to come, drawn as if all steps had been done just now."""
        self._random.restart()
        return islice(iter(self.problem.batches), self.problem.config.curvature_steps + self.steps_done, None)

    def _check_new(self) -> None:
        if self._progress is not None:
            raise SettingError("the search was started already; make another Search to begin anew")

    def _now(self) -> Progress:
        if self._progress is None:
            raise SettingError("the search was not started; call search.start() or search.resume()")
        return self._progress

    def _folder(self) -> Path:
        if self.out is None:
            raise SettingError("the search has no folder for checkpoints; make it with out=")
        return self.out
