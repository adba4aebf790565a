"""The search: one run over the data that ranks every unit of a model."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from pathprune.errors import ArtifactError, SettingError
from pathprune.family.artifact import named_folder
from pathprune.family.order import Unit
from pathprune.family.path import SolutionPath
from pathprune.objectives.base import Objective
from pathprune.progress import track
from pathprune.ranking.checkpoint import RESUMING, finished_path, held_search
from pathprune.ranking.config import FEW_STEPS, SearchConfig, known_settings
from pathprune.ranking.stepping import Search

CHECKPOINT_EVERY = 50  # steps


@known_settings
def search(
    model: nn.Module,
    data: Iterable[Mapping[str, Tensor]],
    *,
    objective: str | Objective = SearchConfig.objective,
    dynamics: str = SearchConfig.dynamics,
    steps: int = SearchConfig.steps,
    seed: int = SearchConfig.seed,
    unit: Unit = SearchConfig.unit,
    multiple: int = SearchConfig.multiple,
    basis: bool = SearchConfig.basis,
    fill: bool = SearchConfig.fill,
    compensate: bool = SearchConfig.compensate,
    lr: float = SearchConfig.lr,
    fill_lr: float = SearchConfig.fill_lr,
    slope_lr: float = SearchConfig.slope_lr,
    output_lr: float | None = SearchConfig.output_lr,
    temperature: float = SearchConfig.temperature,
    lowest_level: float = SearchConfig.lowest_level,
    bf16: bool = SearchConfig.bf16,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool | None = None,
) -> SolutionPath:
    """Rank every unit of ``model`` in one run over data, which needs no labels.

    The weights stay frozen, and the model is as it was when the search returns or fails. With
    ``out``, the search leaves a checkpoint there every 50 steps and on Ctrl-C, from which
    ``resume=True`` goes on, and in the end the path. To step a search yourself, see ``pathprune.Search``.

    Args:
        model: dense, on the device to search on.
        data: re-iterable of model-input dicts, each one batch; started over when it ends.
        objective: ``"auto"`` (by what the model returns, ``pathprune.objectives.choose.auto``), ``"embedding"``,
            ``"hidden"``, ``"logits"``, ``"task"`` (labelled batches), or an object with the methods of ``Objective``.
        dynamics: ``"sampled"`` (default), ``"lbi"`` (the paper's text, with nu from curvature),
            ``"spp-released"`` (the paper's published code), or a registered one.
        steps: forward-backward passes in all.
        seed: of everything random.
        unit, multiple, basis, fill, compensate, lr, fill_lr, slope_lr, output_lr, temperature, lowest_level, bf16: see
            ``pathprune.ranking.config.SearchConfig``.
        out: folder for the path and checkpoints.
        resume: go on from the checkpoint in ``out``; model and settings must be the same. A
            search that had finished is loaded.
        overwrite: search anew where ``out`` holds a search, finished or not. A path that is there stays until the new
            one replaces it.
        progress: show a bar, or lines where there is no terminal; by default a bar on a terminal and nothing elsewhere.

    Raises:
        UnsupportedModelError: no pair could be proved.
        SettingError: a setting that does not exist, or whose value is out of range.
        DataError: empty data, wrong keys, or a loss that is not finite.
        MismatchError: ``resume`` with another model, other settings or other data.
        ArtifactError: ``out`` cannot be written, holds nothing to resume, or a search that is not to be overwritten.

    Example:
        >>> path = pp.search(model, batches, steps=100, progress=False)
        >>> path.select(pp.Budget(keep=0.5)).fraction <= 0.5
        True
    """
    config = SearchConfig(
        dynamics=dynamics,
        steps=steps,
        seed=seed,
        unit=unit,
        multiple=multiple,
        basis=basis,
        fill=fill,
        compensate=compensate,
        lr=lr,
        fill_lr=fill_lr,
        slope_lr=slope_lr,
        output_lr=output_lr,
        temperature=temperature,
        lowest_level=lowest_level,
        bf16=bf16,
    )
    if steps < FEW_STEPS:
        warnings.warn(
            f"steps={steps} is few: {config.curvature_steps} measure curvature, and {config.path_steps} find the path. "
            "That tries a set-up; for a path to use, take 100 at the least (by default it is 400)",
            stacklevel=3,  # past ``known_settings``
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
    run = Search(model, data, config, objective=objective, out=out, progress=progress)
    if resume and run.out is not None and not (run.out / "checkpoint.json").exists():
        return finished_path(run.out, run.problem)
    with run:
        if resume:
            run.resume()
        else:
            run.start()
        _finish(run, progress)
    return run.path() if run.out is None else run.save()


def _finish(run: Search, progress: bool | None) -> None:
    """Do the steps that are left, leaving checkpoints."""
    total = run.steps_done + run.steps_left
    bar = track(total=total, initial=run.steps_done, desc="search", unit="step", progress=progress)
    try:
        with bar:
            while run.steps_left:
                seen = run.step()
                bar.set_postfix(loss=f"{seen.loss:.4f}", keep=f"{seen.density:.2f}", refresh=False)
                bar.update()
                if run.out is not None and run.steps_done % CHECKPOINT_EVERY == 0:
                    run.checkpoint()
    except KeyboardInterrupt:
        if run.out is not None:
            run.checkpoint()
        raise
