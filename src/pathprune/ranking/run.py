"""The search: one run over the data that ranks every unit of a model."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, fields
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pathprune.data.batches import Batches
from pathprune.data.checks import check_finite
from pathprune.discovery.discover import find_pairs
from pathprune.errors import ArtifactError, SettingError
from pathprune.family.artifact import from_tensors, named_folder, read_artifact, to_tensors, write_artifact
from pathprune.family.budget import Budget
from pathprune.family.learned import LEARNED, at_sparsity
from pathprune.family.pair_list import PairList
from pathprune.family.path import SolutionPath
from pathprune.family.serialise import base_to_json
from pathprune.family.trajectory import Trajectory
from pathprune.model.contexts import caching, eager, evaluating, mixed, seeded
from pathprune.model.identity import check_usable
from pathprune.model.outputs import samples
from pathprune.objectives.base import Objective
from pathprune.objectives.choose import get_objective
from pathprune.objectives.targets import Targets
from pathprune.progress import track
from pathprune.ranking.basis import Calibration, calibrate, sensitivity
from pathprune.ranking.checkpoint import (
    CHECKPOINT_FORMAT,
    RESUMING,
    check_same_data,
    check_same_search,
    data_identity,
    held_search,
    remove_checkpoint,
)
from pathprune.ranking.config import CURVATURE_SHARE, FEW_STEPS, SearchConfig
from pathprune.ranking.covariance import gather
from pathprune.ranking.dynamics import Driver, Visited
from pathprune.registry import DYNAMICS
from pathprune.transform.masks import attach_masks
from pathprune.transform.reconstruction import compensators, untold
from pathprune.types import Floats
from pathprune.versions import library_versions

CHECKPOINT_EVERY = 50  # steps


STATISTICS_BATCHES = 64


def search(
    model: nn.Module,
    data: Iterable[Mapping[str, Tensor]],
    *,
    objective: str | Objective = "auto",
    dynamics: str = "sampled",
    steps: int = 400,
    seed: int = 0,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool | None = None,
    **settings: Any,
) -> SolutionPath:
    """Rank every unit of ``model`` in one run over data, which needs no labels.

    The weights stay frozen, and the model is as it was when the search returns or fails. With
    ``out``, the search leaves a checkpoint there every 50 steps and on Ctrl-C, from which
    ``resume=True`` goes on, and in the end the path.

    Args:
        model: dense, on the device to search on.
        data: re-iterable of model-input dicts, each one batch; started over when it ends.
        objective: ``"auto"`` (by what the model returns, ``pathprune.objectives.choose.auto``), ``"embedding"``,
            ``"hidden"``, ``"logits"``, ``"task"`` (labelled batches), or an object with the methods of ``Objective``.
        dynamics: ``"sampled"`` (default), ``"lbi"`` (the paper's text, with nu from curvature) or
            ``"spp-released"`` (the paper's published code).
        steps: forward-backward passes in all.
        seed: of everything random.
        out: folder for the path and checkpoints.
        resume: go on from the checkpoint in ``out``; model and settings must be the same. A
            search that had finished is loaded.
        overwrite: search anew where ``out`` holds a search, finished or not. A path that is there stays until the new
            one replaces it.
        progress: show a bar, or lines where there is no terminal; by default a bar on a terminal and nothing elsewhere.
        **settings: ``unit=``, ``multiple=``, ``basis=``, ``fill=``, ``compensate=`` and the other fields of
            ``SearchConfig``.

    Raises:
        UnsupportedModelError: no pair could be proved.
        SettingError: a setting that does not exist, or whose value is out of range.
        DataError: empty data, wrong keys, or a loss that is not finite.
        MismatchError: ``resume`` with another model, other settings or other data.
        ArtifactError: ``out`` cannot be written, holds nothing to resume, or a search that is not to be overwritten.
    """
    known = {field.name for field in fields(SearchConfig)}
    if unknown := sorted(set(settings) - known):
        raise SettingError(f"unknown search setting {unknown[0]!r}; SearchConfig has {', '.join(sorted(known))}")
    config = SearchConfig(dynamics=dynamics, steps=steps, seed=seed, **settings)
    if steps < FEW_STEPS:
        warnings.warn(
            f"steps={steps} is few: {config.curvature_steps} measure curvature, and {config.path_steps} find the path. "
            "That tries a set-up; for a path to use, take 100 at the least (by default it is 400)",
            stacklevel=2,
        )
    if resume and out is None:
        raise SettingError("resume=True needs out=, the folder of the search to go on with")
    if resume and overwrite:
        raise SettingError("resume=True goes on with the search in out=, overwrite=True begins anew; give one of them")
    if out is not None:
        named_folder(out)
    if out is not None and not (resume or overwrite) and (held := held_search(out)):
        raise ArtifactError(
            f"{out} holds {held}; give resume=True to {RESUMING[held]}, overwrite=True to search anew in its place, "
            "or another out="
        )
    check_usable(model)
    device = next(model.parameters()).device
    with torch.inference_mode(False), torch.enable_grad(), seeded(seed, device):
        batches = Batches(model, data)
        goal = get_objective(objective, model, batches.first)
        config = config.suited(goal, batches.first)
        pairs = find_pairs(model, batches.first)
        if resume and out is not None and not (Path(out) / "checkpoint.json").exists():
            path = SolutionPath.load(out)
            check_same_search(pairs, config, base_to_json(path.pairs.base), path.config, out)
            check_same_data(batches, path.config.get("data"), out)
            remove_checkpoint(Path(out))  # where it was stopped between its last two lines
            return path
        with _frozen(model), evaluating(model):
            run = _Run(model, pairs, batches, goal, config, None if out is None else Path(out), progress)
            if resume:
                run.restore()
            else:
                run.start()
            with seeded(seed, device):  # anew, so that a search that goes on finds its data in the same order
                return run.finish()


class _Run:
    """One search from start, or from its checkpoint, to the path."""

    def __init__(
        self,
        model: nn.Module,
        pairs: PairList,
        batches: Batches,
        objective: Objective,
        config: SearchConfig,
        out: Path | None,
        progress: bool | None,
    ) -> None:
        self.model, self.pairs, self.batches, self.objective = model, pairs, batches, objective
        self.config, self.out = config, out
        self.progress = progress
        self.sizes = [pair.groups * pair.units for pair in pairs]
        self.params = self._by_unit([pair.unit_params for pair in pairs])
        self.noise = torch.Generator().manual_seed(config.seed)
        self.targets = Targets(model, objective)
        self.seq_len = _tokens(model, pairs, batches.first)
        self.data = data_identity(batches)
        self.masks: dict[str, Tensor] = {}
        self.fills: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        self.centre: dict[str, Floats] = {}
        self.covariance: dict[str, Floats] = {}
        self.complete: tuple[int, dict[str, Tensor]] = (0, {})  # updates, and the driver's state after them
        self.loss: list[float] = []
        self.level: list[float] = []
        self.gamma_l1: list[list[float]] = []

    # One vector holds all units; these two go between it and the pairs.
    def split(self, flat: Tensor) -> dict[str, Tensor]:
        parts = flat.split(self.sizes, dim=-1)
        return {pair.name: part.unflatten(-1, pair.shape) for pair, part in zip(self.pairs, parts, strict=True)}

    def join(self, parts: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([parts[pair.name].flatten(-2) for pair in self.pairs], dim=-1)

    def start(self) -> None:
        """Measure bases, fills, covariances and curvature, and begin."""
        if self.out is not None:
            write_artifact(self.out, "checkpoint", self._meta(None), {})
        config = self.config
        first = self.batches.take(max(1, config.steps // CURVATURE_SHARE))
        gramians: dict[str, Tensor] = {}
        self.found = Calibration()
        if config.basis_steps:
            self._probe(first[: config.basis_steps], gramians=gramians)
        self.found = calibrate(self.model, self.pairs, first, gramians, fill=config.fill, spreads=config.adjusts)
        if config.compensates:
            with self.precision():  # of the steps, whose targets are what is seen here
                self.centre, self.covariance = gather(
                    self.model,
                    self.pairs,
                    self.batches,
                    self.found.basis,
                    count=STATISTICS_BATCHES,
                    progress=self.progress,
                    seen=self.targets.remember,
                )
            if self.out is not None:
                tensors = to_tensors({"centre": self.centre, "covariance": self.covariance})
                write_artifact(self.out, "statistics", {"format": CHECKPOINT_FORMAT}, tensors)
        kind = DYNAMICS[config.dynamics]
        probes = torch.zeros(1, sum(self.sizes))
        if config.curvature_steps:
            probes = self._probe(first, rows=kind.ROWS)
            probes *= self._untold(probes).sqrt()
        self.driver = self._driver(kind.begin(config, probes, self.params, sum(map(len, self._spreads().values()))))
        self.complete = 0, self.driver.state

    @property
    def done(self) -> int:
        return self.complete[0]

    def _driver(self, state: dict[str, Tensor]) -> Driver:
        mlp = self._by_unit([pair.kind == "mlp" for pair in self.pairs])
        return DYNAMICS[self.config.dynamics](self.config, state, self.params, mlp, self.visit)

    def _by_unit(self, by_pair: list[Any]) -> Tensor:
        return torch.tensor(by_pair).repeat_interleave(torch.tensor(self.sizes))

    def _fill(self, deviation: Tensor) -> dict[str, Tensor]:
        """The constants of all pairs that take one, from (N,) standard deviations."""
        found = self.found
        return {
            name: torch.from_numpy(found.mean[name]).to(part) + torch.from_numpy(found.std[name]).to(part) * part
            for name, part in self.split(deviation).items()
            if name in found.mean
        }

    def _spreads(self) -> dict[str, Floats]:
        """Pair name -> (d,), of the outputs that are scaled and shifted, in the order in which they are held."""
        return {pair.name: self.found.out[pair.name] for pair in self.pairs if pair.name in self.found.out}

    def _output(self, flat: Tensor) -> dict[str, Tensor]:
        """Pair name -> (2, d), as a path has it, from (2, M)."""
        spreads = self._spreads()
        parts = zip(spreads.items(), flat.split([len(spread) for spread in spreads.values()], dim=1), strict=True)
        return {
            name: torch.stack([gain, torch.from_numpy(spread).to(shift) * shift])
            for (name, spread), (gain, shift) in parts
        }

    def _probe(
        self, batches: list[dict[str, Tensor]], *, rows: bool = False, gramians: dict[str, Tensor] | None = None
    ) -> Tensor:
        """(samples, N), each sample's gradient of a random probe, whose mean square is the Gauss-Newton diagonal; or,
        without ``rows``, the one row (1, N) that has the same. With ``gramians``, see ``ranking.basis.sensitivity``.
        """
        found: list[Tensor] = []
        square, count = torch.zeros(sum(self.sizes)), 0
        self.fills.update(self._fill(torch.zeros(sum(self.sizes))))
        watched = [] if gramians is None else [pair for pair in self.pairs if pair.rotatable]
        with (
            attach_masks(self.model, self.pairs, self.masks, self.fills, self.found.basis),
            sensitivity(self.model, watched, {} if gramians is None else gramians),
        ):
            what, rest = ("curvature", 0) if gramians is None else ("bases", self.config.curvature_steps)
            rest += self.config.path_steps
            for batch in track(batches, desc=what, unit="step", progress=self.progress, leave=False, rest=rest):
                ones = torch.ones(samples(batch), sum(self.sizes), device=self.batches.device, requires_grad=True)
                self.masks.update(self.split(ones))
                with self.precision():
                    outputs = self.model(**batch)
                value = self.objective.probe(outputs, batch, self.noise)
                check_finite(value, "while curvature was measured")
                grads = torch.autograd.grad(value, ones)[0].float().cpu()
                if rows:
                    found.append(grads)
                square, count = square + grads.square().sum(0), count + len(grads)
        self.masks.clear()
        return torch.cat(found) if rows else (square / count).sqrt()[None]

    def _untold(self, probes: Tensor) -> Tensor:
        """(N,), the share of each unit that compensation cannot make up for; see ``reconstruction.untold``."""
        shares = {pair.name: torch.ones(pair.shape) for pair in self.pairs}
        values = self.split(probes.square().mean(0) / self.params)
        for pair in self.pairs:
            if pair.name in self.covariance:
                covariance = torch.from_numpy(self.covariance[pair.name])
                shares[pair.name] = untold(pair, values[pair.name], covariance)
        return self.join(shares)

    def precision(self) -> AbstractContextManager[None]:
        return mixed(self.model, self.config.bf16)

    def attached(self) -> AbstractContextManager[None]:
        """Masks, fills and compensation, for the steps on the path."""
        told = compensators(self.centre, self.covariance, self.batches.device)
        return attach_masks(self.model, self.pairs, self.masks, self.fills, self.found.basis, told, self.outputs)

    def visit(self, ranking: Tensor, slope: Tensor, level: float) -> Visited:
        """Exactly what the path would ship at ``level``."""
        path = self.path(ranking, slope)
        selection = path.select(Budget(keep=level))
        mask = self.join({pair.name: torch.from_numpy(selection.mask(pair)) for pair in self.pairs}).float()
        keeps = {pair: selection.keep[pair.name] for pair in self.pairs}
        scaled = {pair.name: torch.from_numpy(keep & pair.scalable & ~keep.all()) for pair, keep in keeps.items()}
        room = selection.sparsity * self.join(scaled).float()
        value = path.order.value
        edge = float(value[min(selection.removals, len(value) - 1)])
        return Visited(mask, room, edge, selection.sparsity)

    def path(self, ranking: Tensor, slope: Tensor, **rest: Any) -> SolutionPath:
        scalable = {pair.name for pair in self.pairs if pair.scalable}
        return SolutionPath(
            self.pairs,
            {name: part.numpy() for name, part in self.split(ranking).items()},
            slope={name: part.numpy() for name, part in self.split(slope).items() if name in scalable},
            unit=self.config.unit,
            multiple=self.config.multiple,
            seq_len=self.seq_len,
            **rest,
        )

    def finish(self) -> SolutionPath:
        """Run the steps that are left and return the path."""
        config = self.config
        bar = track(total=config.path_steps, initial=self.done, desc="search", unit="step", progress=self.progress)
        stream = islice(iter(self.batches), config.curvature_steps + self.done, None)
        try:
            with bar, self.attached():
                while self.done < config.path_steps:
                    loss, level = self._step(next(stream))
                    bar.set_postfix(loss=f"{loss:.4f}", keep=f"{level:.2f}", refresh=False)
                    bar.update()
                    if self.done % CHECKPOINT_EVERY == 0:
                        self.checkpoint()
        except KeyboardInterrupt:
            self.checkpoint()
            raise
        path = self.path(
            self.driver.ranking(),
            self.driver.slope(),
            fill={name: part.numpy() for name, part in self._fill(self.driver.fill()).items()},
            output={name: part.numpy() for name, part in self._output(self.driver.output()).items()},
            basis=self.found.basis,
            centre=self.centre,
            covariance=self.covariance,
            trajectory=self._trajectory(),
            config={**asdict(config), "data": self.data},
            versions=library_versions(),
        )
        if self.out is not None:
            path.save(self.out)
            remove_checkpoint(self.out)
        return path

    def _step(self, batch: dict[str, Tensor]) -> tuple[float, float]:
        mask, level = self.driver.mask(self.done)
        leaf = mask.detach().to(self.batches.device).requires_grad_()
        fill = self.driver.fill().detach().to(leaf.device).requires_grad_()
        output = self.driver.output().detach().to(leaf.device).requires_grad_()
        self.masks.clear()
        self.outputs.clear()
        with self.precision():
            target = self.targets(batch)
            self.masks.update(self.split(leaf))
            self.fills.update(self._fill(fill))
            self.outputs.update(self._outputs(output, mask))
            outputs = self.model(**batch)
        loss = self.objective.loss(outputs, batch, target)
        value = check_finite(loss, f"at step {self.done}, with {level:.0%} of the model kept")
        grads = torch.autograd.grad(loss, (leaf, fill, output), allow_unused=True, materialize_grads=True)
        self.driver.learn(self.done, *(grad.float().cpu() for grad in grads))
        self.loss.append(value)
        self.level.append(level)
        self.gamma_l1.append([float(part.sum()) for part in self.driver.gamma().abs().split(self.sizes)])
        self.complete = self.done + 1, self.driver.state  # one assignment: Ctrl-C falls before or after it
        return value, level

    def _outputs(self, flat: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Pair name -> (2, d), as the size with this mask has it."""
        thinned = {name for name, part in self.split(mask).items() if not part.all()}
        dense = torch.tensor(LEARNED["output"].dense).to(flat)
        return {
            name: at_sparsity(dense, part, self.driver.gone)
            for name, part in self._output(flat).items()
            if name in thinned
        }

    def _trajectory(self) -> Trajectory:
        return Trajectory(
            np.array(self.loss[: self.done], dtype=np.float32),
            np.array(self.level[: self.done], dtype=np.float32),
            np.array(self.gamma_l1[: self.done], dtype=np.float32).reshape(self.done, len(self.pairs)),
        )

    def checkpoint(self) -> None:
        """Leave everything needed to go on after the last complete step."""
        if self.out is None:
            return
        done, state = self.complete
        parts = {"state": {name: tensor.numpy() for name, tensor in state.items()}, **asdict(self.found)}
        parts["trajectory"] = asdict(self._trajectory())
        write_artifact(self.out, "checkpoint", self._meta(done), to_tensors(parts))

    def _meta(self, step: int | None) -> dict[str, Any]:
        """What a checkpoint is of; ``None`` before the first update."""
        base, config = base_to_json(self.pairs.base), asdict(self.config)
        return {"format": CHECKPOINT_FORMAT, "step": step, "base": base, "config": config, "data": self.data}

    def restore(self) -> None:
        """Go back to the last checkpoint."""
        assert self.out is not None
        meta, tensors = read_artifact(self.out, "checkpoint", CHECKPOINT_FORMAT)
        check_same_search(self.pairs, self.config, meta.get("base"), meta.get("config"), self.out)
        check_same_data(self.batches, meta.get("data"), self.out)
        if meta.get("step") is None:  # it was stopped before the first update
            self.start()
            return
        if self.config.compensates:
            tensors |= read_artifact(self.out, "statistics", CHECKPOINT_FORMAT)[1]
        calibrated = [field.name for field in fields(Calibration)]
        try:
            parts = from_tensors(tensors, ("state", *calibrated, "centre", "covariance", "trajectory"))
            self.found = Calibration(**{name: parts[name] for name in calibrated})
            self.centre, self.covariance = parts["centre"], parts["covariance"]
            self.driver = self._driver({name: torch.from_numpy(array) for name, array in parts["state"].items()})
            step = int(meta["step"])
            if not 0 < step <= self.config.path_steps or len(parts["trajectory"]["loss"]) != step:
                raise ValueError(f"step {step} of {self.config.path_steps}")
            self.complete = step, self.driver.state
            self.loss, self.level, self.gamma_l1 = (
                parts["trajectory"][name].tolist() for name in ("loss", "level", "gamma_l1")
            )
        except (KeyError, ValueError, TypeError) as error:
            raise ArtifactError(f"the checkpoint in {self.out} is not valid: {error!r}. Search again") from error


def _tokens(model: nn.Module, pairs: PairList, batch: Mapping[str, Tensor]) -> int:
    """Length of the sequences that the first attention layer (or MLP) sees: of text, image patches or audio frames."""
    seen: list[int] = []
    pair = next((pair for pair in pairs if pair.kind != "mlp"), pairs[0])
    module = model.get_submodule(pair.mask_slot.module)
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[-2]))
    try:
        with torch.no_grad(), eager(model):
            model(**batch)
    finally:
        handle.remove()
    return seen[0]


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No gradients for weights, no cache of keys and values; both come back afterwards."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        with caching(model, False):
            yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
