"""Batches of model inputs: checked before a model sees them, and started over when they end."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pathprune.errors import DataError

Batch = dict[str, Tensor]


class Batches:
    """A re-iterable of model-input dicts, endless and on the model's device.

    Args:
        model: whose ``forward`` the keys must fit.
        data: a list, a DataLoader, or anything else that can be iterated again and again.

    Raises:
        DataError: the data is empty or can be iterated only once, or its first batch is not a
            mapping of tensors that the model takes.
    """

    def __init__(self, model: nn.Module, data: Iterable[Mapping[str, Tensor]]) -> None:
        if iter(data) is data:
            raise DataError(
                f"data is a {type(data).__name__}, which can be read only once; pass a list or a DataLoader"
            )
        self.data = data
        self.device = next(model.parameters()).device
        parameters = inspect.signature(model.forward).parameters.values()
        self.accepted = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        self.model = type(model).__name__
        for batch in data:
            self._check(batch)
            self.first = batch
            return
        raise DataError("data is empty: no batch to search or recover on. Pass at least one model-input dict")

    def _check(self, batch: Any) -> None:
        if not isinstance(batch, Mapping):
            raise DataError(f"a batch is a {type(batch).__name__}; each must be a dict of model inputs")
        if not batch or (unknown := sorted(set(batch) - self.accepted)):
            raise DataError(
                f"{self.model} does not take {', '.join(unknown) if batch else 'an empty batch'}; "
                f"it takes {', '.join(sorted(self.accepted))}"
            )
        if wrong := [key for key, value in batch.items() if not isinstance(value, Tensor)]:
            raise DataError(f"{wrong[0]} is a {type(batch[wrong[0]]).__name__}; every model input must be a tensor")

    @property
    def seq_len(self) -> int:
        """Length of the first batch's sequences, in tokens; 1 where they have none."""
        ids = self.first.get("input_ids")
        return int(ids.shape[1]) if ids is not None and ids.dim() > 1 else 1

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
            yield {key: value.to(self.device) for key, value in batch.items()}

    def take(self, count: int) -> list[dict[str, Tensor]]:
        """The first ``count`` batches, starting over if there are fewer."""
        return list(islice(self, count))


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
    """
    return [
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
