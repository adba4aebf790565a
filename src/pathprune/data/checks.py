"""Batches on their device, and numbers that are finite."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pathprune.errors import DataError
from pathprune.reading import IMAGE_SUFFIXES as IMAGE_SUFFIXES
from pathprune.reading import read_texts as read_texts


def placed(batch: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The batch on a device."""
    return {key: value.to(device) for key, value in batch.items()}


def check_finite(loss: Tensor, where: str) -> float:
    """The loss as a number.

    Raises:
        DataError: it is not finite.
    """
    value = float(loss.detach())
    if not torch.isfinite(loss.detach()):
        raise DataError(
            f"the loss is {value} {where}; check the data for empty or extreme samples, "
            "or load the model in float32 or bfloat16"
        )
    return value


def check_moments(moment: Tensor, what: str) -> None:
    """Refuse activations that are not finite, by their moments.

    Raises:
        DataError: they are not.
    """
    if not torch.isfinite(moment).all():
        raise DataError(f"what {what} computes is not finite; check the data, or load the model in float32")
