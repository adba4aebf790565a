"""The first part of a search: bases, means, covariances and curvature of the dense model."""

from __future__ import annotations

import torch
from torch import Tensor

from pathprune.data.batches import Batch
from pathprune.data.checks import check_finite
from pathprune.model.outputs import samples
from pathprune.progress import track
from pathprune.ranking.basis import Calibration, calibrate, sensitivity
from pathprune.ranking.config import CURVATURE_SHARE
from pathprune.ranking.covariance import gather
from pathprune.ranking.problem import Problem
from pathprune.ranking.statistics import Statistics
from pathprune.transform.masks import attach_masks
from pathprune.transform.reconstruction import untold

STATISTICS_BATCHES = 64


class Measuring:
    """Forward passes and gradients of random probes at the dense model, whose weights must be frozen.

    Args:
        progress: see ``search``.
    """

    def __init__(self, problem: Problem, progress: bool | None) -> None:
        self.problem, self.config, self.progress = problem, problem.config, progress
        self.first = problem.batches.take(max(1, self.config.steps // CURVATURE_SHARE))
        self.noise = torch.Generator().manual_seed(self.config.seed)

    def statistics(self) -> Statistics:
        problem, config = self.problem, self.config
        gramians: dict[str, Tensor] = {}
        if config.basis_steps:
            self._probe(self.first[: config.basis_steps], Calibration(), gramians=gramians)
        calibration = calibrate(
            problem.model, problem.pairs, self.first, gramians, fill=config.fill, spreads=config.adjusts
        )
        if not config.compensates:
            return Statistics(problem.units, calibration)
        with problem.precision():  # of the steps, whose targets are what is seen here
            centre, covariance = gather(
                problem.model,
                problem.pairs,
                problem.batches,
                calibration.basis,
                count=STATISTICS_BATCHES,
                progress=self.progress,
                seen=problem.targets.remember,
            )
        return Statistics(problem.units, calibration, centre, covariance)

    def curvature(self, statistics: Statistics, *, rows: bool) -> Tensor:
        """Gradients of probes, (samples, N), or the one row (1, N) with the same mean square, each scaled to the share
        of its unit that reconstruction cannot make up for.
        """
        probes = self._probe(self.first, statistics.calibration, rows=rows)
        return probes * self._residual(probes, statistics).sqrt()

    def _probe(
        self,
        batches: list[Batch],
        calibration: Calibration,
        *,
        rows: bool = False,
        gramians: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """(samples, N), each sample's gradient of a random probe, whose mean square is the Gauss-Newton diagonal; or,
        without ``rows``, the one row (1, N) that has the same. With ``gramians``, see ``ranking.basis.sensitivity``.
        """
        problem, size = self.problem, len(self.problem.units)
        found: list[Tensor] = []
        square, count = torch.zeros(size), 0
        masks: dict[str, Tensor] = {}
        fills = Statistics(problem.units, calibration).fill(torch.zeros(size))
        watched = [] if gramians is None else [pair for pair in problem.pairs if pair.rotatable]
        with (
            attach_masks(problem.model, problem.pairs, masks, fills, calibration.basis),
            sensitivity(problem.model, watched, {} if gramians is None else gramians),
        ):
            what, rest = ("curvature", 0) if gramians is None else ("bases", self.config.curvature_steps)
            rest += self.config.path_steps
            for batch in track(batches, desc=what, unit="step", progress=self.progress, leave=False, rest=rest):
                ones = torch.ones(samples(batch), size, device=problem.batches.device, requires_grad=True)
                masks.update(problem.units.split(ones))
                with problem.precision():
                    outputs = problem.model(**batch)
                value = problem.objective.probe(outputs, batch, self.noise)
                check_finite(value, "while curvature was measured")
                grads = torch.autograd.grad(value, ones)[0].float().cpu()
                if rows:
                    found.append(grads)
                square, count = square + grads.square().sum(0), count + len(grads)
        return torch.cat(found) if rows else (square / count).sqrt()[None]

    def _residual(self, probes: Tensor, statistics: Statistics) -> Tensor:
        """(N,), the share of each unit that compensation cannot make up for; see ``reconstruction.untold``."""
        units = self.problem.units
        shares = {pair.name: torch.ones(pair.shape) for pair in units.pairs}
        values = units.split(probes.square().mean(0) / units.params)
        for pair in units.pairs:
            if pair.name in statistics.covariance:
                covariance = torch.from_numpy(statistics.covariance[pair.name])
                shares[pair.name] = untold(pair, values[pair.name], covariance)
        return units.join(shares)
