"""Files of texts, rows and images as batches."""

from __future__ import annotations

import inspect as signatures
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, Any, get_type_hints

from pathprune.errors import DataError, PathpruneError, SettingError

if TYPE_CHECKING:
    from pathprune.reading import Texts
from pathprune.cli.options import (
    WINDOW,
    BatchOpt,
    DataOpt,
    DeviceOpt,
    FieldOpt,
    LabelFieldOpt,
    LengthOpt,
    MaxBadOpt,
    ObjectiveOpt,
    PrefixOpt,
)
from pathprune.cli.output import say


@dataclass(frozen=True)
class DataOptions:
    """The options of every command that reads data, in the order in which the help shows them."""

    data: DataOpt
    objective: ObjectiveOpt = "auto"
    batch_size: BatchOpt = None
    max_length: LengthOpt = None
    field: FieldOpt = "text"
    prefix: PrefixOpt = None
    label_field: LabelFieldOpt = "label"
    max_bad: MaxBadOpt = 10
    device: DeviceOpt = None


def reads_data(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of ``DataOptions`` in place of its parameter ``source``, which gets them."""
    hints = {**get_type_hints(DataOptions, include_extras=True), **get_type_hints(command, include_extras=True)}
    defaults = signatures.signature(DataOptions).parameters
    parameters = []
    for name, parameter in signatures.signature(command).parameters.items():
        parameters += [*defaults.values()] if name == "source" else [parameter]
    keywords = [p.replace(kind=p.KEYWORD_ONLY, annotation=hints[p.name]) for p in parameters]

    @wraps(command)
    def run(**given: Any) -> None:
        source = DataOptions(**{name: given.pop(name) for name in defaults})
        command(source=source, **given)

    run.__signature__ = signatures.Signature(keywords)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in keywords}
    return run


def read_data(options: DataOptions) -> Texts | None:
    """The texts; ``None`` of a folder of images.

    Raises:
        DataError: there is nothing to read.
    """
    from pathprune.reading import image_files, read_file

    if options.data.is_dir():
        say(f"found {len(image_files(options.data)):,} images in {options.data}")
        return None
    texts = read_file(options.data, options.field)
    say(texts.summary)
    return texts


def make_batches(model: Any, source: str, options: DataOptions, read: Texts | None) -> Iterable[dict[str, Any]]:
    """A folder is images; a file is texts: full windows for a language model, else one padded line each."""
    from transformers import AutoImageProcessor, AutoTokenizer

    from pathprune.data.images import Images
    from pathprune.data.text import packed, tokenized

    data, task, batch_size = options.data, options.objective == "task", options.batch_size
    if task and "labels" not in signatures.signature(model.forward).parameters:
        raise DataError(
            f"--objective task is the model's own loss on labels, and {type(model).__name__} has none; "
            "give a model with its head, or use --objective auto"
        )
    kind: Any = AutoImageProcessor if data.is_dir() else AutoTokenizer
    try:
        reader = kind.from_pretrained(source)
    except (OSError, ValueError) as error:
        what = "a folder, of images," if data.is_dir() else "a file, of texts,"
        raise PathpruneError(f"--data {data} is {what} and {source} has nothing to read them with: {error}") from error
    if read is None:
        labels = _known_labels(model) if task else None
        return Images(data, reader, batch_size=batch_size or 16, max_bad=options.max_bad, labels=labels)
    tokenizer = reader
    texts = _as_served(source, read.texts, tokenizer, options.prefix)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # what stands there is masked
    if model.can_generate() and not model.config.is_encoder_decoder:
        longest = getattr(model.config, "max_position_embeddings", None) or WINDOW
        batches = packed(
            texts, tokenizer, batch_size=batch_size or 4, length=options.max_length or min(WINDOW, longest)
        )
        return [{**batch, "labels": batch["input_ids"]} for batch in batches] if task else batches
    length = _length(model, texts, tokenizer, options.max_length)
    batches = tokenized(texts, tokenizer, batch_size=batch_size or 16, max_length=length)
    if model.can_generate():  # an encoder-decoder writes each text again
        for batch in batches:
            batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    elif task:
        _label(batches, model, options)
    return batches


def _as_served(source: str, texts: list[Any], tokenizer: Any, prefix: str | None) -> list[Any]:
    """Texts as the model's users feed them: with what stands before them, and cut where the folder says."""
    from pathprune.serving import served

    use = served(source, fetch=True)
    if use is not None:
        prefix = use.prefix if prefix is None else prefix
        tokenizer.model_max_length = min(tokenizer.model_max_length, use.max_length or tokenizer.model_max_length)
        named = f" (its prompts: {', '.join(use.prompts)})" if use.prompts else ""
        say(f"as served: pooling {use.pooling}; --prefix {prefix!r}{named}")
    if not isinstance(texts[0], str):
        if prefix:
            raise SettingError(f"--prefix {prefix!r} goes before texts; a conversation begins as its template says")
        return texts
    texts = [(prefix or "") + text for text in texts]
    return [text.lower() for text in texts] if use is not None and use.lower_case else texts


def _length(model: Any, texts: list[str], tokenizer: Any, asked: int | None) -> int:
    """Tokens at which texts are cut: the same rule for every command; says what it comes to."""
    from pathprune.data.text import fitting_length, token_lengths

    positions = getattr(model.config, "max_position_embeddings", None) or math.inf
    if asked and asked > positions:
        raise SettingError(
            f"--max-length {asked} is more than the {positions:,} tokens that {type(model).__name__} reads"
        )
    most = min(512, positions, tokenizer.model_max_length)
    lengths = token_lengths(texts, tokenizer)
    length = asked or fitting_length(lengths, most)
    longer = sum(size > length for size in lengths)
    of = f"the {len(lengths):,} texts" if len(lengths) == len(texts) else f"{len(lengths):,} texts looked at"
    say(f"texts are cut at {length} tokens (--max-length); {longer:,} of {of} {'is' if longer == 1 else 'are'} longer")
    return length


def describe_batches(batches: Any) -> str:
    """What data there is, in words."""
    if not isinstance(batches, list):
        return f"{len(batches.files):,} images, {batches.batch_size} at a time"
    samples = sum(len(batch["input_ids"]) for batch in batches)
    tokens = sum(
        int(batch["attention_mask"].sum()) if "attention_mask" in batch else batch["input_ids"].numel()
        for batch in batches
    )
    longest = max(batch["input_ids"].shape[1] for batch in batches)
    what = "texts" if "attention_mask" in batches[0] else "windows"
    return f"{samples:,} {what} of up to {longest} tokens, {tokens:,} tokens in {len(batches):,} batches"


def _known_labels(model: Any) -> dict[str, int]:
    """Name -> label of a classifier.

    Raises:
        DataError: it is none, or tells no single label.
    """
    config, kind = model.config, type(model).__name__
    if (
        not kind.endswith(("SequenceClassification", "ImageClassification"))
        or config.num_labels < 2
        or config.problem_type not in (None, "single_label_classification")
    ):
        raise DataError(
            f"--objective task reads one label for each text or image, which {kind} does not tell; "
            "from Python, search takes batches with labels of any kind"
        )
    return dict(config.label2id)


def _label(batches: list[dict[str, Any]], model: Any, options: DataOptions) -> None:
    """Put labels into the batches, by the model's names or as whole numbers.

    Raises:
        DataError: the texts have none, or one that the model does not know.
    """
    import torch

    from pathprune.reading import read_file

    known, ids = _known_labels(model), []
    for label in read_file(options.data, options.field, options.label_field).labels or ():
        number = known.get(str(label), int(label) if str(label).isdigit() else -1)
        if not 0 <= number < model.config.num_labels:
            some = ", ".join(str(name)[:40] for name in sorted(known, key=known.__getitem__)[:8]) + (
                ", ..." if len(known) > 8 else ""
            )
            raise DataError(
                f"{options.data}: the label {str(label)[:40]!r} of {options.label_field!r} is none of the model's "
                f"({some})"
            )
        ids.append(number)
    start = 0
    for batch in batches:
        size = len(batch["input_ids"])
        batch["labels"] = torch.tensor(ids[start : start + size])
        start += size
