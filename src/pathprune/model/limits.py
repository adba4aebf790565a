"""What a model can be given: the sizes of the tables in which it looks up tokens and their places."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pathprune.errors import DataError

LOOKED_UP = ("input_ids", "decoder_input_ids", "token_type_ids")
POSITIONS = ("position_embeddings", "position_embedding", "embed_positions", "wpe")
REMEDIES = {
    "input_ids": "make the batches with the model's own tokenizer",
    "decoder_input_ids": "make the batches with the model's own tokenizer",
    "token_type_ids": "leave them out where the tokenizer gives none",
}


class Limits:
    """Found once in a model; ``check`` then costs a maximum and a minimum a batch.

    Attributes:
        tables: model input -> rows of the table in which it is looked up.
        beyond: ids that the model replaces before it looks (of images, mostly).
        longest: model input -> most tokens that its table of positions allows, where it has one.
    """

    def __init__(self, model: nn.Module) -> None:
        config: Any = getattr(model, "config", None)
        self.tables: dict[str, int] = {}
        self.longest: dict[str, int] = {}
        self.beyond = set(_special(config.to_dict())) if hasattr(config, "to_dict") else set()
        readers: dict[str, Any] = {"input_ids": model}
        if getattr(config, "is_encoder_decoder", False):
            both: Any = model
            readers["decoder_input_ids"] = both.get_decoder()
        for key, reader in readers.items():
            if (words := _words(reader)) is None:
                continue
            self.tables[key] = words.num_embeddings
            for parent in model.modules():
                children = {name: child for name, child in parent.named_children() if isinstance(child, nn.Embedding)}
                if not any(child.weight is words.weight for child in children.values()):
                    continue
                for name, child in children.items():
                    if name == "token_type_embeddings":
                        self.tables["token_type_ids"] = child.num_embeddings
                    elif name in POSITIONS and not hasattr(child, "make_weight"):  # which makes more of them
                        before = 0 if child.padding_idx is None else child.padding_idx + 1  # as RoBERTa counts
                        self.longest[key] = child.num_embeddings - getattr(child, "offset", before)

    def check(self, batch: Mapping[str, Tensor]) -> None:
        """Refuse a batch that the model's tables cannot serve, or whose shapes do not meet.

        Raises:
            DataError: it is such a one; the message has the value and the limit.
        """
        for key in LOOKED_UP:
            if key in batch:
                self._check_ids(key, batch[key])
        for key, longest in self.longest.items():
            if key in batch and "position_ids" not in batch and (length := batch[key].shape[-1]) > longest:
                raise DataError(
                    f"{key} has {length} tokens a sample; the model has positions for {longest}. "
                    f"Cut the texts: max_length={longest}"
                )
        ids, mask = batch.get("input_ids"), batch.get("attention_mask")
        if ids is not None and mask is not None and ids.dim() == mask.dim() == 2 and mask.shape != ids.shape:
            raise DataError(
                f"attention_mask has shape {tuple(mask.shape)}, input_ids {tuple(ids.shape)}; a mask of "
                "(samples, tokens) must have the same"
            )
        pixels = batch.get("pixel_values")
        if pixels is not None and len(batch) == 1 and pixels.dim() == 3 and pixels.shape[0] in (1, 3):
            raise DataError(
                f"pixel_values has shape {tuple(pixels.shape)}, one picture without a batch dimension; "
                "stack several, or add the dimension by .unsqueeze(0)"
            )

    def _check_ids(self, key: str, ids: Tensor) -> None:
        limit = self.tables.get(key)
        if limit is None:  # whatever else a model takes under that name
            return
        if ids.dtype not in (torch.int64, torch.int32):
            raise DataError(f"{key} has dtype {ids.dtype}; numbers of tokens are integers: pass {key}.long()")
        if ids.dim() < 2:
            raise DataError(
                f"{key} has shape {tuple(ids.shape)}; it needs (samples, tokens). Batch the rows with a DataLoader, "
                "or add the dimension by .unsqueeze(0)"
            )
        for value in (int(ids.min()), int(ids.max())):
            if not 0 <= value < limit and (wrong := sorted(set(ids.unique().tolist()) - self.beyond - {*range(limit)})):
                raise DataError(
                    f"{key} has the value {wrong[-1]}; the model knows 0 to {limit - 1}. {REMEDIES[key].capitalize()}"
                )


def _words(model: nn.Module) -> nn.Embedding | None:
    """The table of a model's tokens; of several towers, the text's."""
    tower: Any = getattr(model, "text_model", model)
    try:
        words = getattr(tower, "get_input_embeddings", lambda: None)()
    except NotImplementedError:
        return None
    return words if isinstance(words, nn.Embedding) else None


def _special(config: Mapping[str, Any]) -> Iterator[int]:
    """Ids of tokens that a configuration names, its parts' among them."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _special(value)
        elif str(key).endswith(("_token_id", "_token_index")):
            yield from (number for number in (value if isinstance(value, list) else [value]) if isinstance(number, int))
