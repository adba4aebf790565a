"""Give a sliced model back what slicing cost it, from unlabelled data and the dense model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

from torch import Tensor, nn

from pathprune.data import Batches
from pathprune.discovery import evaluating
from pathprune.errors import DataError
from pathprune.recovery.closed_form import least_squares
from pathprune.recovery.distill import distill

Method = Literal["closed-form", "distill"]


def recover(
    small: nn.Module,
    *,
    teacher: nn.Module,
    data: Iterable[Mapping[str, Tensor]],
    method: Method = "distill",
    progress: bool | None = None,
    **settings: Any,
) -> nn.Module:
    """A recovered copy of ``small``, of the same shape; ``small`` and ``teacher`` are untouched.

    Args:
        small: sliced from ``teacher``.
        teacher: the dense model.
        data: re-iterable of model-input dicts.
        method: ``"closed-form"`` fits the maps that read thinned axes by least squares, layer by
            layer (``least_squares``); ``"distill"`` trains the weights to imitate the teacher (``distill``).
        progress: show a bar; by default only on a terminal.
        **settings: ``count=`` and ``ridge=`` for the closed form; ``steps=``, ``lr=``,
            ``objective=`` and ``seed=`` for distillation.

    Raises:
        DataError: empty data, wrong keys, a loss that is not finite, or a bad setting.
    """
    functions: dict[str, Callable[..., None]] = {"closed-form": least_squares, "distill": distill}
    if method not in functions:
        raise DataError(f"method={method!r} is not one of {', '.join(functions)}")
    batches = Batches(teacher, data)
    student = copy.deepcopy(small)
    hidden = None if progress is None else not progress
    with evaluating(teacher), evaluating(student):
        try:
            functions[method](student, teacher, batches, hidden=hidden, **settings)
        except TypeError as error:
            if "unexpected keyword" not in str(error):
                raise
            raise DataError(f"unknown setting of method={method!r}: {error}") from error
    return student
