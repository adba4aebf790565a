"""Batches of model inputs: made from texts or images, checked before a model sees them, started over when they end."""

from __future__ import annotations

import inspect
import math
import random
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pathprune.errors import DataError, PathpruneError, SettingError
from pathprune.limits import Limits
from pathprune.reading import IMAGE_SUFFIXES as IMAGE_SUFFIXES
from pathprune.reading import image_files
from pathprune.reading import read_texts as read_texts
from pathprune.wrapped import inside

Batch = dict[str, Tensor]
Text = str | Sequence[Mapping[str, Any]]  # or a conversation: messages with role and content


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


def tokenized(
    texts: Sequence[Text], tokenizer: Any, *, batch_size: int = 16, max_length: int = 128, prefix: str = ""
) -> list[Batch]:
    """Batches of model inputs, each padded to its longest text.

    Args:
        texts: all of them texts, or all conversations, which the tokenizer's chat template writes out.
        tokenizer: of ``transformers``; it puts special tokens and padding where the model expects them.
        max_length: in tokens; longer texts are cut.
        prefix: what stands before every text where the model is used (``served``), such as ``"query: "``.

    Raises:
        DataError: the tokenizer has no padding token, or does not know most of the words; a conversation is none, or
            the tokenizer has no chat template.
    """
    if tokenizer.pad_token is None:
        raise DataError("the tokenizer has no padding token; set tokenizer.pad_token = tokenizer.eos_token")
    chat = len(texts) > 0 and not isinstance(texts[0], str)
    options = {"add_special_tokens": False} if chat else {}  # a template writes them all
    rows: list[Any] = list(texts)
    rows = [chat_text(row, tokenizer) for row in rows] if chat else [prefix + row for row in rows]
    batches: list[Batch] = [
        dict(
            tokenizer(
                rows[start : start + batch_size],
                truncation=True,
                max_length=max_length,
                padding=True,
                return_tensors="pt",
                **options,
            )
        )
        for start in range(0, len(rows), batch_size)
    ]
    _check_known([batch["input_ids"][batch["attention_mask"].bool()] for batch in batches], tokenizer)
    return batches


def chat_text(conversation: Sequence[Mapping[str, Any]], tokenizer: Any) -> str:
    """A conversation as the tokenizer's chat template writes it, with every special token; where the user has the last
    word, up to where the model answers.

    Raises:
        DataError: it is no list of messages, or the tokenizer has no chat template.
        PathpruneError: Jinja2 is missing, or too old for transformers.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        raise DataError(f"conversations need a chat template, and the {type(tokenizer).__name__} has none; pass texts")
    if not conversation or not all(
        isinstance(turn, Mapping) and {"role", "content"} <= set(turn) for turn in conversation
    ):
        raise DataError('a conversation is a list of messages, {"role": "user", "content": "..."} each, and not empty')
    asks = conversation[-1]["role"] != "assistant"
    try:
        return str(tokenizer.apply_chat_template(list(conversation), tokenize=False, add_generation_prompt=asks))
    except ImportError as error:  # of Jinja2, which transformers asks for here alone
        raise PathpruneError(str(error)) from error


def token_lengths(texts: Sequence[Text], tokenizer: Any) -> list[int]:
    """Tokens of each of a thousand texts, spread over all, uncut; sorted."""
    some = texts[:: max(1, len(texts) // 1000)]
    sample = [text if isinstance(text, str) else chat_text(text, tokenizer) for text in some]
    return sorted(len(ids) for ids in tokenizer(sample, verbose=False)["input_ids"])


def fitting_length(lengths: Sequence[int], most: int = 512) -> int:
    """The length at which to cut texts so that 95 % of them stay whole: a multiple of 8, where ``most`` allows.

    Args:
        lengths: sorted, of at least one text.
    """
    held = lengths[math.ceil(0.95 * len(lengths)) - 1]
    return min(math.ceil(held / 8) * 8, most)


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


def packed(texts: Iterable[Text], tokenizer: Any, *, batch_size: int = 16, length: int = 128) -> list[Batch]:
    """Batches of full windows, for language models: the texts in one row, each closed by the end-of-text token.

    Nothing is padded, and windows are as long as the text that such a model will read, not as its lines. Every window
    begins as the tokenizer begins a text: one that is cut from the middle of a text gets the tokens which the tokenizer
    puts first (Llama, Gemma, Mistral: one; Qwen, SmolLM2: none), because models that learned with such a token are far
    from themselves without it. What is left over at the end is dropped.

    Args:
        texts: or conversations, which the tokenizer's chat template writes out and closes.
        tokenizer: of ``transformers``.
        length: of a window, in tokens.

    Raises:
        SettingError: a window holds no more than what the tokenizer puts first.
        DataError: the texts do not fill one window, or the tokenizer does not know most of the words; a conversation
            is none, or the tokenizer has no chat template.
    """
    begin = first_tokens(tokenizer)
    if length <= len(begin):
        raise SettingError(f"length={length} leaves no room for text: {len(begin)} tokens stand first in every window")
    end, count = tokenizer.eos_token_id, 0
    rows: list[list[int]] = []
    row: list[int] = []
    for text in texts:
        if isinstance(text, str):
            ids = list(tokenizer(text)["input_ids"])
            if end is not None and ids and ids[-1] != end:
                ids.append(end)
        else:
            ids = list(tokenizer(chat_text(text, tokenizer), add_special_tokens=False)["input_ids"])
        count, at = count + len(ids), 0
        while at < len(ids):
            if at and not row:
                row = list(begin)
            part = ids[at : at + length - len(row)]
            row, at = row + part, at + len(part)
            if len(row) == length:
                rows.append(row)
                row = []
    if not rows:
        raise DataError(f"the texts have {count} tokens, less than one window of {length}; pass more or a shorter one")
    windows = torch.tensor(rows, dtype=torch.long)
    _check_known([windows.flatten()], tokenizer)
    return [{"input_ids": part} for part in windows.split(batch_size)]


def first_tokens(tokenizer: Any) -> list[int]:
    """What a tokenizer puts before a text, such as a token for its beginning; empty for many."""
    text = "a b"
    plain, whole = (tokenizer(text, **options)["input_ids"] for options in ({"add_special_tokens": False}, {}))
    places = range(len(whole) - len(plain) + 1)  # of the text in the whole; some tokenizers close it, too
    place = min(places, key=lambda i: sum(a != b for a, b in zip(whole[i:], plain, strict=False)))
    return list(whole[:place])


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
