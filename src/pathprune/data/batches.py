"""Batches of model inputs: made from texts or images, checked before a model sees them, started over when they end."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

from torch import Tensor, nn

from pathprune.data.checks import placed
from pathprune.errors import DataError
from pathprune.model.limits import Limits
from pathprune.model.wrapped import inside
from pathprune.reading import IMAGE_SUFFIXES as IMAGE_SUFFIXES
from pathprune.reading import read_texts as read_texts

Batch = dict[str, Tensor]


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
