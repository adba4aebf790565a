"""What an unfinished search leaves on disk, and whether another may go on with it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pathprune.errors import ArtifactError, MismatchError
from pathprune.family.artifact import from_tensors, read_artifact, remove_artifact, to_tensors, write_artifact
from pathprune.family.pair_list import PairList
from pathprune.family.path import SolutionPath
from pathprune.family.serialise import base_to_json
from pathprune.family.trajectory import Trajectory
from pathprune.ranking.basis import Calibration
from pathprune.ranking.config import SearchConfig
from pathprune.ranking.problem import Problem
from pathprune.ranking.statistics import Statistics

CHECKPOINT_FORMAT = 1


class Row(NamedTuple):
    """One step of a trajectory."""

    loss: float
    density: float
    gamma_l1: list[float]


class Progress(NamedTuple):
    """How far a search is: its driver's state after the latest step, and a row for each step."""

    state: dict[str, Tensor]
    rows: tuple[Row, ...] = ()

    def trajectory(self, pairs: int) -> Trajectory:
        return Trajectory(
            np.array([row.loss for row in self.rows], dtype=np.float32),
            np.array([row.density for row in self.rows], dtype=np.float32),
            np.array([row.gamma_l1 for row in self.rows], dtype=np.float32).reshape(len(self.rows), pairs),
        )


def write_beginning(out: Path, problem: Problem) -> None:
    """Before the first update: which search it is that was begun."""
    write_artifact(out, "checkpoint", _description(problem, None), {})


def write_statistics(out: Path, statistics: Statistics) -> None:
    """What is large and never changes: once."""
    tensors = to_tensors({"centre": statistics.centre, "covariance": statistics.covariance})
    write_artifact(out, "statistics", {"format": CHECKPOINT_FORMAT}, tensors)


def write_checkpoint(out: Path, problem: Problem, statistics: Statistics, progress: Progress) -> None:
    """All that is needed to go on after the latest step."""
    state = {name: tensor.numpy() for name, tensor in progress.state.items()}
    parts = {"state": state, **asdict(statistics.calibration)}
    parts["trajectory"] = asdict(progress.trajectory(len(problem.pairs)))
    write_artifact(out, "checkpoint", _description(problem, len(progress.rows)), to_tensors(parts))


def _description(problem: Problem, step: int | None) -> dict[str, Any]:
    """What a checkpoint is of; ``None`` before the first update."""
    base, config = base_to_json(problem.pairs.base), asdict(problem.config)
    return {"format": CHECKPOINT_FORMAT, "step": step, "base": base, "config": config, "data": problem.data}


def read_checkpoint(out: Path, problem: Problem) -> tuple[Statistics, Progress] | None:
    """What ``write_checkpoint`` left; nothing where the search was stopped before the first update.

    Raises:
        MismatchError: it is of another search.
        ArtifactError: there is none, or it is not valid.
    """
    meta, tensors = read_artifact(out, "checkpoint", CHECKPOINT_FORMAT)
    check_same_search(problem.pairs, problem.config, meta.get("base"), meta.get("config"), out)
    check_same_data(problem.data, meta.get("data"), out)
    if meta.get("step") is None:
        return None
    if problem.config.compensates:
        tensors |= read_artifact(out, "statistics", CHECKPOINT_FORMAT)[1]
    try:
        return _parsed(problem, int(meta["step"]), tensors)
    except (KeyError, ValueError, TypeError) as error:
        raise ArtifactError(f"the checkpoint in {out} is not valid: {error!r}. Search again") from error


def _parsed(problem: Problem, step: int, tensors: Mapping[str, Any]) -> tuple[Statistics, Progress]:
    calibrated = [field.name for field in fields(Calibration)]
    parts = from_tensors(tensors, ("state", *calibrated, "centre", "covariance", "trajectory"))
    steps = [parts["trajectory"][name].tolist() for name in ("loss", "level", "gamma_l1")]
    if not 0 < step <= problem.config.path_steps or {step} != set(map(len, steps)):
        raise ValueError(f"step {step} of {problem.config.path_steps}")
    calibration = Calibration(**{name: parts[name] for name in calibrated})
    return (
        Statistics(problem.units, calibration, parts["centre"], parts["covariance"]),
        Progress(
            {name: torch.from_numpy(array) for name, array in parts["state"].items()},
            tuple(map(Row, *steps)),
        ),
    )


def finished_path(out: Path, problem: Problem) -> SolutionPath:
    """The path of a search that had finished.

    Raises:
        MismatchError: it is of another search.
        ArtifactError: there is none.
    """
    path = SolutionPath.load(out)
    check_same_search(problem.pairs, problem.config, base_to_json(path.pairs.base), path.config, out)
    check_same_data(problem.data, path.config.get("data"), out)
    remove_checkpoint(out)  # where it was stopped between its last two lines
    return path


RESUMING = {"a finished path": "load it", "an unfinished search": "go on with it"}


def held_search(out: str | os.PathLike[str]) -> str | None:
    """What a folder holds that another search would replace, a key of ``RESUMING``."""
    if (Path(out) / "checkpoint.json").exists():
        return "an unfinished search"
    return "a finished path" if (Path(out) / "path.json").exists() else None


def remove_checkpoint(out: Path) -> None:
    """Of a search that is finished; what cannot be deleted wastes space, and may be resumed to the same end."""
    with suppress(OSError):
        remove_artifact(out, "checkpoint")
        remove_artifact(out, "statistics")


def check_same_search(pairs: PairList, config: SearchConfig, base: Any, settings: Any, out: object) -> None:
    ours = base_to_json(pairs.base)
    if not isinstance(base, dict) or not base or any(ours.get(key) != value for key, value in base.items()):
        raise MismatchError(f"the search in {out} is of another model; resume with the model that it was begun with")
    mine = asdict(config)
    theirs = settings if isinstance(settings, dict) else {}
    if changed := [f"{key}={theirs.get(key)!r}, now {mine[key]!r}" for key in mine if theirs.get(key) != mine[key]]:
        raise MismatchError(
            f"the search in {out} was begun with {'; '.join(changed)}. Resume with the same settings, or search anew"
        )


def check_same_data(ours: dict[str, Any], theirs: Any, out: object) -> None:
    """Refuse other data than a search was begun with; files of earlier releases do not say which that was."""
    if not isinstance(theirs, dict):
        return
    counts = theirs.get("batches"), ours["batches"]
    if theirs.get("first") != ours["first"]:
        what = "another first batch"
    elif None not in counts and counts[0] != counts[1]:
        what = f"{counts[0]} batches, now {counts[1]}"
    else:
        return
    raise MismatchError(
        f"the search in {out} was begun with other data: {what}. Resume with the same batches in the same order, "
        "or search anew"
    )
