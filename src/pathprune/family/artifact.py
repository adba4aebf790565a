"""Tensors and their description on disk: safetensors beside JSON, replaced as one.

``<name>.json`` names its tensor file by content, and is renamed into place only when that file
is complete; until then the folder still holds the previous artifact. Whoever writes next removes what
a killed writer left. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.numpy

from pathprune.errors import ArtifactError
from pathprune.family.files import clear, replace_file

Arrays = Mapping[str, npt.NDArray[Any]]


T = TypeVar("T")


# Bytes, and lists and objects, of a description; a pair takes about a thousand bytes and five objects. Hostile JSON
# takes thirty times its bytes in memory, and seconds for each million of objects.
LARGEST, MOST = 16 * 2**20, 500_000


def write_artifact(folder: str | os.PathLike[str], name: str, meta: Mapping[str, Any], tensors: Arrays) -> None:
    """Write ``<folder>/<name>.json`` and its tensors; what was there stays until both are complete.

    Raises:
        ArtifactError: the folder cannot be made or written, or the disk is full.
    """
    folder = named_folder(folder)
    try:
        json.dumps(meta, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ArtifactError(
            f"cannot write {name}: {error}; keep to numbers that are finite, text, lists and dicts"
        ) from error
    data = safetensors.numpy.save({key: np.asarray(value, order="C") for key, value in tensors.items()})
    digest = hashlib.sha256(data).hexdigest()
    target = folder / f"{name}-{digest[:12]}.safetensors"
    whole = {**meta, "tensors": {"file": target.name, "sha256": digest}}
    text = json.dumps({**whole, "sha256": content_hash(whole)}, indent=1, allow_nan=False)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _one_writer(folder):
            clear(folder, _own_files(name))
            ours = not target.exists()  # the target is new, and goes again if its description cannot be written
            try:
                replace_file(target, data)
                replace_file(folder / f"{name}.json", text.encode())
            except BaseException:
                with suppress(OSError):
                    if ours and target in _unnamed(folder, name):  # else Ctrl-C came when all was in place
                        target.unlink()
                raise
            with suppress(OSError):  # it wastes space, but the new artifact is in place
                for old in _unnamed(folder, name):
                    old.unlink()
    except OSError as error:
        raise ArtifactError(
            f"cannot write {name} to {folder}: {error.strerror or error}; what was there is unchanged. "
            "Free some space, or choose a folder that you may write to"
        ) from error


@contextmanager
def _one_writer(folder: Path) -> Iterator[None]:
    """Wait until nobody else writes an artifact into ``folder``, where the system has locks: each deletes the tensors
    that the description does not name, and another's would be among them. A lock ends with its process.
    """
    handle = None
    try:
        with suppress(ImportError, OSError):
            import fcntl

            handle = os.open(folder, os.O_RDONLY)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        if handle is not None:
            os.close(handle)


def _unnamed(folder: Path, name: str) -> list[Path]:
    """The tensor files that no description names; none where nobody can tell."""
    try:
        named = read_json(folder / f"{name}.json")["tensors"]["file"]
    except FileNotFoundError:
        named = None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return []
    return [file for file in _tensor_files(folder, name) if file.name != named]


def _own_files(name: str) -> str:
    return rf"{re.escape(name)}(\.json|-[0-9a-f]{{12}}\.safetensors)"


def named_folder(folder: str | os.PathLike[str]) -> Path:
    """The folder of that name, whether it exists or not.

    Raises:
        ArtifactError: the system can have none of that name (255 bytes are the limit of most).
    """
    folder = Path(folder)
    try:
        folder.lstat()
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        pass
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ArtifactError(f"{str(folder)[:60]!r}... can be no folder: {reason}; choose another out=") from error
    return folder


def _tensor_files(folder: Path, name: str) -> list[Path]:
    return [
        file
        for file in folder.glob(f"{name}-*.safetensors")
        if re.fullmatch(r"[0-9a-f]{12}", file.stem[len(name) + 1 :])
    ]


def read_artifact(folder: str | os.PathLike[str], name: str, version: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read what ``write_artifact`` wrote: (description, tensors).

    Raises:
        ArtifactError: missing, truncated, altered, or of another format version.
    """
    with reading(folder, name):
        meta, opened = open_artifact(folder, name, version, open_regular)
        with opened:
            data = opened.read()
        file = meta["tensors"]["file"]
        if hashlib.sha256(data).hexdigest() != meta["tensors"]["sha256"]:
            raise ValueError(f"{file} does not have the recorded SHA-256; it is truncated or was altered")
        return meta, safetensors.numpy.load(data)


def open_artifact(
    folder: str | os.PathLike[str], name: str, version: int, opened: Callable[[Path], T]
) -> tuple[dict[str, Any], T]:
    """The description, and what ``opened`` makes of the tensors' file: (description, opened).

    Raises:
        ArtifactError: missing, malformed, or of another format version.
    """
    missing = None
    with reading(folder, name):
        while True:
            meta, file = describe_artifact(folder, name, version)
            try:
                return meta, opened(file)
            except FileNotFoundError:
                if file == missing:
                    raise
                missing = file  # another artifact may have replaced it since its description was read


def describe_artifact(folder: str | os.PathLike[str], name: str, version: int) -> tuple[dict[str, Any], Path]:
    """Read what ``write_artifact`` wrote, but for the tensors: (description, their file).

    Raises:
        ArtifactError: missing, malformed, or of another format version.
    """
    path = Path(folder) / f"{name}.json"
    with reading(folder, name):
        meta = read_json(path)
        if not isinstance(meta, dict):
            raise ValueError("not a JSON object")
        if meta.get("format") != version:
            raise ArtifactError(
                f"{path} has format {meta.get('format')!r}, this pathprune reads format {version}; "
                "use the pathprune release that wrote it, or search again"
            )
        if "sha256" in meta and meta.pop("sha256") != content_hash(meta):  # 0.1.0 wrote none
            raise ValueError("its content does not have the recorded SHA-256; it was altered")
        file = str(meta["tensors"]["file"])
        if Path(file).name != file:
            raise ValueError(f"tensor file {file!r} lies outside the folder")
        return meta, path.parent / file


def content_hash(content: Any) -> str:
    """SHA-256 of what JSON holds, whatever the order of its keys and the space between them."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def read_json(path: str | os.PathLike[str]) -> Any:
    """What a description says.

    Raises:
        OSError: it cannot be opened.
        ValueError: it is no JSON, too large, or no regular file.
        RecursionError: it is too deep.
    """
    with open_regular(path) as file:
        if os.fstat(file.fileno()).st_size > LARGEST:
            raise ValueError(f"{path} is larger than {LARGEST / 2**20:.0f} MiB, the limit of a description")
        data = file.read(LARGEST)
    if (count := data.count(b"[") + data.count(b"{")) > MOST:
        raise ValueError(f"{path} has {count:,} lists and objects; the limit of a description is {MOST:,}")
    return json.loads(data)


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a file to read it.

    Raises:
        OSError: it cannot be opened.
        ValueError: it is a pipe, a device or a folder, which could be read for ever.
    """
    # A pipe that nobody writes to would keep a plain open waiting. A folder: on Windows it is a PermissionError.
    number = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        if not stat.S_ISREG(os.fstat(number).st_mode):
            raise ValueError(f"{path} is no regular file")
        return os.fdopen(number, "rb")
    except BaseException:
        os.close(number)
        raise


@contextmanager
def reading(folder: str | os.PathLike[str], name: str) -> Iterator[None]:
    """Whatever goes wrong while an artifact is read is an ``ArtifactError``."""
    path = Path(folder) / f"{name}.json"
    try:
        yield
    except FileNotFoundError as error:
        raise ArtifactError(f"{error.filename} does not exist; {folder} holds no complete {name}") from error
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {error.strerror or error}") from error
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        OverflowError,
        RecursionError,
        safetensors.SafetensorError,
    ) as error:
        raise ArtifactError(f"{path} is not a readable {name}: {error}. Copy it again from its source") from error


def to_tensors(parts: Mapping[str, Arrays]) -> dict[str, npt.NDArray[Any]]:
    """Arrays by part and name as tensors, whose keys are ``<part>/<name>``."""
    return {f"{part}/{name}": array for part, arrays in parts.items() for name, array in arrays.items()}


def from_tensors(tensors: Arrays, parts: Iterable[str]) -> dict[str, dict[str, npt.NDArray[Any]]]:
    """Tensors by part and name.

    Raises:
        KeyError: one is of none of these parts.
    """
    found: dict[str, dict[str, npt.NDArray[Any]]] = {part: {} for part in parts}
    for key, array in tensors.items():
        part, _, name = key.partition("/")
        found[part][name] = array
    return found


def remove_artifact(folder: str | os.PathLike[str], name: str) -> None:
    """Delete an artifact, its description first; nothing happens where there is none.

    Raises:
        OSError: a file cannot be deleted.
    """
    folder = Path(folder)
    with _one_writer(folder):
        (folder / f"{name}.json").unlink(missing_ok=True)
        for tensors in _tensor_files(folder, name):
            tensors.unlink(missing_ok=True)
        clear(folder, _own_files(name))
