"""Measure a family: quality against the dense model, size, and latency side by side."""

from __future__ import annotations

import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pathprune.data.batches import Batches
from pathprune.errors import SettingError
from pathprune.family.pair_list import PairList
from pathprune.family.selection import Selection
from pathprune.model.contexts import evaluating
from pathprune.model.outputs import samples
from pathprune.objectives.base import Objective
from pathprune.objectives.choose import get_objective
from pathprune.objectives.targets import Targets
from pathprune.versions import library_versions

FORMAT = 1


def fidelity(
    model: nn.Module,
    teacher: nn.Module | Targets,
    data: Iterable[Mapping[str, Tensor]],
    objective: str | Objective = "auto",
) -> float:
    """One minus the objective's loss against the dense model, averaged over all batches of ``data``.

    For ``embedding``, which ``"auto"`` takes for encoders, this is the mean cosine to the dense embedding.

    Args:
        model: to measure.
        teacher: the dense model, or its remembered outputs where several models are measured on the same data.
        data: re-iterable of model-input dicts.
        objective: by name, or an object; where ``teacher`` is a ``Targets``, its own counts.

    Raises:
        DataError: the data is empty, or does not fit the model or the objective.

    Example:
        >>> small = pp.slice_model(model, path.select(pp.Budget(keep=0.5)))
        >>> 0 < pp.fidelity(small, model, batches) < 1
        True
    """
    return fidelities([model], teacher, data, objective)[0]


def fidelities(
    models: Sequence[nn.Module],
    teacher: nn.Module | Targets,
    data: Iterable[Mapping[str, Tensor]],
    objective: str | Objective = "auto",
) -> list[float]:
    """``fidelity`` of several models, batch by batch, so that the dense model runs once for all."""
    batches = Batches(models[0], data)
    if isinstance(teacher, nn.Module):
        teacher = Targets(teacher, get_objective(objective, teacher, batches.first))
    totals, count = [0.0] * len(models), 0
    with ExitStack() as modes, torch.no_grad():
        for model in (*models, teacher.teacher):
            modes.enter_context(evaluating(model))
        for batch in batches.once():
            target = teacher(batch)
            for i, model in enumerate(models):
                totals[i] += samples(batch) * float(teacher.objective.loss(model(**batch), batch, target))
            count += samples(batch)
    return [1 - total / count for total in totals]


def latency(models: Sequence[nn.Module], batch: Mapping[str, Tensor], *, seconds: float = 2.0) -> list[float]:
    """Median milliseconds of a forward pass of each model, measured in turns.

    Taking turns makes the *ratios* hold on a machine whose speed drifts.

    Args:
        seconds: rough time to spend on each model; every one gets at least five passes.

    Raises:
        SettingError: ``seconds`` is not a finite number, or there is no model.

    Example:
        >>> small = pp.slice_model(model, path.select(pp.Budget(keep=0.5)))
        >>> dense_seconds, small_seconds = pp.latency([model, small], batches[0])
    """
    if not models or not 0 <= seconds < math.inf:
        raise SettingError(f"{len(models)} models for seconds={seconds}: it takes a model and a finite time")
    times: list[list[float]] = [[] for _ in models]
    device = next(iter(batch.values())).device
    with torch.inference_mode(), ExitStack() as modes:
        for model in models:
            modes.enter_context(evaluating(model))
            model(**batch)
        began = time.perf_counter()
        while len(times[0]) < 5 or time.perf_counter() - began < seconds * len(models):
            for model, taken in zip(models, times, strict=True):
                start = time.perf_counter()
                model(**batch)
                if device.type != "cpu":
                    torch.accelerator.synchronize(device)
                taken.append((time.perf_counter() - start) * 1000)
    return [statistics.median(taken) for taken in times]


def bytes_on_disk(folder: str | os.PathLike[str]) -> int:
    """Size of the weight files in a model folder."""
    return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))


def member(name: str, folder: str | None, selection: Selection, size: int) -> dict[str, Any]:
    """One model of a family, as ``family.json`` records it; quality and latency are added as they are measured.

    Args:
        folder: relative to ``family.json``; None for the dense model.
        size: bytes on disk.
    """
    keep = selection.budget.value if selection.budget else 1.0
    return {
        "name": name,
        "folder": folder,
        "keep": keep,
        **selection.to_dict(),
        "bytes_on_disk": size,
        "latency_ms": {},
        "quality": {"before": {}},
    }


def family_record(
    name: str, pairs: PairList, metrics: Mapping[str, Any], members: list[dict[str, Any]], **facts: Any
) -> dict[str, Any]:
    """The content of ``family.json``: what was made, how, where and with what.

    Args:
        metrics: name -> {"label", "text", "dense"}.
        **facts: ``settings``, ``seconds``, ``latency_tokens``.
    """
    return {
        "format": FORMAT,
        "model": {
            "name": name,
            "architecture": pairs.base.architecture,
            "params": pairs.base.params,
            "prunable_params": pairs.prunable_params,
        },
        "metrics": dict(metrics),
        "members": members,
        **facts,
        "machine": machine(),
        "versions": library_versions(),
        "date": date.today().isoformat(),
    }


def peak_memory() -> int:
    """Most bytes that this process has held at once; 0 where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    facts: dict[str, Any] = {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "python": platform.python_version(),
    }
    try:
        info = Path("/proc/cpuinfo").read_text()
        facts["processor"] = next(line.split(":", 1)[1].strip() for line in info.splitlines() if "model name" in line)
        facts["memory_gib"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (OSError, StopIteration, ValueError):
        pass  # not Linux: the portable facts must do
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    return facts
