"""Image files as batches of pixels."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from pathprune.data.batches import Batch
from pathprune.errors import DataError, PathpruneError
from pathprune.reading import IMAGE_SUFFIXES as IMAGE_SUFFIXES
from pathprune.reading import image_files
from pathprune.reading import read_texts as read_texts


class Images:
    """Batches of a folder's images, in a fixed shuffled order; read anew at every pass, so they need not fit in memory.

    An image that cannot be read is left out, with a warning that names it.

    Args:
        folder: searched with its subfolders.
        processor: an image processor of ``transformers``, which scales and normalises as the model expects.
        max_bad: how many images may be left out.
        labels: name of a subfolder -> label of the images in it, for the objective ``task``.

    Attributes:
        bad: the images left out so far, and why.

    Raises:
        DataError: there is no image, more than ``max_bad`` cannot be read, or a subfolder has no label.
        PathpruneError: Pillow is not installed.
    """

    def __init__(
        self,
        folder: str | Path,
        processor: Any,
        *,
        batch_size: int = 16,
        max_bad: int = 10,
        labels: Mapping[str, int] | None = None,
    ) -> None:
        try:
            import PIL.Image
            import PIL.ImageOps
        except ImportError as error:
            raise PathpruneError("images are read with Pillow, which is not installed; pip install pillow") from error
        self.open, self.upright = PIL.Image.open, PIL.ImageOps.exif_transpose
        self.processor, self.batch_size, self.max_bad, self.labels = processor, batch_size, max_bad, labels
        self.files = image_files(folder)
        self.bad: dict[Path, str] = {}
        if labels is not None and (unknown := sorted({file.parent.name for file in self.files} - set(labels))):
            raise DataError(
                f"{folder}: the subfolder {unknown[0]!r} is none of the model's labels "
                f"({_some(sorted(labels, key=labels.__getitem__))}); images are labelled by their subfolders' names"
            )
        random.Random(0).shuffle(self.files)  # folders are often sorted by class

    def __iter__(self) -> Iterator[Batch]:
        images: list[tuple[Path, Any]] = []
        for file in self.files:
            if file not in self.bad and (image := self._read(file)) is not None:
                images.append((file, image))
            if len(images) == self.batch_size:
                yield self._batch(images)
                images = []
        if images:
            yield self._batch(images)
        if len(self.bad) == len(self.files):
            raise DataError(self._refusal())

    def _batch(self, images: list[tuple[Path, Any]]) -> Batch:
        batch: Batch = dict(self.processor([image for _, image in images], return_tensors="pt"))
        if self.labels is not None:
            batch["labels"] = torch.tensor([self.labels[file.parent.name] for file, _ in images])
        return batch

    def _read(self, file: Path) -> Any:
        """The image; None where it cannot be read."""
        try:
            with self.open(file) as image:
                return self.upright(image).convert("RGB")  # as the pipelines of transformers do
        except Exception as error:  # of any kind: Pillow has a reader for each format
            self.bad[file] = str(error).partition(f" {str(file)!r}")[0] or type(error).__name__
        if len(self.bad) > self.max_bad:
            raise DataError(self._refusal())
        warnings.warn(f"cannot read the image {file}: {self.bad[file]}; it is left out", stacklevel=2)
        return None

    def _refusal(self) -> str:
        file, reason = next(iter(self.bad.items()))
        others = f" (and {len(self.bad) - 1} others)" if len(self.bad) > 1 else ""
        return (
            f"cannot read the image {file}{others}: {reason}; of {len(self.files)} images, at most "
            f"max_bad={self.max_bad} may be left out, and not all"
        )


def _some(names: Iterable[Any]) -> str:
    """The first few of them, for an error."""
    first = [str(name)[:40] for name in islice(names, 9)]
    return ", ".join(first[:8]) + (", ..." if len(first) > 8 else "")
