"""Texts of a file and images of a folder, or what stands in their way.

Without torch, so that a command can look at its data before anything slow begins. Nothing is guessed in silence:
what was read is said in one line, and no error shows what a file holds.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pathprune.errors import DataError

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
TABLES = (".csv", ".tsv")
JSON_LINES = (".jsonl", ".ndjson")
# First bytes of what is no text, and what turns it into some.
FOREIGN = {
    b"PAR1": ("a Parquet file", "write it as JSON lines, datasets.Dataset.from_parquet(FILE).to_json('texts.jsonl')"),
    b"ARROW1": ("an Arrow file", "write it as JSON lines, datasets.Dataset.from_file(FILE).to_json('texts.jsonl')"),
    b"\x1f\x8b": ("a gzip archive", "unpack it first"),
    b"PK\x03\x04": ("a zip archive or a spreadsheet", "unpack it, or export it as CSV"),
    b"\xff\xfe": ("UTF-16", "convert it: iconv -f UTF-16 -t UTF-8"),
    b"\xfe\xff": ("UTF-16", "convert it: iconv -f UTF-16 -t UTF-8"),
}
NEEDED = "texts come one a line (.txt), with a header (.csv, .tsv), or as JSON (.json, .jsonl), in UTF-8"


@dataclass(frozen=True)
class Texts:
    """What was read of a file.

    Attributes:
        texts: none of them empty; all of them strings, or all conversations: lists of messages with role and content.
        labels: one for each text, where they were asked for.
        summary: one line that says what was read, from where, and what was left out.
    """

    texts: list[Any]
    labels: list[Any] | None
    summary: str


def read_texts(file: str | os.PathLike[str], field: str = "text") -> list[str]:
    """The texts of a file, as ``read_file`` reads them."""
    return read_file(file, field).texts


def read_file(file: str | os.PathLike[str], field: str = "text", label_field: str | None = None) -> Texts:
    """Texts of a file, by its suffix: ``.csv`` and ``.tsv`` with a header; ``.json``, an array of strings or objects;
    ``.jsonl``, one string or object a line; all others, one text a line. Empty ones are left out.

    Args:
        field: column or field that holds the text.
        label_field: column or field that holds the label, if labels are wanted.

    Raises:
        DataError: the file cannot be read, is of another kind than its name says, holds no text, or lacks the column.
    """
    path = Path(file)
    content = _content(path)
    suffix = path.suffix.lower()
    if suffix in TABLES:
        names, rows = _table(path, content, suffix)
        for name in (field, *([] if label_field is None else [label_field])):
            if name not in names:
                raise DataError(_lacks(path, "column", name, names, field))
        where = f"column {field!r}"
    elif suffix in (".json", *JSON_LINES):
        rows = _json(path, content, lines=suffix in JSON_LINES)
        objects = [row for row in rows if isinstance(row, dict)]
        if label_field is not None and len(objects) < len(rows):
            raise DataError(f"{path} has texts without labels; labels need objects with a field {label_field!r}")
        names = list(dict.fromkeys(name for row in objects[:1000] for name in row))
        for name in (field, *([] if label_field is None else [label_field])):
            if objects and not any(name in row for row in objects):
                raise DataError(_lacks(path, "field", name, names, field))
        where = f"field {field!r}" if objects else "a string each"
    else:
        if _is_json(content):
            raise DataError(f"{path} holds JSON and not one text a line; rename it to .json, or .jsonl for one a line")
        if label_field is not None:
            raise DataError(
                f"{path} has one text a line and no labels; they need a .csv or .jsonl with {label_field!r}"
            )
        rows, where = content.split("\n"), "one a line"
        if rows[-1] == "":
            rows.pop()  # what follows the last line's end
    return _texts(path, rows, field, label_field, where)


def image_files(folder: str | os.PathLike[str]) -> list[Path]:
    """The images of a folder and its subfolders, sorted.

    Raises:
        DataError: there is none.
    """
    files = [file for file in Path(folder).rglob("*") if not file.name.startswith(".")]
    images = sorted(file for file in files if file.suffix.lower() in IMAGE_SUFFIXES)
    if images:
        return images
    if any(file.suffix == ".arrow" or file.name == "dataset_dict.json" for file in files):
        raise DataError(
            f"{folder} is a dataset as the library datasets saves it, and not a folder of images; write a split of it "
            "as JSON lines, datasets.load_from_disk(FOLDER).to_json('texts.jsonl'), and give that file"
        )
    texts = [file for file in files if file.suffix.lower() in (".txt", ".json", *TABLES, *JSON_LINES)]
    beside = f". It holds {texts[0].relative_to(folder)}: for texts, give the file" if texts else ""
    raise DataError(f"{folder} holds no image; it needs files that end in {', '.join(IMAGE_SUFFIXES)}{beside}")


def _content(path: Path) -> str:
    try:
        if path.exists() and not path.is_file():  # a pipe or a device might never end
            raise DataError(f"{path} is not a plain file; {NEEDED}")
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    for start, (what, remedy) in FOREIGN.items():
        if data.startswith(start):
            raise DataError(f"{path} is {what}, which is not read; {remedy}")
    if b"\0" in data:
        raise DataError(f"{path} is a binary file; {NEEDED}")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 (byte {error.start:,} is not); if it is text, convert it: iconv -f LATIN1 -t UTF-8"
        ) from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _table(path: Path, content: str, suffix: str) -> tuple[list[str], list[Any]]:
    """Names of columns, and a mapping for each row."""
    header = content.lstrip("\n").partition("\n")[0]
    delimiter = "\t" if suffix == ".tsv" else max(",;\t", key=header.count)  # spreadsheets write ; in many countries
    limit = csv.field_size_limit(max(len(content), 1))
    try:
        reader = csv.reader(io.StringIO(content), delimiter=delimiter, strict=True)
        names = [name.strip() for name in next((row for row in reader if row), [])]
        rows = []
        for row in reader:
            if row and len(row) != len(names):
                raise DataError(
                    f"{path}, line {reader.line_num}: {len(row)} cells under {len(names)} columns; put quotes around "
                    f"what holds {'a tab' if delimiter == chr(9) else delimiter!r}, a quote or a line's end"
                )
            if row:
                rows.append(dict(zip(names, row, strict=True)))
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}, is not a row of a table: {error}") from None
    finally:
        csv.field_size_limit(limit)
    return names, rows


def _json(path: Path, content: str, *, lines: bool) -> list[Any]:
    """Strings and objects."""
    rows: Any = None
    if not lines:
        try:
            rows = json.loads(content)
        except (ValueError, RecursionError):
            lines = True  # as some libraries write JSON lines
    if lines:
        rows = []
        for number, line in enumerate(content.split("\n"), start=1):
            try:
                rows += [json.loads(line)] if line.strip() else []
            except (ValueError, RecursionError) as error:
                what = getattr(error, "msg", type(error).__name__)
                raise DataError(f"{path} is not text: line {number} is not JSON ({what}); {NEEDED}") from None
    if isinstance(rows, dict):
        rows = [rows]
    if not isinstance(rows, list) or (odd := sum(not isinstance(row, str | dict | None) for row in rows)):
        what = f"{odd:,} of {len(rows):,} entries" if isinstance(rows, list) else "the whole"
        raise DataError(f"{path}: {what} is neither a string nor an object; {NEEDED}")
    return rows


def _is_json(content: str) -> bool:
    """Whether it is clearly JSON: objects, or an array of strings or objects."""
    start = content.lstrip()[:1]
    for part in (content, content.lstrip().partition("\n")[0]) if start in ("[", "{") else ():
        try:
            found = json.loads(part)
        except (ValueError, RecursionError):
            continue
        if isinstance(found, dict) or any(isinstance(entry, str | dict) for entry in found):
            return True
    return False


def _texts(path: Path, rows: list[Any], field: str, label_field: str | None, where: str) -> Texts:
    texts: list[Any] = []
    labels: list[Any] = []
    for number, row in enumerate(rows, start=1):
        text = row.get(field) if isinstance(row, Mapping) else row
        if text is None or text == [] or (isinstance(text, str) and not text.strip()):
            continue
        chat = isinstance(text, list) and all(
            isinstance(turn, dict) and {"role", "content"} <= set(turn) for turn in text
        )
        if not isinstance(text, str) and not chat:
            raise DataError(
                f"{path}, text {number:,}: {field!r} is a {type(text).__name__} and not a string, nor a conversation: "
                "a list of messages with role and content"
            )
        if texts and type(text) is not type(texts[0]):
            raise DataError(
                f"{path}, text {number:,}: {field!r} holds texts and conversations; put them into two files"
            )
        try:
            json.dumps(text, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise DataError(f"{path}, text {number:,}, has half a surrogate pair, which is no character") from None
        texts.append(text)
        if label_field is not None:
            label = row.get(label_field)
            if label is None or label == "" or not isinstance(label, str | int):
                raise DataError(
                    f"{path}, text {number:,}, has no label: {label_field!r} must be a name or a whole number"
                )
            labels.append(label.strip() if isinstance(label, str) else label)
    empty = len(rows) - len(texts)
    if not texts:
        raise DataError(f"{path} is empty: it holds no text. {NEEDED[0].upper()}{NEEDED[1:]}")
    beside = "" if label_field is None else f", labels from {label_field!r}"
    left_out = f" ({empty:,} empty {'one' if empty == 1 else 'ones'} left out)" if empty else ""
    what = "text" if isinstance(texts[0], str) else "conversation"
    count = f"{len(texts):,} {what}{'' if len(texts) == 1 else 's'}"
    summary = f"read {count} from {path.name}, {where}{beside}{left_out}"
    return Texts(texts, None if label_field is None else labels, summary)


def _lacks(path: Path, what: str, name: str, names: Iterable[str], field: str) -> str:
    option = "field=" if name == field else "label_field="
    shown = [repr(one[:40]) for one in names if one]
    there = ", ".join(shown[:20]) + (", ..." if len(shown) > 20 else "")
    has = f"it has {there}" if shown else "it has none"
    return f"{path} has no {what} {name!r}; {has}. Name the one to read by {option}"
