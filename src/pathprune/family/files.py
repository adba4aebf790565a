"""Files and folders that are replaced whole or not at all, and what a killed run left of them."""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pathprune.errors import ArtifactError

PARTS = r"\.(?P<process>[1-9]\d{0,6})(-[0-9a-f]{8})?\.(part|old)"  # by which process, and which of its writings


_writing: set[str] = set()  # by this process; of another process, its number tells whether it still runs


def write_text(file: str | os.PathLike[str], text: str) -> None:
    """Write a text file whole or not at all.

    Raises:
        ArtifactError: it cannot be written; what was there is unchanged.
    """
    file = Path(file)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        clear(file.parent, re.escape(file.name))
        replace_file(file, text.encode())
    except OSError as error:
        raise ArtifactError(
            f"cannot write {file}: {error.strerror or error}; what was there is unchanged. "
            "Free some space, or choose a folder that you may write to"
        ) from error


def replace_file(target: Path, data: bytes) -> None:
    """Write beside ``target``, then rename over it."""
    with beside(target) as (part, _):
        try:
            with open(part, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, target)
        finally:
            part.unlink(missing_ok=True)


@contextmanager
def beside(target: Path) -> Iterator[tuple[Path, Path]]:
    """Hidden names beside ``target``, for what is to replace it and for what it replaces; ``left`` finds what stands
    there after this block, in which this process writes.
    """
    own = f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}"
    part, old = f"{own}.part", f"{own}.old"
    _writing.update((part, old))
    try:
        yield target.with_name(part), target.with_name(old)
    finally:
        _writing.difference_update((part, old))


def left(folder: Path, names: str) -> list[Path]:
    """What writers that are gone left in ``folder``, beside files and folders whose names match ``names``. What of a
    running process stands there is in use.
    """
    try:
        found = list(folder.iterdir())
    except OSError:  # there is no such folder, or nobody may look: the write itself will say so
        return []
    gone = []
    for path in found:
        match = re.fullmatch(rf"\.(?:{names}){PARTS}", path.name)
        if match and path.name not in _writing and not _runs_elsewhere(int(match["process"])):
            gone.append(path)
    return gone


def _runs_elsewhere(process: int) -> bool:
    """Whether a process other than this one runs; of a file of this one, ``_writing`` tells whether it is in use."""
    if process == os.getpid():
        return False
    if os.name == "nt":  # where there is no asking
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it is another user's
        return True
    return True


def clear(folder: Path, names: str) -> None:
    """Delete parts of files that writers that are gone left in ``folder``, see ``left``."""
    for part in left(folder, names):
        with suppress(OSError):
            part.unlink()
