"""Altered files against every reader: nothing but what was written, or an error of ours.

    python benchmarks/fuzz_readers.py --out benchmarks/results/fuzz.json
    python benchmarks/fuzz_readers.py --count 2000 --seed 1 --out build/fuzz.json

Small models are made, pruned and saved once. Then ``--count`` files are altered, as JSON or as bytes, and read: paths,
checkpoints, shape records, models of other libraries, elastic checkpoints, families. Where a file carries a checksum,
what is read must be what was written. Where the checksum was taken out (files of 0.1.0 have none), a model that loads
must run; how many of these compute something else is counted by itself. ``--guided`` runs are guided by coverage, by
``atheris`` where it is installed. Exit code 1: an error that is not ours, another content, or a limit exceeded.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import numpy as np
import safetensors.torch
import torch
import transformers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel

import pathprune as pp
from alterations import altered, damaged
from helpers import VOCAB, tiny_batches, tiny_bert
from pathprune.checkpoint.other_libraries import load_model
from pathprune.checkpoint.save import save_model
from pathprune.errors import PathpruneError
from pathprune.family.artifact import read_artifact
from pathprune.report import model_card
from pathprune.report.record import read_family, smaller_members
from pathprune.transform.modules import shape_modules
from pathprune.transform.record import PathpruneConfig
from pathprune.transform.record_checks import check_record
from recording import command, write_record

SECONDS, GROWTH = 5.0, 2**30  # limits of one read, and of all in memory
# What transformers itself raises on configurations and weights that are none.
THEIRS = (OSError, ValueError, RuntimeError)


UNUSABLE = "sliced and masked differ, without a checksum"


class Other(nn.Module):
    """A model of no library."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.out = nn.Linear(6, 16), nn.Linear(16, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x + self.fc2(torch.relu(self.fc1(x))))


def tiny_llama() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.3, max_position_embeddings=32,
    )  # fmt: skip
    return LlamaModel(config).eval()


def random_path(pairs: Any) -> pp.SolutionPath:
    rng = np.random.default_rng(0)
    return pp.SolutionPath.from_scores(pairs, {pair.name: rng.random(pair.shape) for pair in pairs}, multiple=2)


class Unusable:
    """A path that was read, and whose sliced model is not what masking gives."""


class Target:
    """A reader, with what it reads.

    Args:
        folder: of the files as written.
        changes: names of those that are altered, JSON where they end so.
        read: of the folder; what it gives is compared by ``same``.
        part: of the JSON that is ours, where not all is.
        unhash: take the checksums out first.
        header: alter names, shapes and types of tensors.
        theirs: errors of transformers that are no fault of ours.
    """

    def __init__(
        self,
        folder: Path,
        changes: list[str],
        read: Callable[[Path], Any],
        *,
        part: str = "",
        unhash: bool = False,
        header: bool = False,
        theirs: tuple[type[Exception], ...] = (),
    ) -> None:
        self.files = {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}
        self.changes, self.read, self.part, self.theirs = changes, read, part, theirs
        self.unhash, self.header = unhash, header
        self.counts: Counter[str] = Counter()
        self.change: Callable[[str, Random], bytes] = self.changed
        self.slowest, self.faults = 0.0, list[str]()
        self.folder = Path(tempfile.mkdtemp(dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
        self.restore()
        self.expected = read(self.folder)

    def restore(self) -> None:
        for name, data in self.files.items():
            self.put(name, data)

    def put(self, name: str, data: bytes) -> None:
        part = self.folder / ".part"  # renamed: a file that somebody has mapped may not change
        part.write_bytes(data)
        part.replace(self.folder / name)

    def changed(self, name: str, random: Random) -> bytes:
        data = self.files[name]
        if self.header:  # of safetensors: names, types, shapes and places
            return other_tensors(data, random)
        if not name.endswith(".json") or (not self.unhash and random.random() < 0.5):
            return damaged(data, random)
        document = json.loads(data)
        inner = document[self.part] if self.part else document
        if self.unhash:
            inner.pop("sha256", None)
            inner.pop("checksums", None)
            inner.pop("tensors", None) if self.part == "" and name == "pathprune.json" else None
        changed = altered(inner, random)
        if self.part:
            document[self.part] = changed
        return json.dumps(document if self.part else changed).encode()

    def bound(self, name: str, data: bytes) -> bool:
        """Whether a checksum is still there."""
        if self.unhash or not name.endswith(".json"):
            return not self.unhash
        document = json.loads(data)
        return "sha256" in (document[self.part] if self.part else document)

    def once(self, seed: str) -> None:
        random = Random(seed)
        name = random.choice(self.changes)
        data = self.change(name, random)
        self.put(name, data)
        begun = time.perf_counter()
        try:
            found = self.read(self.folder)
            outcome = "same" if same(found, self.expected) else "another, without a checksum"
            if found is Unusable:
                outcome = UNUSABLE
            if outcome != "same" and self.bound(name, data):
                outcome = "ANOTHER"
        except PathpruneError:
            outcome = "refused"
        except self.theirs as error:
            outcome = "refused by transformers"
            if "pathprune" in str(error):
                outcome = "refused"
        except Exception as error:
            outcome = f"RAW {type(error).__name__}: {str(error)[:200]}"
        took = time.perf_counter() - begun
        self.slowest = max(self.slowest, took)
        if outcome.isupper() or outcome.startswith("RAW") or took > SECONDS:
            self.faults.append(f"{seed}: {outcome}, {took:.2f} s")
        self.counts[outcome.partition(":")[0]] += 1
        self.put(name, self.files[name])

    def record(self) -> dict[str, Any]:
        return {
            "read": self.counts.total(),
            **self.counts,
            "slowest_s": round(self.slowest, 3),
            "faults": self.faults[:9],
        }


def other_tensors(data: bytes, random: Random) -> bytes:
    """A file of weights in which a tensor is gone, has another name, shape or type, or a neighbour's numbers."""
    tensors = safetensors.torch.load(data)
    name = random.choice(sorted(tensors))
    tensor, way = tensors.pop(name), random.randrange(6)
    if way == 1:
        tensors[random.choice(["x", name + "x", name.replace(".0.", ".1."), name.partition(".")[2]])] = tensor
    elif way == 2:
        tensors[name] = random.choice([tensor.flatten()[1:], tensor[:-1], tensor[None]])
    elif way == 3:
        tensors[name] = (100 * tensor).to(random.choice([torch.int8, torch.int64, torch.uint8, torch.bool]))
    elif way == 4:
        tensors[name] = torch.cat([tensor, tensor])
    elif way == 5:
        tensors[name] = tensor[:0]
    return bytes(safetensors.torch.save(tensors, metadata={"format": "pt"}))


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return one.shape == other.shape and bool(torch.equal(one, other))
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return bool(one == other)


def of_path(path: pp.SolutionPath) -> dict[str, Any]:
    base = path.pairs.base
    known = {"pairs": [*path.pairs], "base": base, "refused": path.pairs.refused, "unit": path.unit}
    return known | {name: getattr(path, name) for name in ("multiple", "seq_len", "ranking", "slope", "fill", "config")}


def targets(work: Path) -> dict[str, Target]:
    """Every reader with its files."""
    batch = tiny_batches(1)[0]
    bert, llama = tiny_bert(), tiny_llama()
    models: dict[str, tuple[Any, Any]] = {}
    for name, model in (("bert", bert), ("llama", llama)):
        path = random_path(pp.find_pairs(model))
        models[name] = model, path
        path.save(work / f"path-{name}")
        pp.save_model(pp.slice_model(model, path.select(pp.Budget(keep=0.5))), work / f"sliced-{name}")
    searched = pp.search(bert, tiny_batches(4), steps=6, progress=False)
    trained, elastic_path = pp.elastic(bert, searched, data=tiny_batches(4), steps=2, progress=False)
    trained.save_pretrained(work / "elastic")
    elastic_path.save(work / "elastic")
    other, inputs = Other().eval(), {"x": torch.randn(2, 6)}
    selection = random_path(pp.find_pairs(other, inputs)).select(pp.Budget(keep=0.5))
    save_model(pp.slice_model(other, selection), work / "other")
    interrupted(bert, work / "search")
    (work / "family").mkdir()
    (work / "family" / "family.json").write_text(json.dumps(family(searched)))

    def load_path(folder: Path) -> Any:
        return of_path(pp.SolutionPath.load(folder))

    def use_path(name: str) -> Callable[[Path], Any]:
        model, _ = models[name]

        def use(folder: Path) -> Any:
            path = pp.SolutionPath.load(folder)
            selection = path.select(pp.Budget(keep=0.5))
            small = pp.slice_model(model, selection)
            try:
                with torch.no_grad(), pp.masked(model, selection):
                    masked = model(**batch)[0]
                with torch.no_grad():
                    alike = torch.allclose(small(**batch)[0], masked, atol=1e-3, rtol=1e-3)
            except RuntimeError:
                alike = False
            return of_path(path) if alike else Unusable

        return use

    def load_sliced(folder: Path) -> Any:
        with torch.no_grad():
            return transformers.AutoModel.from_pretrained(folder)(**batch)[0]

    def load_elastic(folder: Path) -> Any:
        with torch.no_grad():
            return pp.load_slice(folder, pp.Budget(keep=0.5))(**batch)[0]

    def load_other(folder: Path) -> Any:
        with torch.no_grad():
            return load_model(Other().eval(), folder)(**inputs)

    def resume(name: str) -> Callable[[Path], Any]:
        return lambda folder: dict(zip("mt", read_artifact(folder, name, 1), strict=True))

    def report(folder: Path) -> Any:
        found = read_family(folder)
        for member in smaller_members(found):
            model_card(found, member).encode()
        return found

    tensors = {name: sorted(p.name for p in (work / name).glob("*-*.safetensors")) for name in ("path-bert", "elastic")}
    made = {
        "path.json": Target(work / "path-bert", ["path.json"], load_path),
        "tensors of a path": Target(work / "path-bert", tensors["path-bert"], load_path),
        "path.json without its hash, used": Target(work / "path-bert", ["path.json"], use_path("bert"), unhash=True),
        "the same of a Llama": Target(work / "path-llama", ["path.json"], use_path("llama"), unhash=True),
        "checkpoint of a search": Target(
            work / "search", sorted(p.name for p in (work / "search").glob("checkpoint*")), resume("checkpoint")
        ),
        "statistics of a search": Target(
            work / "search", sorted(p.name for p in (work / "search").glob("statistics*")), resume("statistics")
        ),
        "pathprune.json and weights": Target(work / "other", ["pathprune.json", "model.safetensors"], load_other),
        "pathprune.json without its hash": Target(work / "other", ["pathprune.json"], load_other, unhash=True),
        "path of an elastic model": Target(work / "elastic", ["path.json", *tensors["elastic"]], load_elastic),
        "family.json": Target(work / "family", ["family.json"], report, unhash=True),
    }
    for name in models:
        folder, part = work / f"sliced-{name}", "quantization_config"
        made |= {
            f"record of a {name}": Target(folder, ["config.json"], load_sliced, part=part),
            f"record of a {name} without its hash": Target(
                folder, ["config.json"], load_sliced, part=part, unhash=True
            ),
            f"header of the weights of a {name}": Target(
                folder, ["model.safetensors"], load_sliced, header=True, theirs=THEIRS
            ),
        }
    for name, target in made.items():
        if name.startswith("record"):  # bytes of config.json are transformers' own as well
            target.change = record_only(target)
    return made


def record_only(target: Target) -> Callable[[str, Random], bytes]:
    def change(name: str, random: Random) -> bytes:
        document = json.loads(target.files[name])
        inner = document[target.part]
        if target.unhash:
            del inner["sha256"]
        method = inner.pop("quant_method")  # without it, transformers does not call us
        document[target.part] = {**as_dict(altered(inner, random)), "quant_method": method}
        if not target.unhash:
            document[target.part].setdefault("sha256", inner["sha256"])
            if document[target.part]["sha256"] is None:
                document[target.part]["sha256"] = inner["sha256"]
        return json.dumps(document).encode()

    return change


def as_dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {"record": value}


def interrupted(model: Any, out: Path) -> None:
    """A search that was stopped, with its checkpoint."""
    with suppress(KeyboardInterrupt):
        pp.search(model, Stops(tiny_batches(8)), steps=24, progress=False, out=out)


class Stops(list[dict[str, Tensor]]):
    """Batches, until they are asked for too often."""

    asked = 0

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for batch in super().__iter__():
            self.asked += 1
            if self.asked > 20:
                raise KeyboardInterrupt
            yield batch


def family(path: pp.SolutionPath) -> dict[str, Any]:
    def member(name: str, keep: float) -> dict[str, Any]:
        sizes = path.select(pp.Budget(keep=keep)).to_dict()
        rest = {"bytes_on_disk": 9, "latency_ms": {"1": 5.0}, "quality": {"before": {"cosine": keep}}}
        return {"name": name, "folder": None if name == "dense" else name, "keep": keep, **sizes, **rest}

    base = path.pairs.base
    sizes = {"params": base.params, "prunable_params": path.pairs.prunable_params}
    return {
        "format": 1,
        "model": {"name": "org/tiny", "architecture": base.architecture, **sizes},
        "metrics": {"cosine": {"label": "cosine", "text": "of outputs", "dense": 1.0}},
        "members": [member("dense", 1.0), member("half", 0.5), member("quarter", 0.25)],
        "latency_tokens": 128,
        "settings": {"search": {"steps": 6}},
        "seconds": {"search": 1.0},
        "machine": {"processor": "one", "cores": 2},
        "versions": {"pathprune": "0"},
        "date": "2026-11-27",
    }


def special(work: Path, targets: dict[str, Target]) -> dict[str, float]:
    """Seconds that files take which could be read for ever; each must be refused."""
    seconds: dict[str, float] = {}

    def refused(what: str, target: Target, name: str, make: Callable[[Path], Any]) -> None:
        file = target.folder / name
        file.unlink()
        make(file)
        begun = time.perf_counter()
        try:
            target.read(target.folder)
            raise AssertionError(f"{what} was read")
        except PathpruneError:
            seconds[what] = round(time.perf_counter() - begun, 3)
        file.rmdir() if file.is_dir() and not file.is_symlink() else file.unlink()
        target.restore()

    def huge(file: Path) -> None:
        file.touch()
        os.truncate(file, 10**10)

    other, elastic = "pathprune.json and weights", "path of an elastic model"
    readers = [(name, name) for name in ("path.json", "family.json")]
    readers += [(elastic, "path.json"), (other, "pathprune.json"), (other, "model.safetensors")]
    for reader, name in (*readers, ("tensors of a path", targets["tensors of a path"].changes[0])):
        target = targets[reader]
        refused(f"a pipe as {name}, {reader}", target, name, os.mkfifo)
        refused(f"/dev/zero as {name}, {reader}", target, name, lambda file: file.symlink_to("/dev/zero"))
        refused(f"a folder as {name}, {reader}", target, name, Path.mkdir)
        if name.endswith(".json"):
            refused(f"10 GB as {name}, {reader}", target, name, huge)
            refused(
                f"15 MB of lists as {name}, {reader}",
                target,
                name,
                lambda file: file.write_text("[" + "[]," * 5 * 10**6 + "0]"),
            )
            refused(f"deep lists as {name}, {reader}", target, name, lambda file: file.write_text("[" * 10**6))
    target = targets["record of a llama without its hash"]
    document = json.loads(target.files["config.json"])
    many = 3 * 10**5
    entry = next(iter(document["quantization_config"]["record"]["modules"].values()))
    for what, part in {
        "modules": {f"layers.{i}.x": entry for i in range(many)},
        "rotary": {"layers.0.self_attn": list(range(many))},
        "attributes": {f"layers.{i}": {"head_dim": 2} for i in range(many)},
        "parameters": {f"layers.{i}": {"weight": [1]} for i in range(many)},
        "modules' places": {
            "layers.0.mlp.down_proj": {
                **entry, "in_features": many, "pad": {"side": "in", "positions": list(range(many)), "size": many}
            }
        },
    }.items():  # fmt: skip
        changed = copy.deepcopy(document)
        del changed["quantization_config"]["sha256"]
        changed["quantization_config"]["record"][what.partition("'")[0]] = part
        begun = time.perf_counter()
        try:
            config: Any = PathpruneConfig.from_dict(changed["quantization_config"])
            model = tiny_llama()
            check_record(model, config.record)
            shape_modules(model, config.record)
            raise AssertionError(f"a record of 300,000 {what} was read")
        except PathpruneError:
            seconds[f"a record of 300,000 {what}"] = round(time.perf_counter() - begun, 3)
    return seconds


def guided(runs: int, seed: int) -> dict[str, Any]:
    """Runs of the JSON readers that go where the code branches."""
    try:
        import atheris  # noqa: F401
    except ImportError:
        return {"runs": 0, "why": "atheris is not installed"}
    words = [
        sys.executable,
        __file__,
        "--child",
        "--",
        f"-runs={runs}",
        f"-seed={seed + 1}",
        "-max_len=256",
        "-timeout=5",
    ]
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=tempfile.mkdtemp())
    counted = re.findall(r"#(\d+)\s+(?:DONE|NEW|REDUCE|pulse|RELOAD|INITED)\s+cov: (\d+)", done.stderr)
    facts = {"runs": int(counted[-1][0]), "covered_edges": int(counted[-1][1])} if counted else {"runs": 0}
    return facts | {"exit_code": done.returncode, "end": "" if done.returncode == 0 else done.stderr[-1500:]}


def child(arguments: list[str]) -> None:
    """One process of ``guided``: never returns."""
    import atheris

    with tempfile.TemporaryDirectory() as name:
        made = targets(Path(name))
    chosen = [
        made[name] for name in ("path.json without its hash, used", "family.json", "pathprune.json without its hash")
    ]
    records = [
        json.loads(made[f"record of a {name}"].files["config.json"])["quantization_config"]
        for name in ("bert", "llama")
    ]
    for document in records:
        del document["sha256"], document["quant_method"]

    def describe(folder: Path) -> Any:
        return pp.SolutionPath.load(folder)

    chosen[0].read = describe
    for module in [module for name, module in sys.modules.items() if name.startswith("pathprune.")]:
        for function in [f for f in vars(module).values() if getattr(f, "__module__", "") == module.__name__]:
            if callable(function) and hasattr(function, "__code__"):
                atheris.instrument_func(function)
    for function in (PathpruneConfig.__init__, pp.SolutionPath.from_artifact.__func__, pp.SolutionPath.__post_init__):  # type: ignore[attr-defined]
        atheris.instrument_func(function)

    class Told(Random):
        """Chooses as the fuzzer's bytes say."""

        def __init__(self, data: bytes) -> None:
            super().__init__(0)
            self.provider = atheris.FuzzedDataProvider(data)

        def random(self) -> float:
            return float(self.provider.ConsumeIntInRange(0, 2**16 - 1)) / 2**16

        def getrandbits(self, k: int) -> int:
            return int(self.provider.ConsumeIntInRange(0, 2**k - 1))

        def randrange(self, start: int, stop: int | None = None, step: int = 1) -> int:
            low, high = (0, start) if stop is None else (start, stop)
            return int(self.provider.ConsumeIntInRange(low, high - 1))

        def choice(self, seq: Any) -> Any:
            return seq[self.randrange(len(seq))]

        def randint(self, a: int, b: int) -> int:
            return self.randrange(a, b + 1)

    def one(data: bytes) -> None:
        random = Told(data)
        which = random.randrange(len(chosen) + len(records))
        try:
            if which < len(chosen):
                target = chosen[which]
                name = target.changes[0]
                target.put(name, target.change(name, random))
                target.read(target.folder)
            else:
                PathpruneConfig.from_dict(as_dict(altered(records[which - len(chosen)], random)))
        except PathpruneError:
            pass

    atheris.Setup([sys.argv[0], *arguments], one)
    atheris.Fuzz()


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--out", type=Path, help="JSON file to write")
    made.add_argument("--count", type=int, default=100_000, help="altered files")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--guided", type=int, default=20_000, help="runs guided by coverage")
    made.add_argument("--only", help="readers whose names have this in them")
    made.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    made.add_argument("rest", nargs="*", help=argparse.SUPPRESS)
    args = made.parse_args()
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity(logging.CRITICAL)
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    if args.child:
        child(args.rest)
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        found = targets(Path(name))
    times = special(Path(name), found)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    chosen = {name: target for name, target in found.items() if not args.only or args.only in name}
    # Readers that build a model cost twenty times as much as the others, and have a fifth of the files.
    heavy = [name for name in chosen if name.startswith(("record", "header", "path of", "the same")) or "used" in name]
    weights = {name: 1 if name in heavy else 5 for name in chosen}
    for name, target in chosen.items():
        for i in range(round(args.count * weights[name] / sum(weights.values()))):
            target.once(f"{args.seed}/{name}/{i}")
        print(f"{time.perf_counter() - begun:.0f} s, {name}: {target.record()}", flush=True)
    growth = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    rows = {name: target.record() for name, target in chosen.items()}
    coverage = guided(args.guided, args.seed) if args.guided else {"runs": 0}
    faults = sum(len(target.faults) for target in chosen.values())
    slowest = max([*times.values(), *(target.slowest for target in chosen.values())])
    record = {
        "command": command(),
        "altered_files": sum(row["read"] for row in rows.values()),
        "errors_that_are_not_ours": sum(
            row.get(key, 0) for row in rows.values() for key in row if key.startswith("RAW")
        ),
        "another_content_in_silence": sum(row.get("ANOTHER", 0) for row in rows.values()),
        "another_content_without_a_checksum": sum(row.get("another, without a checksum", 0) for row in rows.values()),
        "unusable_without_a_checksum": sum(row.get(UNUSABLE, 0) for row in rows.values()),
        "slowest_s": slowest,
        "memory_growth_mb": round(growth / 1e6),
        "readers": rows,
        "files_that_could_be_read_for_ever_s": times,
        "guided": coverage,
        "seconds": round(time.perf_counter() - begun),
    }
    if args.out:
        write_record(args.out, record)
    print(json.dumps(record, indent=1))
    sys.exit(bool(faults or slowest > SECONDS or growth > GROWTH or coverage.get("exit_code")))


if __name__ == "__main__":
    main()
