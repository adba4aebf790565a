"""Model folders that are replaced whole or not at all."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import warnings
from contextlib import suppress
from pathlib import Path

from pathprune.checkpoint.other_libraries import SHAPES
from pathprune.errors import ArtifactError
from pathprune.family.artifact import named_folder
from pathprune.family.files import left

MODEL_FILES = r"(model|pytorch_model)[-.].*(safetensors|bin|index\.json)"  # would be read in place of newer ones


PATH_FILES = r"path\.json|path-[0-9a-f]{12}\.safetensors"


def check_free(folder: str | os.PathLike[str], *sources: str | os.PathLike[str]) -> Path:
    """Where a model may be written: the folder that ``folder`` is, or links to; without what a killed run left there.

    Args:
        sources: folders or hub ids of the models that the new one comes from.

    Raises:
        ArtifactError: it holds something that is not a model, or is one of the sources.
    """
    folder = named_folder(folder).resolve()
    if any(Path(source).resolve() == folder for source in sources):
        raise ArtifactError(
            f"{folder} is the model that this one was made from, and would be lost; choose another folder"
        )
    for rest in left(folder.parent, re.escape(folder.name)):
        if back := settle(folder, rest.with_suffix(".part"), rest.with_suffix(".old")):
            warnings.warn(f"a run was killed while it replaced the model in {folder}; {back} is back", stacklevel=3)
    try:
        held = folder.is_dir() and any(folder.iterdir())
    except OSError as error:
        raise ArtifactError(f"cannot read {folder}: {error.strerror or error}; choose another folder") from error
    if (folder.exists() and not folder.is_dir()) or (
        held and not any((folder / name).exists() for name in ("config.json", SHAPES))
    ):
        raise ArtifactError(f"{folder} exists and is not a model folder; choose another folder, or remove it")
    return folder


def flush_to_disk(folder: Path) -> None:
    """Have every file reach the disk before the old model goes, in case the machine stops."""
    for file in folder.rglob("*"):
        if file.is_file():
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())


def put_in_place(part: Path, folder: Path, old: Path) -> None:
    """Rename a complete model into place. What was there gets the name ``old``; ``settle`` goes on from wherever
    this ends.
    """
    if not folder.exists():
        part.rename(folder)
    elif link_rest(folder, part) and exchange(part, folder):
        with suppress(OSError):  # nothing but the old model is in it
            part.rename(old)
    else:
        folder.rename(old)
        part.rename(folder)


def exchange(one: Path, other: Path) -> bool:
    """Exchange the names of two folders in one step; False where the system cannot (Linux can)."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None) if os.name == "posix" else None
    here, exchange = -100, 2  # AT_FDCWD, which absolute paths do not use, and RENAME_EXCHANGE
    return rename is not None and rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


def settle(folder: Path, part: Path, old: Path) -> str:
    """Finish a replacement, or undo it: ``folder`` holds the new model or else the old, with all that stood beside it,
    and ``part`` and ``old`` are gone.

    Returns:
        What was brought back, in words.

    Raises:
        ArtifactError: it cannot be; ``old`` still holds it.
    """
    back = ""
    try:
        if os.path.exists(old) and not folder.exists():
            old.rename(folder)
            back = "the old one"
        shutil.rmtree(part, ignore_errors=True)
        if os.path.exists(old):  # it is False of names that are too long
            for rest in _rest(old, folder):
                rest.rename(folder / rest.name)
                back = "what stood beside it"
            with suppress(OSError):
                old.rename(part)  # nothing in it is wanted any more
    except OSError as error:
        raise ArtifactError(
            f"what stood in {folder} is still in {old} ({error.strerror or error}); move what you need yourself"
        ) from error
    for gone in (part, old):
        shutil.rmtree(gone, ignore_errors=True)
    return back


def _rest(old: Path, new: Path) -> list[Path]:
    """What stands beside the old model, is no part of it, and is not beside the new one."""
    paths = (old / "path.json").exists() and (new / "path.json").exists()  # the tensors of the old one go with it
    parts = f"{MODEL_FILES}|{PATH_FILES}" if paths else MODEL_FILES
    return [rest for rest in old.iterdir() if not (os.path.lexists(new / rest.name) or re.fullmatch(parts, rest.name))]


def link_rest(folder: Path, part: Path) -> bool:
    """Give all that stands beside the old model a second name beside the new one, so that it is there whichever of the
    two is; False where the file system has no such links, and the rest must be moved later.
    """
    rest = _rest(folder, part)
    try:
        for one in rest:
            if one.is_dir() and not one.is_symlink():
                shutil.copytree(one, part / one.name, symlinks=True, copy_function=os.link)
            elif one.is_symlink():
                os.symlink(os.readlink(one), part / one.name)
            else:
                os.link(one, part / one.name)
    except OSError:
        for one in rest:
            with suppress(OSError):
                (part / one.name).unlink()
            shutil.rmtree(part / one.name, ignore_errors=True)
        return False
    return True
