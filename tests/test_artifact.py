"""What is on disk is whole, or the artifact before it."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pathprune.errors import ArtifactError
from pathprune.family.artifact import LARGEST, read_artifact, remove_artifact, write_artifact
from pathprune.family.files import write_text

OLD, NEW = {"x": np.arange(3.0)}, {"x": np.arange(4.0)}


def write(folder: Path, tensors: dict[str, Any], note: str) -> None:
    write_artifact(folder, "thing", {"format": 1, "note": note}, tensors)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An artifact, in a folder that did not exist."""
    folder = tmp_path / "new" / "folder"
    write(folder, OLD, "old")
    return folder


def assert_holds(folder: Path, tensors: dict[str, Any], note: str) -> None:
    meta, read = read_artifact(folder, "thing", 1)
    assert meta["note"] == note
    np.testing.assert_array_equal(read["x"], tensors["x"])


def test_round_trip_and_replacement(folder: Path) -> None:
    assert_holds(folder, OLD, "old")
    write(folder, NEW, "new")
    assert_holds(folder, NEW, "new")
    assert len(contents(folder)) == 2, "the old tensors are gone"
    write(folder, NEW, "same tensors")
    assert_holds(folder, NEW, "same tensors")


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64, np.uint8, np.bool_])
@pytest.mark.parametrize("shape", [(2, 3), (0, 4), (0, 0)])
def test_tensors_keep_type_and_shape(tmp_path: Path, dtype: Any, shape: tuple[int, ...]) -> None:
    tensor = np.asfortranarray(np.ones(shape, dtype))
    write(tmp_path, {"x": tensor}, "")
    _, read = read_artifact(tmp_path, "thing", 1)
    assert read["x"].dtype == dtype
    np.testing.assert_array_equal(read["x"], tensor)
    assert read["x"].flags.writeable, "torch.from_numpy warns of arrays that it cannot write"


class Fault:
    """Stands for a function of ``os``; fails at its n-th call and after."""

    def __init__(self, real: Callable[..., Any], nth: int, error: BaseException) -> None:
        self.real, self.left, self.error = real, nth, error

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.left -= 1
        if self.left <= 0:
            raise self.error
        return self.real(*args, **kwargs)


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("nth", [1, 2], ids=["tensors", "description"])
@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_full_disk_changes_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch, function: str, nth: int) -> None:
    before = contents(folder)
    with monkeypatch.context() as patch:
        patch.setattr(os, function, Fault(getattr(os, function), nth, FULL))
        with pytest.raises(
            ArtifactError, match=r"No space left on device; what was there is unchanged\. Free some space"
        ):
            write(folder, NEW, "new")
    assert_holds(folder, OLD, "old")
    assert contents(folder) == before, "not even the new tensors are left on the full disk"


def test_a_full_disk_does_not_cost_tensors_that_are_shared(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same tensors under another description: their file is the old artifact's, too."""
    monkeypatch.setattr(os, "fsync", Fault(os.fsync, 2, FULL))
    with pytest.raises(ArtifactError, match="No space left"):
        write(folder, OLD, "new")
    assert_holds(folder, OLD, "old")


class Crash(BaseException):
    """The process dies."""


@pytest.mark.parametrize("nth", [1, 2], ids=["before the first rename", "between the renames"])
def test_a_crash_leaves_the_old_artifact(folder: Path, monkeypatch: pytest.MonkeyPatch, nth: int) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", Fault(os.replace, nth, Crash()))
        with pytest.raises(Crash):
            write(folder, NEW, "new")
    assert_holds(folder, OLD, "old")
    write(folder, NEW, "new")
    assert_holds(folder, NEW, "new")
    assert len(contents(folder)) == 2, "what the crash left is cleared away"


@pytest.mark.parametrize("nth", [1, 2])
def test_ctrl_c_leaves_no_tensors_that_nothing_names(folder: Path, monkeypatch: pytest.MonkeyPatch, nth: int) -> None:
    """Nor takes those of a description that is in place."""
    before, real, calls = contents(folder), os.replace, iter(range(1, 9))

    def interrupted_after(source: Path, target: Path) -> None:
        real(source, target)
        if next(calls) == nth:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupted_after)
        with pytest.raises(KeyboardInterrupt):
            write(folder, NEW, "new")
    if nth == 1:
        assert contents(folder) == before
    else:
        assert_holds(folder, NEW, "new")


def test_a_description_that_cannot_be_read_again_costs_no_tensors(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreadable(path: Path) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", unreadable)
        write(folder, NEW, "new")
    assert_holds(folder, NEW, "new")
    write(folder, OLD, "newest")
    assert len(contents(folder)) == 2


def dead_process() -> int:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        return process.pid


def test_what_a_killed_writer_left_goes_with_the_next_write(folder: Path) -> None:
    dead = dead_process()
    rubbish = [
        f".thing.json.{dead}.part",
        f".thing-0123456789ab.safetensors.{dead}-01234567.part",
        f".thing.json.{os.getpid()}-01234567.part",  # of an earlier process with this one's number, as in containers
        "thing-0123456789ab.safetensors",
    ]
    others = [
        f".thing.json.{os.getppid()}-01234567.part",  # it runs
        f".another.json.{dead}.part",
        f".thing.json.{dead}.part.txt",
        f"thing.json.{dead}.part",
        ".thing.json.99999999999.part",
        ".thing.json.0.part",
    ]
    for name in rubbish + others:
        (folder / name).write_text("x")
    write(folder, NEW, "new")
    assert_holds(folder, NEW, "new")
    assert len(contents(folder)) == 2 + len(others)
    assert set(others) < set(contents(folder))
    (folder / rubbish[0]).write_text("x")
    (folder / rubbish[-1]).write_text("x")
    remove_artifact(folder, "thing")
    assert sorted(contents(folder)) == sorted(others)
    (folder / f".note.txt.{dead}.part").write_text("x")
    write_text(folder / "note.txt", "mine")
    assert sorted(contents(folder)) == sorted([*others, "note.txt"])


class Actor(threading.Thread):
    """Does its work up to the next file event whenever it has a turn."""

    def __init__(self, work: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self.work, self.go, self.paused = work, threading.Semaphore(0), threading.Semaphore(0)
        self.ended = self.waits = False
        self.result: Any = None

    def run(self) -> None:
        self.go.acquire()
        try:
            self.result = self.work()
        except Exception as error:
            self.result = error
        self.ended = True
        self.paused.release()

    def turn(self) -> None:
        self.go.release()
        self.paused.acquire()

    @staticmethod
    def pause() -> None:
        actor = threading.current_thread()
        if isinstance(actor, Actor):
            actor.paused.release()
            actor.go.acquire()


@pytest.fixture
def interleaved(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Iterator[list[Any]]]:
    """All orders in which the file events of several writers and readers can fall: yields the results, after each."""
    real_lock = fcntl.flock
    actors: list[Actor] = []

    def event(owner: Any, name: str, counts: Callable[..., bool]) -> None:
        real = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            if counts(*args):
                Actor.pause()
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    def lock(handle: int, how: int) -> None:
        Actor.pause()
        while True:
            try:
                return real_lock(handle, how | fcntl.LOCK_NB)
            except BlockingIOError:
                threading.current_thread().waits = True  # type: ignore[attr-defined]
                Actor.pause()

    def unlock(handle: int) -> None:
        real_close(handle)
        for actor in actors:
            actor.waits = False

    real_close = os.close
    monkeypatch.setattr(fcntl, "flock", lock)
    monkeypatch.setattr(os, "close", unlock)
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    event(os, "replace", lambda *args: True)
    event(os, "unlink", lambda path, *args: not Path(path).name.startswith("."))
    event(os, "open", lambda path, *args: not Path(path).is_dir())  # to read; folders are opened to be locked

    def run(prepare: Callable[[], list[Callable[[], Any]]]) -> Iterator[list[Any]]:
        choices: list[int] = []
        while True:
            actors[:] = [Actor(work) for work in prepare()]
            for actor in actors:
                actor.start()
            widths: list[int] = []
            while ready := [actor for actor in actors if not (actor.ended or actor.waits)]:
                if len(choices) == len(widths):
                    choices.append(0)
                widths.append(len(ready))
                ready[choices[len(widths) - 1]].turn()
            assert all(actor.ended for actor in actors), "they wait for each other"
            yield [actor.result for actor in actors]
            while choices and choices[-1] == widths[len(choices) - 1] - 1:
                choices.pop()
            if not choices:
                return
            choices[-1] += 1

    return run


def test_two_writers_leave_one_whole_artifact(folder: Path, interleaved: Callable[..., Iterator[list[Any]]]) -> None:
    """However their steps fall between one another's, also where one writes what is there."""

    def begin() -> list[Callable[[], Any]]:
        remove_artifact(folder, "thing")
        write(folder, OLD, "old")
        return [lambda: write(folder, NEW, "new"), lambda: write(folder, OLD, "again")]

    notes = []
    for results in interleaved(begin):
        assert results == [None, None]
        meta, read = read_artifact(folder, "thing", 1)
        np.testing.assert_array_equal(read["x"], (NEW if meta["note"] == "new" else OLD)["x"])
        assert len(contents(folder)) == 2
        notes.append(meta["note"])
    assert set(notes) == {"new", "again"}
    assert len(notes) > 10


def test_a_reader_during_two_saves_reads_a_whole_artifact(
    folder: Path, interleaved: Callable[..., Iterator[list[Any]]]
) -> None:
    def begin() -> list[Callable[[], Any]]:
        write(folder, OLD, "old")

        def save() -> None:
            write(folder, NEW, "new")
            write(folder, {"x": np.arange(5.0)}, "newest")

        return [save, lambda: read_artifact(folder, "thing", 1)]

    notes = []
    for _, found in interleaved(begin):
        assert not isinstance(found, Exception), found
        notes.append((found[0]["note"], len(found[1]["x"])))
    assert set(notes) == {("old", 3), ("new", 4), ("newest", 5)}
    assert len(notes) > 100


def test_a_new_artifact_that_is_in_place_is_not_called_a_failure(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Old tensors that cannot be deleted waste space; the new artifact is there all the same."""
    real = Path.unlink

    def unlink(path: Path, missing_ok: bool = False) -> None:
        if path.suffix == ".safetensors":
            raise PermissionError(errno.EPERM, "Operation not permitted")
        real(path, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", unlink)
        write(folder, NEW, "new")
    assert_holds(folder, NEW, "new")


def test_files_of_others_are_left_alone(folder: Path) -> None:
    for name in ("thing-of-mine.safetensors", "thingy.json", "another-0123456789ab.safetensors"):
        (folder / name).write_bytes(b"mine")
    write(folder, NEW, "new")
    remove_artifact(folder, "thing")
    assert sorted(contents(folder)) == ["another-0123456789ab.safetensors", "thing-of-mine.safetensors", "thingy.json"]


def test_removal(folder: Path) -> None:
    remove_artifact(folder, "thing")
    remove_artifact(folder, "thing")
    assert not contents(folder)


@pytest.mark.parametrize(
    "write_it", [lambda folder: write(folder, OLD, ""), lambda folder: write_text(folder / "a", "b")]
)
def test_a_folder_that_cannot_be_made(tmp_path: Path, write_it: Callable[[Path], None]) -> None:
    (tmp_path / "file").write_text("in the way")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ArtifactError, match=r"cannot write .*; what was there is unchanged\. .* choose a folder"):
            write_it(folder)
    assert contents(tmp_path) == {"file": b"in the way"}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), object(), {1, 2}])
def test_what_json_cannot_hold_is_refused_before_anything_is_written(folder: Path, value: Any) -> None:
    before = contents(folder)
    with pytest.raises(ArtifactError, match="cannot write thing"):
        write_artifact(folder, "thing", {"format": 1, "note": value}, NEW)
    assert contents(folder) == before


def test_text_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "sub" / "note.txt"
    write_text(file, "old")
    monkeypatch.setattr(os, "fsync", Fault(os.fsync, 1, FULL))
    with pytest.raises(ArtifactError, match=r"note\.txt: No space left"):
        write_text(file, "new")
    assert contents(tmp_path) == {"sub/note.txt": b"old"}


Damage = Callable[[Path], object]


def tensors_of(folder: Path) -> Path:
    return next(folder.glob("*.safetensors"))


def edit(**changes: Any) -> Damage:
    def damage(folder: Path) -> None:
        file = folder / "thing.json"
        meta = {**json.loads(file.read_text()), **changes}
        del meta["sha256"]  # as 0.1.0 wrote it
        file.write_text(json.dumps(meta))

    return damage


def edit_under_the_hash(folder: Path) -> None:
    file = folder / "thing.json"
    file.write_text(file.read_text().replace('"old"', '"new"'))


def in_place_of(name: str, make: Callable[[Path], object]) -> Damage:
    def damage(folder: Path) -> None:
        file = folder / "thing.json" if name == "description" else tensors_of(folder)
        file.unlink()
        make(file)

    return damage


def huge(file: Path) -> None:
    file.touch()
    os.truncate(file, LARGEST + 1)


def redirect(target: str) -> Damage:
    """Point the description at another file, its hash intact."""

    def damage(folder: Path) -> None:
        meta = json.loads((folder / "thing.json").read_text())
        (folder.parent / "outside.safetensors").write_bytes(tensors_of(folder).read_bytes())
        file = target.replace("PARENT", str(folder.parent))
        edit(tensors={**meta["tensors"], "file": file})(folder)

    return damage


def flip_a_bit(folder: Path) -> None:
    data = bytearray(tensors_of(folder).read_bytes())
    data[-1] ^= 1
    tensors_of(folder).write_bytes(data)


def truncate(share: float) -> Damage:
    def damage(folder: Path) -> None:
        file = tensors_of(folder)
        file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])

    return damage


DAMAGES: dict[str, tuple[Damage, str]] = {
    "no description": (
        lambda f: (f / "thing.json").unlink(),
        r"thing\.json does not exist; .* holds no complete thing",
    ),
    "no tensors": (lambda f: tensors_of(f).unlink(), r"\.safetensors does not exist; .* holds no complete thing"),
    "no folder": (lambda f: f.rename(f.with_name("gone")), r"does not exist"),
    "empty description": (lambda f: (f / "thing.json").write_text(""), r"not a readable thing: .* Copy it again"),
    "half a description": (lambda f: (f / "thing.json").write_text('{"format": 1, "te'), r"not a readable thing"),
    "binary description": (lambda f: (f / "thing.json").write_bytes(b"\xff\xfe\x00"), r"not a readable thing"),
    "deep description": (lambda f: (f / "thing.json").write_text("[" * 100_000), r"not a readable thing"),
    "a list": (lambda f: (f / "thing.json").write_text("[1]"), r"not a JSON object"),
    "no tensors named": (edit(tensors=None), r"not a readable thing"),
    "tensors named by a list": (edit(tensors={"file": ["x"], "sha256": ""}), r"thing"),
    "newer format": (edit(format=2), r"has format 2, this pathprune reads format 1; use the pathprune release"),
    "no format": (edit(format=None), r"has format None"),
    "parent's tensors": (redirect("../outside.safetensors"), r"lies outside the folder.*Copy it again"),
    "absolute tensors": (redirect("PARENT/outside.safetensors"), r"lies outside the folder"),
    "the folder as tensors": (redirect(".."), r"thing"),
    "another note": (
        edit_under_the_hash,
        r"its content does not have the recorded SHA-256; it was altered.*Copy it again",
    ),
    "a pipe": (in_place_of("description", os.mkfifo), r"thing\.json is no regular file"),
    "a pipe of tensors": (in_place_of("tensors", os.mkfifo), r"\.safetensors is no regular file"),
    "a device": (in_place_of("description", lambda file: file.symlink_to("/dev/zero")), r"is no regular file"),
    "a folder": (in_place_of("description", Path.mkdir), r"is no regular file"),
    "a huge description": (
        in_place_of("description", huge),
        r"thing\.json is larger than 16 MiB, the limit of a description",
    ),
    "a changed bit": (flip_a_bit, r"does not have the recorded SHA-256; it is truncated or was altered.*Copy it again"),
    "truncated": (truncate(0.6), r"does not have the recorded SHA-256"),
    "emptied": (truncate(0), r"does not have the recorded SHA-256"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_named_and_nothing_is_written(folder: Path, name: str) -> None:
    damage, message = DAMAGES[name]
    damage(folder)
    before = contents(folder.parent)
    with pytest.raises(ArtifactError, match=message):
        read_artifact(folder, "thing", 1)
    assert contents(folder.parent) == before
