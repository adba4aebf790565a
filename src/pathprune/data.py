"""Batches of model inputs: made from texts or images, checked before a model sees them, started over when they end."""

from __future__ import annotations

import inspect
import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pathprune.errors import DataError, PathpruneError
from pathprune.limits import Limits
from pathprune.wrapped import inside

Batch = dict[str, Tensor]

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


class Batches:
    """A re-iterable of model-input dicts, endless and on the model's device.

    Args:
        model: whose ``forward`` the keys must fit.
        data: a list, a DataLoader, or anything else that can be iterated again and again.

    Attributes:
        first: the first batch, on the model's device.

    Raises:
        DataError: the data is empty or can be iterated only once, or its first batch is not a
            mapping of tensors that the model takes and can look up.
    """

    def __init__(self, model: nn.Module, data: Iterable[Mapping[str, Tensor]]) -> None:
        if isinstance(data, Mapping):
            raise DataError(f"data is one batch, a {type(data).__name__}; pass a list of batches: [data]")
        if hasattr(data, "column_names") and hasattr(data, "with_format"):  # of the library datasets
            raise DataError(
                f"data is a {type(data).__name__} of rows, not of batches; pass "
                'torch.utils.data.DataLoader(data.with_format("torch", columns=[...]), batch_size=16), the columns '
                "being the model's inputs, with a collate_fn that pads where rows are of several lengths "
                "(transformers.DataCollatorWithPadding)"
            )
        if not isinstance(data, Iterable) and not hasattr(data, "__getitem__"):
            raise DataError(f"data is a {type(data).__name__}; it must be a list of batches or a DataLoader")
        if iter(data) is data:
            raise DataError(
                f"data is a {type(data).__name__}, which can be read only once; pass a list or a DataLoader"
            )
        bare = inside(model)
        self.data = data
        self.device = next(model.parameters()).device
        parameters = inspect.signature(bare.forward).parameters.values()
        self.accepted = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        self.model, self.limits = type(bare).__name__, Limits(bare)
        for batch in data:
            self._check(batch)
            self.first = placed(batch, self.device)
            return
        raise DataError("data is empty: no batch to search or recover on. Pass at least one model-input dict")

    def _check(self, batch: Any) -> None:
        if not isinstance(batch, Mapping):
            raise DataError(
                f"a batch is a {type(batch).__name__}; each must be a dict of model inputs, as a tokenizer or an image "
                "processor gives them"
            )
        if not batch or (unknown := sorted(set(batch) - self.accepted)):
            raise DataError(
                f"{self.model} does not take {', '.join(unknown) if batch else 'an empty batch'}; "
                f"it takes {', '.join(sorted(self.accepted))}. Leave out of the batches what the model does not read "
                "(of a dataset, by remove_columns)"
            )
        if wrong := [key for key, value in batch.items() if not isinstance(value, Tensor)]:
            raise DataError(f"{wrong[0]} is a {type(batch[wrong[0]]).__name__}; every model input must be a tensor")
        for key, value in batch.items():
            if value.is_floating_point() and value.isnan().any():
                raise DataError(f"{key} has values that are not a number; leave such samples out")
            if not value.numel() or (key == "attention_mask" and value.dim() == 2 and not value.any()):
                raise DataError(f"{key} of a batch, of shape {tuple(value.shape)}, has no sample or no real token")
        self.limits.check(batch)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Batches without end."""
        while True:
            empty = True
            for batch in self.once():
                empty = False
                yield batch
            if empty:
                raise DataError("data was empty when it was read again; pass a list or a DataLoader")

    def once(self) -> Iterator[dict[str, Tensor]]:
        """Every batch of the data, one time."""
        for batch in self.data:
            self._check(batch)
            yield placed(batch, self.device)

    def take(self, count: int) -> list[dict[str, Tensor]]:
        """The first ``count`` batches, starting over if there are fewer."""
        return list(islice(self, count))


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


def read_texts(file: str | Path, field: str = "text") -> list[str]:
    """Texts of a file: one a line, or one JSON object a line (``.jsonl``) with the text in ``field``.

    Raises:
        DataError: the file cannot be read, holds no text, or lacks the field.
    """
    path = Path(file)
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        texts = [str(json.loads(line)[field]) for line in lines] if path.suffix == ".jsonl" else lines
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} is not text: {error!r}. It needs one text a line in UTF-8, "
            f"or a .jsonl with {field!r} in each object"
        ) from error
    if not texts:
        raise DataError(f"{path} is empty; it needs one text a line")
    return texts


def tokenized(texts: Sequence[str], tokenizer: Any, *, batch_size: int = 16, max_length: int = 128) -> list[Batch]:
    """Batches of model inputs, each padded to its longest text.

    Args:
        tokenizer: of ``transformers``.
        max_length: in tokens; longer texts are cut.

    Raises:
        DataError: the tokenizer has no padding token, or does not know most of the words.
    """
    if tokenizer.pad_token is None:
        raise DataError("the tokenizer has no padding token; set tokenizer.pad_token = tokenizer.eos_token")
    batches: list[Batch] = [
        dict(
            tokenizer(
                list(texts[start : start + batch_size]),
                truncation=True,
                max_length=max_length,
                padding=True,
                return_tensors="pt",
            )
        )
        for start in range(0, len(texts), batch_size)
    ]
    _check_known([batch["input_ids"][batch["attention_mask"].bool()] for batch in batches], tokenizer)
    return batches


def _check_known(ids: Sequence[Tensor], tokenizer: Any) -> None:
    """Refuse tokens most of which are unknown to the tokenizer.

    Raises:
        DataError: they are.
    """
    unk = tokenizer.unk_token_id
    if not ids or unk is None or unk == tokenizer.eos_token_id:
        return
    every = torch.cat(list(ids))
    words = every[~torch.isin(every, torch.tensor([i for i in tokenizer.all_special_ids if i != unk]))]
    unknown = int((words == unk).sum())
    if unknown > 0.5 * len(words):
        raise DataError(
            f"{unknown:,} of {len(words):,} tokens are unknown to the {type(tokenizer).__name__}: the model's own "
            "tokenizer files are missing, or the texts are in a script that it does not know"
        )


def packed(texts: Iterable[str], tokenizer: Any, *, batch_size: int = 16, length: int = 128) -> list[Batch]:
    """Batches of full windows, for language models: the texts in one row, each closed by the end-of-text token.

    Nothing is padded and no token is wasted, and windows are as long as the text that such a model
    will read, not as its lines. What is left over at the end is dropped.

    Args:
        tokenizer: of ``transformers``.
        length: of a window, in tokens.

    Raises:
        DataError: the texts do not fill one window, or the tokenizer does not know most of the words.
    """
    ids: list[int] = []
    end = tokenizer.eos_token_id
    for text in texts:
        ids += tokenizer(text)["input_ids"]
        if end is not None and ids and ids[-1] != end:
            ids.append(end)
    windows = torch.tensor(ids[: len(ids) // length * length], dtype=torch.long).unflatten(0, (-1, length))
    if not len(windows):
        raise DataError(
            f"the texts have {len(ids)} tokens, less than one window of {length}; pass more or a shorter one"
        )
    _check_known([windows.flatten()], tokenizer)
    return [{"input_ids": part} for part in windows.split(batch_size)]


class Images:
    """Batches of a folder's images, in a fixed shuffled order; read anew at every pass, so they need not fit in memory.

    Args:
        folder: searched with its subfolders.
        processor: an image processor of ``transformers``, which scales and normalises as the model expects.

    Raises:
        DataError: there is no image.
        PathpruneError: Pillow is not installed.
    """

    def __init__(self, folder: str | Path, processor: Any, *, batch_size: int = 16) -> None:
        try:
            import PIL.Image
        except ImportError as error:
            raise PathpruneError("images are read with Pillow, which is not installed; pip install pillow") from error
        self.open = PIL.Image.open
        self.processor, self.batch_size = processor, batch_size
        self.files = sorted(file for file in Path(folder).rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
        if not self.files:
            raise DataError(f"{folder} holds no image; it needs files that end in {', '.join(IMAGE_SUFFIXES)}")
        random.Random(0).shuffle(self.files)  # folders are often sorted by class

    def __iter__(self) -> Iterator[Batch]:
        for start in range(0, len(self.files), self.batch_size):
            images = [self._read(file) for file in self.files[start : start + self.batch_size]]
            yield dict(self.processor(images, return_tensors="pt"))

    def _read(self, file: Path) -> Any:
        try:
            with self.open(file) as image:
                return image.convert("RGB")
        except OSError as error:
            raise DataError(f"cannot read the image {file}: {error}") from error
