"""Batches from texts and images, and models of images and windows of text from end to end."""

from __future__ import annotations

import json
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
from pathprune.data.images import Images
from pathprune.data.text import first_tokens, fitting_length, packed, token_lengths, tokenized
from pathprune.errors import SettingError
from pathprune.evaluation import fidelity
from pathprune.family.path import SolutionPath
from pathprune.reading import read_file, read_texts

END = 1


class Letters:
    """A tokenizer: one token a letter, between what it puts first and last."""

    eos_token_id: int | None = END
    unk_token_id: int | None = None

    def __init__(self, first: list[int] | None = None, last: list[int] | None = None) -> None:
        self.first, self.last = first or [], last or []

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        first, last = (self.first, self.last) if add_special_tokens else ([], [])
        return {"input_ids": [*first, *map(ord, text), *last]}


SPECIAL = st.lists(st.sampled_from([END, 2, 3]), max_size=2)  # some models begin a text with the token that ends it


@given(st.lists(st.text("abcdef", max_size=9)), st.integers(1, 7), st.integers(1, 4), SPECIAL, SPECIAL)
def test_packed_windows_begin_as_a_text_and_hold_the_texts_end_to_end(
    texts: list[str], length: int, batch_size: int, first: list[int], last: list[int]
) -> None:
    def call() -> list[dict[str, torch.Tensor]]:
        return packed(texts, Letters(first, last), length=length, batch_size=batch_size)

    if length <= len(first):
        with pytest.raises(SettingError, match=f"length={length} leaves no room for text: {len(first)} tokens stand"):
            call()
        return
    row: list[int] = []
    starts: set[int] = set()
    for text in texts:
        starts.add(len(row))
        ids = [*first, *map(ord, text), *last]
        row += ids + ([END] if ids and ids[-1] != END else [])  # an empty text closes nothing
    if len(row) < length:
        with pytest.raises(pp.DataError, match=f"have {len(row)} tokens, less than one window of {length}"):
            call()
        return
    batches = call()
    assert all(batch.keys() == {"input_ids"} for batch in batches)
    assert all(len(batch["input_ids"]) == batch_size for batch in batches[:-1])
    windows = torch.cat([batch["input_ids"] for batch in batches])
    assert windows.shape[1] == length
    at = 0
    for window in windows.tolist():
        assert window[: len(first)] == first
        held = window if at in starts else window[len(first) :]
        assert held == row[at : at + len(held)]
        at += len(held)
    assert len(row) - at < length  # nothing else is dropped


@pytest.mark.parametrize("first", [[], [END], [2, 3]])
def test_packed_is_a_cut_of_one_row_where_nothing_stands_first(first: list[int]) -> None:
    assert first_tokens(Letters(first)) == first_tokens(Letters(first, [4])) == first
    windows = packed(["abcde", "f"], Letters(first), length=4)[0]["input_ids"].tolist()
    assert windows[0] == [*first, *map(ord, "abcde")][:4]
    assert all(window[: len(first)] == first for window in windows)
    if not first:
        assert windows == [[97, 98, 99, 100], [101, END, 102, END]]


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
    with (
        pytest.warns(UserWarning, match="it is left out"),
        pytest.raises(pp.DataError, match=r"cannot read the image .*broken\.png: cannot identify image file; of 1"),
    ):
        list(Images(tmp_path, processor()))


def test_some_corrupt_images_are_left_out_and_named(pictures: Path, tmp_path: Path) -> None:
    for i, file in enumerate(Images(pictures, processor()).files):
        content = file.read_bytes()
        (tmp_path / f"{i}{file.suffix}").write_bytes(content[: len(content) // 2] if i in (2, 5) else content)
    images = Images(tmp_path, processor(), batch_size=4, max_bad=2)
    with pytest.warns(UserWarning, match=r"cannot read the image .*/[25]\.(jpg|PNG): .*; it is left out") as warned:
        first = list(images)
    assert len(warned) == 2
    assert [len(batch["pixel_values"]) for batch in first] == [4, 4]
    assert {file.stem for file in images.bad} == {"2", "5"}
    again = list(images)  # without a word
    assert all(torch.equal(a["pixel_values"], b["pixel_values"]) for a, b in zip(first, again, strict=True))
    with (
        pytest.warns(UserWarning, match="it is left out"),
        pytest.raises(pp.DataError, match=r"\(and 1 others\).*; of 10 images, at most max_bad=1 may be left out"),
    ):
        list(Images(tmp_path, processor(), max_bad=1))


def test_subfolders_are_labels(pictures: Path) -> None:
    images = Images(pictures, processor(), batch_size=4, labels={"class-0": 1, "class-1": 0})
    labels = torch.cat([batch["labels"] for batch in images])
    assert labels.tolist() == [1 - int(file.parent.name[-1]) for file in images.files]
    with pytest.raises(pp.DataError, match=r"subfolder 'class-1' is none of the model's labels \(class-0, cat\)"):
        Images(pictures, processor(), labels={"class-0": 0, "cat": 1})


ROWS = [(1, "sport", "hello"), (2, "tech", 'a "b", c\nd'), (3, "sport", "  "), (4, "tech", "naïve")]
TEXTS = ["hello", 'a "b", c\nd', "naïve"]


@pytest.mark.parametrize(
    ("name", "content", "where"),
    [
        (
            "t.csv",
            'id,label,text\r\n1,sport,hello\r\n2,tech,"a ""b"", c\nd"\r\n3,sport,  \r\n4,tech,naïve\r\n',
            "column",
        ),
        ("t.csv", '\ufeffid;label; text\n1;sport;hello\n2;tech;"a ""b"", c\nd"\n\n3;x;\n4;tech;naïve', "column"),
        ("t.tsv", 'id\tlabel\ttext\n1\tsport\thello\n2\ttech\t"a ""b"", c\nd"\n3\tx\t\n4\ttech\tnaïve\n', "column"),
        ("t.json", json.dumps([dict(zip(("id", "label", "text"), row, strict=True)) for row in ROWS]), "field"),
        (
            "t.json",
            "\n".join(json.dumps({"label": b, "text": c}) for _, b, c in ROWS),
            "field",
        ),  # as datasets writes it
        ("t.jsonl", "\n".join(json.dumps({"label": b, "text": c}) for _, b, c in ROWS) + "\n\n", "field"),
    ],
)
def test_texts_and_labels_are_read_by_what_the_file_is(tmp_path: Path, name: str, content: str, where: str) -> None:
    file = tmp_path / name
    file.write_text(content, encoding="utf-8", newline="")
    found = read_file(file, label_field="label")
    assert found.texts == read_texts(file) == TEXTS
    assert found.labels == ["sport", "tech", "tech"]
    assert found.summary == f"read 3 texts from {name}, {where} 'text', labels from 'label' (1 empty one left out)"


@pytest.mark.parametrize(
    ("name", "content", "texts", "summary"),
    [
        ("t.txt", "a\r\n\r\n{b}\n", ["a", "{b}"], "read 2 texts from t.txt, one a line (1 empty one left out)"),
        ("t", "[1] a footnote\n", ["[1] a footnote"], "read 1 text from t, one a line"),
        (
            "t.json",
            '["a b", "", null, "c"]',
            ["a b", "c"],
            "read 2 texts from t.json, a string each (2 empty ones left out)",
        ),
        ("t.jsonl", '"a\u2028b"\n"c"', ["a\u2028b", "c"], "read 2 texts from t.jsonl, a string each"),
    ],
)
def test_texts_alone(tmp_path: Path, name: str, content: str, texts: list[str], summary: str) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8", newline="")
    found = read_file(tmp_path / name)
    assert (found.texts, found.labels, found.summary) == (texts, None, summary)


SECRET = "SECRET"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", f"id,body\n1,{SECRET}", r"has no column 'text'; it has 'id', 'body'. Name the one to read by field="),
        (
            "t.csv",
            f"id,text\n1,{SECRET}, {SECRET}",
            r"line 2: 3 cells under 2 columns; put quotes around what holds ','",
        ),
        ("t.csv", f'id,text\n1,"{SECRET}', r"line 2, is not a row of a table: unexpected end of data"),
        ("t.tsv", "", r"has no column 'text'; it has none"),
        ("t.jsonl", f'{{"body": "{SECRET}"}}', r"has no field 'text'; it has 'body'. Name the one to read by field="),
        ("t.jsonl", f'"a"\n{SECRET}', r"line 2 is not JSON \(Expecting value\)"),
        ("t.jsonl", f'{{"text": ["{SECRET}"]}}', r"text 1: 'text' is a list and not a string"),
        ("t.jsonl", '"\\ud800"', r"text 1, has half a surrogate pair"),
        ("t.jsonl", "[" * 100_000, r"line 1 is not JSON"),
        ("t.json", f'{{"data": ["{SECRET}"]}}', r"has no field 'text'; it has 'data'"),
        ("t.json", "[1, 2]", r"2 of 2 entries is neither a string nor an object"),
        ("t.txt", f'["{SECRET}"]', r"holds JSON and not one text a line; rename it to .json"),
        ("t.txt", f'{{"text": "{SECRET}"}}\n{{"text": ""}}', r"holds JSON and not one text a line"),
        ("t.txt", " \n\n", r"is empty: it holds no text"),
        ("t.txt", f"\0{SECRET}", r"is a binary file; texts come one a line"),
        ("t.parquet", f"PAR1{SECRET}", r"is a Parquet file, which is not read; write it as JSON lines"),
        ("t.txt", b"caf\xe9 " + SECRET.encode(), r"is not UTF-8 \(byte 3 is not\); if it is text, convert it"),
        ("t.txt", SECRET.encode("utf-16"), r"is UTF-16, which is not read; convert it"),
    ],
)
def test_files_of_another_kind_are_refused_and_not_shown(
    tmp_path: Path, name: str, content: str | bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(pp.DataError, match=message) as refused:
        read_texts(tmp_path / name)
    assert SECRET not in str(refused.value)
    assert len(str(refused.value)) < 400 + len(str(tmp_path))


@given(st.binary(max_size=200), st.sampled_from(["t.txt", "t.csv", "t.tsv", "t.json", "t.jsonl"]))
def test_any_bytes_are_texts_or_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes, name: str) -> None:
    file = tmp_path_factory.getbasetemp() / name
    for start in (b"", b"text,label\n", b'{"text": "a", "label": 1}\n', b'["a",'):
        file.write_bytes(start + content)
        for label_field in (None, "label"):
            try:
                found = read_file(file, label_field=label_field)
            except pp.DataError:
                continue
            assert found.texts
            assert all(text.strip() for text in found.texts)


def test_labels_that_are_missing_are_named(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("text,label\na,x\nb,\n")
    with pytest.raises(pp.DataError, match=r"text 2, has no label: 'label' must be a name or a whole number"):
        read_file(tmp_path / "t.csv", label_field="label")
    with pytest.raises(pp.DataError, match=r"no column 'topic'; it has 'text', 'label'. .* by label_field="):
        read_file(tmp_path / "t.csv", label_field="topic")
    (tmp_path / "t.txt").write_text("a\n")
    with pytest.raises(pp.DataError, match=r"one text a line and no labels"):
        read_file(tmp_path / "t.txt", label_field="label")


def test_what_cannot_be_read_is_said(tmp_path: Path) -> None:
    with pytest.raises(pp.DataError, match=r"cannot read .*absent\.txt: No such file"):
        read_texts(tmp_path / "absent.txt")
    with pytest.raises(pp.DataError, match=r"/dev/zero is not a plain file"):
        read_texts("/dev/zero")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["dataset_info.json", "state.json", "data-0.arrow"], "is a dataset as the library datasets saves it"),
        (["dataset_dict.json", "train/state.json"], "is a dataset as the library datasets saves it"),
        (["texts.csv"], r"holds no image; .*It holds texts\.csv: for texts, give the file"),
        ([".hidden.png"], "holds no image"),
    ],
)
def test_a_folder_of_something_else_is_not_taken_for_images(tmp_path: Path, files: list[str], message: str) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    with pytest.raises(pp.DataError, match=message):
        Images(tmp_path, processor())


def test_texts_are_cut_where_nearly_all_end() -> None:
    class Spaces:
        def __call__(self, texts: list[str], **options: Any) -> dict[str, Any]:
            return {"input_ids": [text.split() for text in texts]}

    texts = ["a " * (i + 1) for i in range(5000)]  # of which a thousand are looked at
    lengths = token_lengths(texts, Spaces())
    assert lengths == list(range(1, 5000, 5))
    assert fitting_length(lengths, 9999) == 4752  # 95 % have 4,746 or fewer
    assert fitting_length(lengths) == 512
    assert fitting_length([3]) == 8
    assert fitting_length([30] * 19 + [100]) == 32


def test_a_missing_pillow_is_no_fault_of_the_data(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(pp.PathpruneError, match=r"Pillow, which is not installed; pip install pillow") as error:
        Images(pictures, None)
    assert not isinstance(error.value, pp.DataError)


def test_an_image_model_goes_all_the_way(pictures: Path) -> None:
    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 2, "intermediate_size": 20}
    model = ViTModel(ViTConfig(**shape, image_size=8, patch_size=2, initializer_range=0.3)).eval()
    data = Images(pictures, processor(), batch_size=4)
    path: SolutionPath = pp.search(model, data, steps=8, multiple=1, progress=False)
    assert path.config["objective"] == "embedding"
    assert path.seq_len == 17  # sixteen patches and the class token: what MACs are counted at
    small = pp.slice_model(model, path.select(pp.Budget(keep=0.5)))
    recovered = pp.recover(small, teacher=model, data=data, validation=data, steps=60, lr=3e-3, progress=False)
    before = 1 - fidelity(small, model, data)
    assert 1 - fidelity(recovered, model, data) < 0.8 * before
