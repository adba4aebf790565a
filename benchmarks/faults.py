"""What a fault at a file event costs: everything that writes, killed or failed at each of its file events.

    python benchmarks/faults.py --out benchmarks/results/faults.json --every 3 --every-slow 29
    python benchmarks/faults.py --out build/faults.json --every 23 --every-slow 199   # a sample, as the tests take

A fault falls in a forked child, before the n-th file event (open, rename, delete, mkdir, link, fsync, lock, exchange,
...) below the folder that is written to. After it, what the name holds must be the whole old artifact or the whole
new one, with all that stood beside it; and after the next run nothing else may be there, hidden or not.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # a process of one thread may be forked
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
sys.path.append(str(Path(__file__).parents[1] / "tests"))

import torch
import tqdm
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModel, PreTrainedTokenizerFast

import pathprune as pp
from helpers import VOCAB, tiny_batches, tiny_bert
from pathprune.checkpoint import folders
from pathprune.cli import app as cli
from pathprune.family.artifact import read_artifact
from pathprune.family.files import PARTS
from pathprune.family.path import FORMAT
from pathprune.ranking import run as searching
from recording import command, write_record

FILE_EVENTS = re.compile(
    r"open|os\.(rename|remove|mkdir|rmdir|link|symlink|chmod|utime|truncate|scandir|listdir)|fcntl\.flock"
)
WRITING = re.compile(r"open for writing|os\.(mkdir|link|symlink)|fsync")
# name -> what happens at the event, and whether it happens at all later ones, too.
FAULTS: dict[str, tuple[Callable[[], BaseException | None], bool]] = {
    "kill -9": (lambda: os.kill(os.getpid(), signal.SIGKILL), False),
    "SIGTERM": (lambda: os.kill(os.getpid(), signal.SIGTERM), False),
    "Ctrl-C": (KeyboardInterrupt, False),
    "Ctrl-C again and again": (KeyboardInterrupt, True),
    "an I/O error": (lambda: OSError(errno.EIO, "Input/output error"), False),
    "a disk that is full from then on": (lambda: OSError(errno.ENOSPC, "No space left on device"), True),
    "no memory": (MemoryError, False),
}
BAD = ("lost", "not_finished_by_the_next_run", "errors_that_are_not_ours")
Listing = dict[str, bytes]


class Events:
    """Counts a process's file events below ``root``; at the n-th, the fault falls.

    Python announces what it does with files to audit hooks, which may raise; fsync, the exchange and what safetensors
    writes are announced here.
    """

    def __init__(self, root: Path, fault: str | None, at: int) -> None:
        self.root, self.at, self.count, self.inside = str(root), at, 0, False
        self.act, self.stays = FAULTS[fault] if fault else (lambda: None, False)
        self.only_writes = fault == "a disk that is full from then on"
        sys.addaudithook(self.hook)
        for owner, name in (
            (os, "fsync"),
            (folders, "exchange"),
            (transformers.modeling_utils, "safe_save_file"),
        ):
            setattr(owner, name, self.announced(name, getattr(owner, name)))

    def announced(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.event("fsync" if name == "safe_save_file" else name)
            return real(*args, **kwargs)

        return call

    def hook(self, name: str, args: tuple[Any, ...]) -> None:
        if not FILE_EVENTS.fullmatch(name) or self.inside:
            return
        below = [str(a).startswith(self.root) for a in args[:2] if isinstance(a, str | os.PathLike)]
        relative = name in ("os.remove", "os.rmdir") and args[-1] != -1  # of rmtree, to an open folder
        if any(below) or relative or name == "fcntl.flock":
            writes = name == "open" and isinstance(args[1], str) and "r" not in args[1]
            self.event("open for writing" if writes else name)

    def event(self, name: str) -> None:
        self.count += 1
        if self.only_writes and not WRITING.fullmatch(name):
            return
        if self.count == self.at or (self.stays and self.count > self.at > 0):
            self.inside = True
            error = self.act()
            self.inside = False
            if isinstance(error, BaseException):
                raise error


@dataclass(frozen=True)
class Ended:
    """How a child ended: its exit code (of a kill, minus the signal), its file events, and its last words."""

    code: int
    events: int
    said: str


def child(work: Callable[[], Any], root: Path, fault: str | None = None, at: int = 0) -> Ended:
    """Do something in a process of its own."""
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        code, said, events = 1, "", None
        try:
            for stream in (1, 2):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
            events = Events(root, fault, at)
            try:
                work()
                code = 0
            except SystemExit as stop:
                code = int(stop.code or 0)
            except pp.PathpruneError as error:
                code, said = 2, str(error)
            except KeyboardInterrupt:
                code = 130
            except MemoryError:
                code = 3
        except BaseException:
            said = traceback.format_exc()
        finally:
            if events is not None:
                events.at = 0
                os.write(writing, json.dumps((events.count, said[-3000:])).encode())
            os._exit(code)
    os.close(writing)
    with os.fdopen(reading, "rb") as told:
        data = told.read()
    _, status = os.waitpid(process, 0)
    return Ended(os.waitstatus_to_exitcode(status), *(json.loads(data) if data else (0, "")))


def listing(root: Path) -> Listing:
    """Every file and link below, but for what stands hidden beside a name until the next run."""
    found: Listing = {}
    for file in sorted(root.rglob("*")):
        if file.is_symlink():
            found[str(file.relative_to(root))] = os.fsencode(os.readlink(file))
        elif file.is_file():
            found[str(file.relative_to(root))] = file.read_bytes()
    return {name: content for name, content in found.items() if not hidden(name)}


def hidden(name: str) -> bool:
    return any(re.fullmatch(rf"\..+{PARTS}", part) for part in Path(name).parts)


@dataclass(frozen=True)
class Scenario:
    """Something that writes into a folder ``root``.

    Args:
        before: makes what stands there.
        work: is killed.
        again: the next run, which must end well.
        whole: whether ``root`` holds what was there before, or what the work makes: (root, before, after).
    """

    name: str
    before: Callable[[Path], Any]
    work: Callable[[Path], Any]
    again: Callable[[Path], Any]
    whole: Callable[[Path, Listing, Listing], bool]


def whole_model(root: Path, before: Listing, after: Listing) -> bool:
    return listing(root) in (before, after)


def whole_when_settled(root: Path, before: Listing, after: Listing) -> bool:
    """Where folders are not exchanged: as the next command finds it."""
    return child(lambda: folders.check_free(root / "model"), root).code == 0 and whole_model(root, before, after)


def whole_path(root: Path, before: Listing, after: Listing) -> bool:
    """What a search keeps until it ends is proved by going on with it."""
    try:
        read_artifact(root, "path", FORMAT)
    except pp.ArtifactError:
        return "path.json" not in before and not (root / "path.json").exists()
    return (root / "path.json").read_bytes() in [held.get("path.json") for held in (before, after)]


class Materials:
    """Tiny models, a path, texts: made once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = tiny_bert()
        pairs = pp.find_pairs(self.model, tiny_batches()[0])
        self.paths = [
            pp.SolutionPath.from_scores(
                pairs, {p.name: torch.rand(*p.shape, generator=torch.Generator().manual_seed(seed)) for p in pairs}
            )
            for seed in (0, 1)
        ]
        self.small = [pp.slice_model(self.model, path.select(pp.Budget(keep=0.5))) for path in self.paths]
        self.dense, self.texts, self.run = folder / "dense", folder / "texts.txt", folder / "run"
        assert child(self.make, folder).code == 0

    def make(self) -> None:
        self.model.save_pretrained(self.dense)
        vocab = {"[PAD]": 0, "[UNK]": 1, **{f"w{i}": i for i in range(2, VOCAB)}}
        core = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
        core.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]")
        tokenizer.save_pretrained(self.dense)
        generator = torch.Generator().manual_seed(0)
        lines = [" ".join(f"w{i}" for i in torch.randint(2, VOCAB, (6,), generator=generator)) for _ in range(64)]
        self.texts.write_text("\n".join(lines))
        self.search(self.run)

    def save(self, which: int, root: Path, **settings: Any) -> None:
        pp.save_model(self.small[which], root / "model", **settings)

    def old_model(self, root: Path) -> None:
        """With what a user may have put there, and weights of another form that must go."""
        self.save(0, root, card="old")
        for name in ("notes/deep/thesis.txt", "path.json", "path-0123456789ab.safetensors", "pytorch_model.bin"):
            (root / "model" / name).parent.mkdir(parents=True, exist_ok=True)
            (root / "model" / name).write_text(name)
        (root / "model" / "link").symlink_to("notes")

    def search(self, root: Path, seed: int = 0, **settings: Any) -> None:
        searching.CHECKPOINT_EVERY = 3
        pp.search(self.model, tiny_batches(), steps=8, multiple=2, seed=seed, progress=False, out=root, **settings)

    def search_on(self, root: Path) -> None:
        """Whatever a user would do next."""
        if (root / "checkpoint.json").exists():
            self.search(root, resume=True)
        else:
            self.search(root, overwrite=True)

    def command(self, *words: object) -> None:
        searching.CHECKPOINT_EVERY = 3
        sys.argv = ["pathprune", *map(str, words)]
        cli.main()

    def scenarios(self) -> list[Scenario]:
        def nothing(root: Path) -> None:
            pass

        def renaming(work: Callable[[Path], Any]) -> Callable[[Path], Any]:
            def without(root: Path) -> None:
                folders.exchange = lambda one, other: False
                work(root)

            return without

        def unlinked(work: Callable[[Path], Any]) -> Callable[[Path], Any]:
            def without(root: Path) -> None:
                folders.link_rest = lambda folder, part: False
                work(root)

            return without

        def new(root: Path) -> None:
            self.save(1, root, source=self.dense, card="new")

        def new_pair(root: Path) -> None:
            self.save(1, root, path=self.paths[1])

        data = ("--data", self.texts, "--batch-size", 8)
        searching_ = ("search", self.dense, *data, "--steps", 8, "--multiple", 2, "--out")
        cutting = ("slice", self.run, self.dense, "--keep", 0.5, "--overwrite", "--out")

        def told(*words: object) -> Callable[[Path], None]:
            return lambda root: self.command(*words, root / "model")

        def search_told(root: Path) -> None:
            self.command(*searching_, root)

        def search_told_again(root: Path) -> None:
            more = ["--resume"] if (root / "checkpoint.json").exists() else ["--overwrite"]
            self.command(*searching_, root, *more)

        def cut_half(root: Path) -> None:
            self.save(0, root)

        half = self.folder / "half"
        assert child(lambda: self.command(*cutting, half), self.folder).code == 0
        recovering = ("recover", half, "--teacher", self.dense, *data, "--steps", 2, "--overwrite", "--out")
        training = ("elastic", self.run, self.dense, *data, "--steps", 2, "--overwrite", "--out")
        return [
            Scenario("save_model", nothing, new, new, whole_model),
            Scenario("save_model over another", self.old_model, new, new, whole_model),
            Scenario("save_model with its path over another", self.old_model, new_pair, new_pair, whole_model),
            Scenario("save_model without exchange", self.old_model, renaming(new), new, whole_when_settled),
            Scenario("save_model without links", self.old_model, unlinked(new), new, whole_when_settled),
            Scenario("SolutionPath.save", nothing, self.paths[1].save, self.paths[1].save, whole_path),
            Scenario(
                "SolutionPath.save over another", self.paths[0].save, self.paths[1].save, self.paths[1].save, whole_path
            ),
            Scenario("search", nothing, self.search, self.search_on, whole_path),
            Scenario(
                "search over another",
                lambda root: self.search(root, seed=1),
                lambda root: self.search(root, overwrite=True),
                self.search_on,
                whole_path,
            ),
            Scenario("pathprune search", nothing, search_told, search_told_again, whole_path),
            Scenario("pathprune slice", cut_half, told(*cutting), told(*cutting), whole_model),
            Scenario("pathprune recover", cut_half, told(*recovering), told(*recovering), whole_model),
            Scenario("pathprune elastic", new_pair, told(*training), told(*training), whole_model),
        ]


def campaign(scenario: Scenario, folder: Path, every: int, first: int) -> dict[str, Any]:
    """All faults at all events, or one in ``every`` of these, beginning with the ``first``."""
    began = time.perf_counter()
    root, kept = folder / "root", folder / "before"

    def fresh() -> None:
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(kept, root, symlinks=True)

    def run(work: Callable[[Path], Any], *fault: Any) -> Ended:
        return child(lambda: work(root), root, *fault)

    root.mkdir(parents=True)
    assert run(scenario.before).code == 0
    root.rename(kept)
    fresh()
    before = listing(root)
    unharmed = run(scenario.work)
    assert unharmed.code == 0, unharmed.said
    after = listing(root)
    assert before != after
    codes, lost, unfinished, raw = Counter[str](), [], [], []
    cases = [(fault, at) for at in range(1, unharmed.events + 1) for fault in FAULTS]
    for fault, at in cases[first % every :: every]:
        fresh()
        ended = run(scenario.work, fault, at)
        codes[str(ended.code)] += 1
        what = {"fault": fault, "event": at, "code": ended.code, "said": ended.said}
        if ended.code == 1:
            raw.append(what)
        if not scenario.whole(root, before, after):
            lost.append({**what, "holds": sorted(map(str, root.rglob("*")))})
        then = run(scenario.again)
        rest = [str(file.relative_to(root)) for file in root.rglob("*") if hidden(file.name)]
        if then.code or listing(root) != after or rest:
            unfinished.append({**what, "then": then.said, "left": rest})
    shutil.rmtree(folder)
    return {
        "scenario": scenario.name,
        "file_events": unharmed.events,
        "faults": codes.total(),
        "lost": lost,
        "not_finished_by_the_next_run": unfinished,
        "errors_that_are_not_ours": raw,
        "exit_codes": dict(sorted(codes.items())),
        "seconds": round(time.perf_counter() - began, 1),
    }


def loads(materials: Materials, folder: Path) -> None:
    """That what the campaign takes for whole models are the models, by their outputs."""
    batch = tiny_batches()[0]
    for which in (0, 1):
        root = folder / str(which)
        (materials.old_model if which == 0 else lambda root: materials.save(1, root))(root)
        with torch.no_grad():
            found = AutoModel.from_pretrained(root / "model")(**batch)[0]
            assert (found - materials.small[which](**batch)[0]).abs().max() < 1e-5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--every", type=int, default=1, help="take one of so many faults")
    parser.add_argument("--every-slow", type=int, default=1, help="the same where a model is searched or trained")
    parser.add_argument("--only", default="", help="scenarios whose name has this in it")
    args = parser.parse_args()
    torch.set_num_threads(1)
    tqdm.tqdm.monitor_interval = 0  # no thread
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary).resolve()
        materials = Materials(folder)
        ended = child(lambda: loads(materials, folder / "loads"), folder)
        assert ended.code == 0, ended.said
        rows: list[dict[str, Any]] = []
        for scenario in materials.scenarios():
            if args.only not in scenario.name:
                continue
            slow = scenario.name.startswith(("search", "pathprune"))
            row = campaign(scenario, folder / "campaign", args.every_slow if slow else args.every, len(rows))
            rows.append(row)
            bad = {key: len(row[key]) for key in BAD}
            print(f"{row['scenario']}: {row['faults']} faults at {row['file_events']} events, {bad}", flush=True)
    total = {key: sum(len(row[key]) for row in rows) for key in BAD}
    record = {"command": command(), "faults": sum(row["faults"] for row in rows), **total, "scenarios": rows}
    write_record(args.out, record)


if __name__ == "__main__":
    main()
