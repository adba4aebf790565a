"""family.json, the record that reports read: checked once, then trusted; and its numbers in words."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pathprune.errors import ArtifactError
from pathprune.family.artifact import read_json

FORMAT = 1

# A page of more members, metrics or longer names is none; pictures of them would take hours, and gigabytes.
MANY, LONG, LARGE = 64, 10_000, 1e15
KINDS = (".qk", ".vo", ".mlp")
NUMBER = (int, float)
FAMILY = {
    "model": dict,
    "metrics": dict,
    "members": list,
    "latency_tokens": int,
    "settings": dict,
    "seconds": dict,
    "machine": dict,
    "versions": dict,
    "date": str,
}
MODEL = {"name": (str, type(None)), "architecture": str, "params": int, "prunable_params": int}
METRIC = {"label": str, "text": str, "dense": NUMBER}
MEMBER = {
    "name": str,
    "folder": (str, type(None)),
    "keep": NUMBER,
    "params": int,
    "params_fraction_of_whole_model": NUMBER,
    "prunable_params_kept_fraction": NUMBER,
    "macs_per_token": NUMBER,
    "macs_fraction_of_whole_model": NUMBER,
    "seq_len": int,
    "bytes_on_disk": int,
    "latency_ms": dict,
    "quality": dict,
    "widths": dict,
}


def read_family(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Read ``<folder>/family.json``.

    Raises:
        ArtifactError: missing, unreadable, of another format version, or without something that reports need.
    """
    path = Path(folder) / "family.json"
    try:
        family = read_json(path)
        _check(family)
    except FileNotFoundError as error:
        raise ArtifactError(
            f"{path} does not exist. A report is of a measured family: `pathprune demo` makes one, and records it "
            "there; of other models, `pathprune evaluate` prints the figures"
        ) from error
    except OSError as error:
        raise ArtifactError(
            f"cannot read {path}: {error.strerror or error}; name a folder that you may read"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ArtifactError(
            f"{path} is not a readable family: {error}. Copy it again from its source, or evaluate the family again"
        ) from error
    return dict(family)


def dense_member(family: Mapping[str, Any]) -> Mapping[str, Any]:
    """The member that nothing was removed from: the one without a folder."""
    return next(member for member in family["members"] if member["folder"] is None)


def smaller_members(family: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The pruned members, in the record's order."""
    return [member for member in family["members"] if member["folder"] is not None]


def recovered(member: Mapping[str, Any]) -> bool:
    """Whether the member's quality was measured after a recovery."""
    return "after" in member["quality"]


def reached(member: Mapping[str, Any]) -> Mapping[str, float]:
    """Quality by metric after recovery, or before it where none was run."""
    quality: Mapping[str, float] = member["quality"]["after" if recovered(member) else "before"]
    return quality


def speed_up(family: Mapping[str, Any], member: Mapping[str, Any], batch: str) -> float:
    """Latency of the dense model over that of ``member``, at one batch size."""
    return float(dense_member(family)["latency_ms"][batch] / member["latency_ms"][batch])


def title(family: Mapping[str, Any]) -> str:
    """The model's name, or its architecture where it has none."""
    return str(family["model"].get("name") or family["model"]["architecture"])


def loader(family: Mapping[str, Any]) -> str:
    """The class that loads a member: ``AutoModel`` would drop the head of a model that has one.

    Raises:
        ArtifactError: the architecture is no name of a class; it would stand in code that people copy.
    """
    architecture = str(family["model"]["architecture"])
    if not _names_class(architecture):
        raise ArtifactError(
            f"the family's architecture, {architecture[:200]!r}, is no name of a class; evaluate it again"
        )
    return "AutoModel" if architecture.endswith("Model") and "Head" not in architecture else architecture


def count(number: float) -> str:
    """1234567 -> ``1.23 M``."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            scaled = number / size
            return f"{scaled:.{2 if scaled < 10 else 1 if scaled < 100 else 0}f} {letter}"
    return f"{number:.0f}"


def megabytes(size: float) -> str:
    """Bytes as ``90.9 MB`` (a million bytes each)."""
    return f"{size / 1e6:.1f} MB"


def milliseconds(latency: float) -> str:
    """Three digits or so: ``5.10 ms``, ``210 ms``."""
    return f"{latency:.2f} ms" if latency < 10 else f"{latency:.0f} ms"


def in_words(family: Mapping[str, Any], member: Mapping[str, Any]) -> str:
    """A member's numbers in two sentences."""
    sizes = (
        f"{member['name']} has {count(member['params'])} parameters "
        f"({member['params_fraction_of_whole_model']:.0%} of the whole model's), needs "
        f"{member['macs_fraction_of_whole_model']:.0%} of its multiply-accumulates and "
        f"takes {megabytes(member['bytes_on_disk'])} on disk"
    )
    if member["latency_ms"]:
        batch = max(member["latency_ms"], key=int)
        sizes += f"; at batch {batch} it runs {speed_up(family, member, batch):.2f} times as fast as the dense model"
    qualities = []
    for key, metric in family["metrics"].items():
        before = f"{member['quality']['before'][key]:.3f} before, " if recovered(member) else ""
        qualities.append(f"{metric['label']} is {reached(member)[key]:.3f} ({before}dense {metric['dense']:.3f})")
    when = "After recovery" if recovered(member) else "Without recovery"
    return f"{sizes}. {when}, {', '.join(qualities)}."


def settings_lines(family: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(``search.steps``, ``300``) and so on."""
    for part, values in family["settings"].items():
        if isinstance(values, dict):
            yield from ((f"{part}.{name}", _plain(value)) for name, value in values.items())
        else:
            yield part, _plain(values)


def layer_labels(names: Sequence[str]) -> list[str]:
    """Short names for the pairs of one kind: what tells them apart, ``layer 3`` where that is a number."""
    blocks = [name.rpartition(".")[0].split(".") for name in names]
    if len({len(block) for block in blocks}) == 1:
        same = [len(set(parts)) == 1 for parts in zip(*blocks, strict=True)]
        blocks = [[part for part, drop in zip(block, same, strict=True) if not drop] or block for block in blocks]
    return [f"layer {block[0]}" if len(block) == 1 and block[0].isdigit() else ".".join(block) for block in blocks]


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _check(family: Any) -> None:
    """Raise ValueError unless ``family`` has everything that reports read."""
    if not isinstance(family, dict):
        raise ValueError("it is not a JSON object")
    if family.get("format") != FORMAT:
        raise ValueError(f"it has format {family.get('format')!r}, this pathprune reads format {FORMAT}")
    _check_plain(family)
    _expect("it", family, FAMILY)
    _expect("model", family["model"], MODEL)
    if not _names_class(family["model"]["architecture"]):
        raise ValueError(f"its architecture, {family['model']['architecture'][:200]!r}, is no name of a class")
    _expect("seconds", family["seconds"], dict.fromkeys(family["seconds"], NUMBER))
    _expect("versions", family["versions"], dict.fromkeys(family["versions"], str))
    for name, metric in family["metrics"].items():
        _expect(f"metrics.{name}", metric, METRIC)
    for i, member in enumerate(family["members"]):
        _expect(f"members[{i}]", member, MEMBER)
        if min(value for key, value in member.items() if MEMBER.get(key) in (int, NUMBER)) < 0:
            raise ValueError(f"members[{i}] has a negative size or share")
    dense = [member for member in family["members"] if member["folder"] is None]
    if len(dense) != 1 or len(family["members"]) < 2 or not family["metrics"]:
        raise ValueError("it needs one dense member (folder null), at least one smaller member and at least one metric")
    if most := [n for n in map(len, (family["members"], family["metrics"], dense[0]["latency_ms"])) if n > MANY]:
        raise ValueError(f"it has {most[0]} members, metrics or batch sizes; a report takes {MANY}")
    full = dense[0]["widths"]
    if odd := [name for name in full if not name.endswith(KINDS)]:
        raise ValueError(f"widths of {odd[0]}: it is no pair of the kinds {', '.join(KINDS)}")
    for member in family["members"]:
        name = member["name"]
        if not {"before"} <= set(member["quality"]) <= {"before", "after"}:
            raise ValueError(
                f"{name}: quality.before is {member['quality'].get('before')}, or there is more than after"
            )
        for part in member["quality"]:
            _expect(f"{name}: quality.{part}", member["quality"].get(part), dict.fromkeys(family["metrics"], NUMBER))
        _expect(f"{name}: latency_ms", member["latency_ms"], dict.fromkeys(dense[0]["latency_ms"], NUMBER))
        for batch, latency in member["latency_ms"].items():
            if not 1 <= int(batch) <= LARGE or not isinstance(latency, NUMBER) or latency < 1e-9:
                raise ValueError(f"{name}: latency_ms={member['latency_ms']} must name batch sizes and positive times")
        if more := set(member["latency_ms"]) - set(dense[0]["latency_ms"]):
            raise ValueError(f"{name}: latency_ms has the batch size {min(more)}, which the dense model has not")
        _expect(f"{name}: widths", member["widths"], dict.fromkeys(full, list))
        for pair, whole in full.items():
            width = member["widths"][pair]
            if len(width) != 2 or not all(type(n) is int for n in width):
                raise ValueError(f"{name}: each of widths must be [heads, dimensions of each]")
            if not all(0 <= n <= most and most > 0 for n, most in zip(width, whole, strict=True)):
                raise ValueError(f"{name}: widths of {pair} are {width}, of {whole}")


def _names_class(architecture: str) -> bool:
    return architecture.isascii() and architecture.isidentifier()


def _check_plain(value: Any) -> None:
    """Raise ValueError on numbers and text that could not be written into a page."""
    if isinstance(value, dict):
        for key, entry in value.items():
            _check_plain(key)
            _check_plain(entry)
    elif isinstance(value, list):
        for entry in value:
            _check_plain(entry)
    elif isinstance(value, str):
        if len(value) > LONG:
            raise ValueError(f"it has a text of {len(value)} characters; at most {LONG} make sense")
        value.encode()  # half of a character could not be written
    elif isinstance(value, NUMBER) and not -LARGE <= value <= LARGE:
        raise ValueError(f"it has the number {repr(value)[:40]}; all must be finite, and at most {LARGE:.0e}")


def _expect(where: str, record: Any, fields: Mapping[str, Any]) -> None:
    if not isinstance(record, dict):
        raise ValueError(f"{where} is {record!r}, not an object")
    for name, kind in fields.items():
        value = record.get(name)
        if name not in record or not isinstance(value, kind) or isinstance(value, bool):
            found = repr(value)[:200] if name in record else "absent"
            raise ValueError(f"{where} has no valid {name!r} ({found})")
