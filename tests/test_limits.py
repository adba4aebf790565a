"""Batches that a model cannot read are refused before it runs, with the value, the limit and the remedy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.utils.data import DataLoader

import pathprune as pp
from helpers import VOCAB, tiny_batches, tiny_bert
from pathprune.data.batches import Batches
from pathprune.model.limits import Limits


def changed(**values: Tensor) -> Any:
    return [{**tiny_batches(1)[0], **values}]


def ids(*values: int) -> Tensor:
    return torch.tensor([values] * 4)


SEVEN = ids(5, 6, 7, 8, 9, 10, 11)

BAD: list[tuple[Callable[[], Any], str]] = [
    (
        lambda: [{"input_ids": torch.arange(8)}],
        r"input_ids has shape \(8,\); it needs \(samples, tokens\)\. .*unsqueeze",
    ),
    (
        lambda: changed(input_ids=ids(5, 6, 7, 8, 9, 10, 99)),
        r"input_ids has the value 99; the model knows 0 to 63\. Make the batches with the model's own tokenizer",
    ),
    (lambda: changed(input_ids=ids(5, 6, -1, 8, 9, 10, 11)), r"input_ids has the value -1; the model knows 0 to 63"),
    (lambda: changed(input_ids=ids(5, 6, 7, 8, 9, 10, VOCAB)), r"input_ids has the value 64; the model knows 0 to 63"),
    (
        lambda: [{"input_ids": torch.full((2, 33), 5)}],
        r"input_ids has 33 tokens a sample; the model has positions for 32\. Cut the texts: max_length=32",
    ),
    (lambda: changed(input_ids=SEVEN.float()), r"input_ids has dtype torch\.float32; .* pass input_ids\.long\(\)"),
    (
        lambda: changed(attention_mask=torch.ones(4, 6)),
        r"attention_mask has shape \(4, 6\), input_ids \(4, 7\); .* must have the same",
    ),
    (lambda: changed(attention_mask=torch.ones(3, 7)), r"attention_mask has shape \(3, 7\), input_ids \(4, 7\)"),
    (
        lambda: changed(token_type_ids=SEVEN),
        r"token_type_ids has the value 11; the model knows 0 to 1\. Leave them out where the tokenizer gives none",
    ),
    (lambda: tiny_batches(1)[0], r"data is one batch, a dict; pass a list of batches: \[data\]"),
    (lambda: None, "data is a NoneType; it must be a list of batches or a DataLoader"),
    (lambda: ["a text"], r"a batch is a str; each must be a dict of model inputs, as a tokenizer .* gives them"),
    (
        lambda: [{**tiny_batches(1)[0], "text": ["a", "b"], "label": torch.zeros(4)}],
        r"BertModel does not take label, text; .* Leave out of the batches what the model does not read",
    ),
    (lambda: [{**tiny_batches(1)[0], "position_ids": [0, 1]}], "position_ids is a list; every model input must be"),
]


@pytest.mark.parametrize(("data", "message"), BAD, ids=[message[:20] for _, message in BAD])
def test_what_the_model_cannot_read_is_refused_before_it_runs(data: Callable[[], Any], message: str) -> None:
    for run in (lambda: pp.search(tiny_bert(), data(), steps=3), lambda: list(Batches(tiny_bert(), data()).once())):
        with pytest.raises(pp.DataError, match=message):
            run()


def test_inputs_of_find_pairs_are_checked_alike() -> None:
    with pytest.raises(pp.DataError, match=r"input_ids has the value 99"):
        pp.find_pairs(tiny_bert(), {"input_ids": ids(5, 99)})
    with pytest.raises(pp.DataError, match=r"inputs is a list; it must be a dict of model inputs"):
        pp.find_pairs(tiny_bert(), tiny_batches())  # type: ignore[arg-type]


def test_later_batches_are_checked_too() -> None:
    batches = Batches(tiny_bert(), [*tiny_batches(1), *changed(input_ids=ids(5, 6, 7, 8, 9, 10, 99))])
    with pytest.raises(pp.DataError, match=r"input_ids has the value 99"):
        list(batches.once())


def test_the_last_token_and_the_last_position_are_good() -> None:
    Limits(tiny_bert()).check({"input_ids": torch.full((2, 32), VOCAB - 1)})
    Limits(tiny_bert()).check({"input_ids": torch.zeros(2, 32, dtype=torch.int32)})


@pytest.mark.parametrize(
    ("kind", "settings", "key", "longest"),
    [
        ("Roberta", {"max_position_embeddings": 34, "pad_token_id": 1}, "input_ids", 32),
        ("Bart", {"max_position_embeddings": 32, "encoder_layers": 1, "decoder_layers": 1}, "decoder_input_ids", 32),
        ("GPT2", {"n_positions": 32, "n_embd": 16, "n_layer": 1, "n_head": 2}, "input_ids", 32),
        ("Llama", {"max_position_embeddings": 32, "num_key_value_heads": 2}, "input_ids", None),
    ],
)
def test_positions_are_counted_as_the_model_counts_them(
    kind: str, settings: Any, key: str, longest: int | None
) -> None:
    sizes = {"vocab_size": 40, "hidden_size": 16, "d_model": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    inner = {"intermediate_size": 16, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    config = getattr(transformers, f"{kind}Config")(**sizes, **inner, **settings)
    model = getattr(transformers, f"{kind}Model")(config).eval()
    batch = {name: torch.full((1, longest or 64), 5) for name in {"input_ids", key}}
    model(**batch)
    limits = Limits(model)
    limits.check(batch)
    assert limits.longest.get(key) == longest
    if longest:
        with pytest.raises((IndexError, RuntimeError)):
            model(**{**batch, key: torch.full((1, longest + 1), 5)})
        with pytest.raises(pp.DataError, match=rf"{key} has 33 tokens a sample; the model has positions for 32"):
            limits.check({**batch, key: torch.full((1, longest + 1), 5)})


def test_a_token_that_the_configuration_names_may_lie_beyond_the_table() -> None:
    model = tiny_bert()
    model.config.image_token_id = 99
    Limits(model).check({"input_ids": ids(5, 99)})
    with pytest.raises(pp.DataError, match="the value 98"):
        Limits(model).check({"input_ids": ids(98, 99)})


def test_a_picture_without_a_batch_dimension_is_refused() -> None:
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=8, patch_size=4
    )
    with pytest.raises(pp.DataError, match=r"pixel_values has shape \(3, 8, 8\), one picture .* \.unsqueeze\(0\)"):
        Batches(transformers.ViTModel(config), [{"pixel_values": torch.zeros(3, 8, 8)}])


def test_a_dataset_of_rows_is_refused_and_its_loader_is_read() -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"input_ids": [[5, 6, 7], [8, 9, 10]], "text": ["a", "b"]})
    with pytest.raises(pp.DataError, match=r"data is a Dataset of rows, not of batches; pass .*DataLoader\("):
        Batches(tiny_bert(), rows)
    loader: Any = DataLoader(rows.with_format("torch", columns=["input_ids"]), batch_size=2)
    assert Batches(tiny_bert(), loader).first["input_ids"].tolist() == [[5, 6, 7], [8, 9, 10]]
    unread: Any = DataLoader(rows.with_format("torch"), batch_size=2)
    with pytest.raises(pp.DataError, match=r"BertModel does not take text; .* \(of a dataset, by remove_columns\)"):
        Batches(tiny_bert(), unread)
