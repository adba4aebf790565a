"""Samples that training holds back, to see whether it helps: chosen by their content.

A sample whose digest is small is held back wherever it turns up, so that a loader which shuffles anew at each pass, or
a text that stands in the data twice, never brings it into training.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice

from torch import Tensor

from pathprune.data.batches import Batch, Batches
from pathprune.errors import DataError
from pathprune.model.outputs import samples
from pathprune.objectives.targets import Targets

SHARE = 10  # one sample in so many is held back,
LEAST = 16  # or so many, where that is at most one in
LARGEST_SHARE = 4


class HeldOut:
    """Divides batches into what is trained on and what is measured on.

    Args:
        batches: of the data.
        read: so many batches are looked through for samples to measure on.
        validation: data to measure on; nothing is held back then.

    Attributes:
        batches: held back, in the rows in which they came.
        samples: in them.

    Raises:
        DataError: there is one sample alone.
    """

    def __init__(self, batches: Batches, read: int, validation: Batches | None = None) -> None:
        self.source, self.limit = batches, ""
        self.batches: list[Batch] = []
        if validation is not None:
            self.batches = list(validation.once())
        else:
            seen = list(islice(batches.once(), read))
            digests = sorted({digest for batch in seen for digest in _digests(batch)})
            if len(digests) < 2:
                raise DataError(
                    "the data is one sample, of which none can be held back to see whether training helps; pass more, "
                    "or data of its own as validation="
                )
            count = max(1, len(digests) // SHARE, min(LEAST, len(digests) // LARGEST_SHARE))
            self.limit = digests[count]
            self.batches = [part for batch in seen if (part := self._part(batch, held=True))]
        self.samples = sum(map(samples, self.batches))

    def training(self) -> Iterator[Batch]:
        """Batches without end, without what is held back."""
        for batch in self.source:
            if part := self._part(batch, held=False):
                yield part

    def _part(self, batch: Batch, *, held: bool) -> Batch | None:
        rows = [row for row, digest in enumerate(_digests(batch)) if (digest < self.limit) == held]
        if not rows:
            return None
        count = samples(batch)
        if len(rows) == count or not _divisible(batch):
            return batch
        return {name: value[rows] if value.shape[:1] == (count,) else value for name, value in batch.items()}


def _divisible(batch: Mapping[str, Tensor]) -> bool:
    """Whether every tensor has a row for each sample, or one row for all."""
    return all(value.dim() == 0 or value.shape[0] in (1, samples(batch)) for value in batch.values())


def _digests(batch: Mapping[str, Tensor]) -> list[str]:
    """A digest of each sample without its padding; one for all where they cannot be told apart."""
    if not _divisible(batch):
        return [Targets.key(batch).hex()]
    parts = {name: value.detach().cpu() for name, value in sorted(batch.items())}
    mask = parts.get("attention_mask")
    rows = []
    for row in range(samples(batch)):
        own = []
        for name, value in parts.items():
            if name == "attention_mask" or value.shape[:1] != (samples(batch),):
                continue
            one = value[row]
            if mask is not None and value.shape == mask.shape:
                one = one[mask[row].bool()]
            elif name == "labels":
                one = one[one != -100]
            own.append(one)
        rows.append(_digest(own))
    return rows


def _digest(tensors: Iterable[Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        whole = tensor.float() if tensor.is_floating_point() else tensor
        digest.update(whole.contiguous().numpy().tobytes())
    return digest.hexdigest()
