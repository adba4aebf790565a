"""Batches from texts and images, and models of images and windows of text from end to end."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers import ViTConfig, ViTImageProcessorPil, ViTModel

import pathprune as pp
from pathprune.data import Images, packed, tokenized
from pathprune.evaluation import fidelity
from pathprune.path import SolutionPath

END = 1


class Letters:
    """A tokenizer: one token a letter."""

    eos_token_id: int | None = END
    unk_token_id: int | None = None

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text]}


@given(st.lists(st.text("abcdef", max_size=9)), st.integers(1, 7), st.integers(1, 4))
def test_packed_windows_are_the_texts_end_to_end(texts: list[str], length: int, batch_size: int) -> None:
    row: list[int] = []
    for text in texts:
        row += map(ord, text)
        row += [END] if row and row[-1] != END else []  # an empty text closes nothing
    if len(row) < length:
        with pytest.raises(pp.DataError, match=f"have {len(row)} tokens, less than one window of {length}"):
            packed(texts, Letters(), length=length, batch_size=batch_size)
        return
    batches = packed(texts, Letters(), length=length, batch_size=batch_size)
    assert all(batch.keys() == {"input_ids"} for batch in batches)
    assert all(len(batch["input_ids"]) == batch_size for batch in batches[:-1])
    windows = torch.cat([batch["input_ids"] for batch in batches])
    assert windows.shape[1] == length
    assert windows.flatten().tolist() == row[: len(row) // length * length]


def test_packed_without_an_end_token() -> None:
    tokenizer = Letters()
    tokenizer.eos_token_id = None
    assert packed(["ab", "cd"], tokenizer, length=2)[0]["input_ids"].tolist() == [[97, 98], [99, 100]]


class Words:
    """A tokenizer: one token a word, of which it knows those in capitals."""

    unk_token_id, eos_token_id, pad_token, all_special_ids = 0, 1, "[PAD]", [0, 1, 2]

    def __call__(self, text: str | list[str], **options: Any) -> dict[str, Any]:
        if isinstance(text, list):
            ids = torch.tensor([self(one)["input_ids"] for one in text])
            return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return {"input_ids": [1, *(9 if word.isupper() else 0 for word in text.split()), 1]}


def test_texts_that_the_tokenizer_does_not_know_are_refused() -> None:
    for words in ("A B c d", "A B C d"):  # half, and less, of the words
        assert len(tokenized([words], Words())) == len(packed([words], Words(), length=3)) == 1
    assert tokenized([], Words()) == []
    with pytest.raises(pp.DataError, match=r"3 of 4 tokens are unknown to the Words: the model's own tokenizer files"):
        tokenized(["A b c d"], Words())
    with pytest.raises(pp.DataError, match=r"2 of 3 tokens are unknown to the Words"):
        packed(["A b c"], Words(), length=5)


def test_a_tokenizer_that_cannot_pad_is_refused() -> None:
    class Bare(Words):
        pad_token = None  # type: ignore[assignment]

    with pytest.raises(pp.DataError, match=r"no padding token; set tokenizer\.pad_token = tokenizer\.eos_token"):
        tokenized(["A"], Bare())


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten pictures of several sizes and formats in two folders, and a file that is none."""
    folder = tmp_path_factory.mktemp("pictures")
    noise = np.random.default_rng(0)
    for i in range(10):
        part = folder / f"class-{i % 2}"
        part.mkdir(exist_ok=True)
        shape = (12, 10 + i) if i == 3 else (12, 10 + i, 3)  # one is grey
        suffix = ".PNG" if i % 3 else ".jpg"
        Image.fromarray(noise.integers(0, 255, shape, dtype=np.uint8)).save(part / f"{i}{suffix}")
    (folder / "notes.txt").write_text("no picture")
    return folder


def processor() -> Any:
    return ViTImageProcessorPil(size={"height": 8, "width": 8})


def test_images_are_read_anew_in_a_fixed_order(pictures: Path) -> None:
    images = Images(pictures, processor(), batch_size=4)
    first, second = list(images), list(images)
    assert [batch["pixel_values"].shape for batch in first] == [(4, 3, 8, 8), (4, 3, 8, 8), (2, 3, 8, 8)]
    assert all(torch.equal(a["pixel_values"], b["pixel_values"]) for a, b in zip(first, second, strict=True))
    assert [file.parent for file in images.files] != sorted(file.parent for file in images.files)
    state = random.getstate()
    Images(pictures, processor())
    assert random.getstate() == state


def test_bad_images_are_refused(pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(pp.DataError, match=r"holds no image; it needs files that end in .bmp"):
        Images(tmp_path, processor())
    (tmp_path / "broken.png").write_text("not a picture")
    with pytest.raises(pp.DataError, match=r"cannot read the image .*broken\.png"):
        list(Images(tmp_path, processor()))


def test_a_missing_pillow_is_no_fault_of_the_data(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(pp.PathpruneError, match=r"Pillow, which is not installed; pip install pillow") as error:
        Images(pictures, None)
    assert not isinstance(error.value, pp.DataError)


def test_an_image_model_goes_all_the_way(pictures: Path) -> None:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 20}
    model = ViTModel(ViTConfig(**shape, image_size=8, patch_size=2, initializer_range=0.3)).eval()
    data = Images(pictures, processor(), batch_size=4)
    path: SolutionPath = pp.search(model, data, steps=8, multiple=1, progress=False)
    assert path.config["objective"] == "embedding"
    assert path.seq_len == 17  # sixteen patches and the class token: what MACs are counted at
    small = pp.slice_model(model, path.select(pp.Budget(keep=0.5)))
    recovered = pp.recover(small, teacher=model, data=data, steps=60, lr=3e-3, progress=False)
    before = 1 - fidelity(small, model, data)
    assert 1 - fidelity(recovered, model, data) < 0.8 * before
