"""Texts as batches of tokens."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pathprune.data.batches import Batch
from pathprune.errors import DataError, PathpruneError, SettingError
from pathprune.reading import IMAGE_SUFFIXES as IMAGE_SUFFIXES
from pathprune.reading import read_texts as read_texts

Text = str | Sequence[Mapping[str, Any]]  # or a conversation: messages with role and content


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
