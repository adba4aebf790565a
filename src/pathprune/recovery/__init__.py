"""Give a sliced model back what slicing cost it, from unlabelled data and the dense model."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from torch import Tensor, nn

from pathprune.data import Batches
from pathprune.errors import DataError, MismatchError
from pathprune.modes import evaluating
from pathprune.objectives import Targets
from pathprune.recovery.closed_form import least_squares
from pathprune.recovery.distill import distill

Method = Literal["closed-form", "distill"]


def recover(
    small: nn.Module,
    *,
    teacher: nn.Module | Targets,
    data: Iterable[Mapping[str, Tensor]],
    method: Method = "distill",
    progress: bool | None = None,
    **settings: Any,
) -> nn.Module:
    """A recovered copy of ``small``, of the same shape; ``small`` and ``teacher`` are untouched.

    Args:
        small: sliced from ``teacher``.
        teacher: the dense model; or its remembered outputs, where several sizes are distilled on the same data.
        data: re-iterable of model-input dicts.
        method: ``"closed-form"`` fits the maps that read thinned axes by least squares, layer by
            layer (``least_squares``); ``"distill"`` trains the weights to imitate the teacher (``distill``).
        progress: show a bar; by default only on a terminal.
        **settings: ``count=`` and ``ridge=`` for the closed form; ``steps=``, ``lr=``,
            ``objective=`` and ``seed=`` for distillation.

    Raises:
        MismatchError: ``small`` was not sliced from a model like ``teacher``.
        DataError: empty data, wrong keys, a loss that is not finite, or a bad setting.
    """
    if method not in ("closed-form", "distill"):
        raise DataError(f"method={method!r} is not one of closed-form, distill")
    dense = teacher.teacher if isinstance(teacher, Targets) else teacher
    _check_sliced(small, dense)
    batches = Batches(dense, data)
    student = copy.deepcopy(small)
    hidden = None if progress is None else not progress
    with evaluating(dense), evaluating(student):
        try:
            if method == "distill":
                distill(student, teacher, batches, hidden=hidden, **settings)
            else:
                least_squares(student, dense, batches, hidden=hidden, **settings)
        except TypeError as error:
            if "unexpected keyword" not in str(error):
                raise
            raise DataError(f"unknown setting of method={method!r}: {error}") from error
    return student


def _check_sliced(small: nn.Module, teacher: nn.Module) -> None:
    large = dict(teacher.named_parameters())
    ours = dict(small.named_parameters())
    biases = {name for name in set(ours) - set(large) if name.endswith(".bias")}  # slicing adds some, for fills
    fits = set(ours) - biases == set(large) and all(
        a <= b for name in large for a, b in zip(ours[name].shape, large[name].shape, strict=True)
    )
    if not fits or sum(p.numel() for p in ours.values()) >= sum(p.numel() for p in large.values()):
        raise MismatchError(
            f"the {type(small).__name__} to recover was not sliced from the {type(teacher).__name__} given as teacher; "
            "pass the dense model that it was cut from"
        )
