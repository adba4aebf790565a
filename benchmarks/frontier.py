"""Every method at every size: quality against size, on the same data, budget and definition of size.

    pip install --no-deps -r benchmarks/peers.txt
    python benchmarks/frontier.py --model minilm --out benchmarks/results/frontier-minilm.json \
        --plot docs/frontier-minilm.svg

A size is a share of the prunable parameters, those that belong to a pair (``pathprune.find_pairs``); all methods
remove inner units only. No method recovers by training, none sees a label, and each may take ``--steps``
forward-backward passes over the same batches, for each size if it makes one size at a time. Methods and their sources
are in ``benchmarks/baselines``, models and what is measured in ``benchmarks/models.py``.

Runs that ``--out`` already holds are kept, and are not made again; each names the commit that made it. With
``--jobs``, so many run side by side, each in a process of its own: quality is the same, seconds are longer.

For every method the record holds the seconds that all sizes took together (``family_seconds``) and the seconds
of one size alone (``one_size_seconds``, what all sizes share and the mean of what each takes by itself).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

import pathprune as pp
from baselines import METHODS, Problem
from baselines.peers import prunable_left
from models import MODELS
from pathprune.family.files import write_text
from pathprune.objectives.choose import get_objective
from pathprune.report.plots import BLUE, GREEN, ORANGE, SKY, SOFT, VERMILLION, as_svg, log_axis
from recording import COMMIT, command, parser, search_settings, write_record

COLOURS = (BLUE, ORANGE, GREEN, SKY, SOFT)
MARKERS = "sD^v<>XPd*p8"


def measure(method: Callable[[Problem], Any], problem: Problem, subject: Any) -> dict[str, Any]:
    """One method on one seed: its seconds, and the quality of every size. An error is a result, too."""
    start = time.perf_counter()
    rows: list[dict[str, Any]] = []
    run: dict[str, Any] = {"rows": rows}
    try:
        family = method(problem)
        run["shared_seconds"] = time.perf_counter() - start
        for keep in subject.keeps:
            start = time.perf_counter()
            found = family.select(pp.Budget(keep=keep)) if isinstance(family, pp.SolutionPath) else family(keep)
            small = pp.slice_model(problem.dense, found) if isinstance(found, pp.Selection) else found
            seconds = time.perf_counter() - start
            kept = prunable_left(small, problem) / problem.pairs.prunable_params
            rows.append({"keep": keep, "kept": kept, "seconds": seconds, **subject.quality(small)})
    except Exception as error:  # one method's failure must not cost the others' hours
        run["error"] = f"{type(error).__name__}: {error}"
    if len(rows) == len(subject.keeps):
        each = [row["seconds"] for row in rows]
        run["family_seconds"] = run["shared_seconds"] + sum(each)
        run["one_size_seconds"] = run["shared_seconds"] + statistics.mean(each)
    return run


def held(out: Path, setting: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The runs in a record of the same setting, by method; those that failed are left out."""
    if not out.exists():
        return {}
    record = json.loads(out.read_text())
    if differs := [
        f"{name}={record.get(name)!r}, now {setting[name]!r}" for name in setting if record.get(name) != setting[name]
    ]:
        raise SystemExit(f"{out} holds runs with {'; '.join(differs)}. Choose another --out, or remove it")
    return {name: [run for run in runs if "error" not in run] for name, runs in record["runs"].items()}


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation over seeds of everything measured; runs that failed are left out."""
    whole = [run for run in runs if "error" not in run]
    if not whole:
        return {"error": runs[0]["error"]}
    rows = []
    for same in zip(*(run["rows"] for run in whole), strict=True):
        row: dict[str, Any] = {"keep": same[0]["keep"]}
        for name in same[0]:
            if name != "keep":
                values = [one[name] for one in same]
                row[name] = {
                    "mean": statistics.mean(values),
                    "std": statistics.stdev(values) if len(values) > 1 else None,
                }
        rows.append(row)
    seconds = {name: statistics.mean(run[name] for run in whole) for name in ("family_seconds", "one_size_seconds")}
    return {"seeds": len(whole), "rows": rows, **seconds}


@as_svg
def frontier(record: dict[str, Any]) -> Figure:
    """Loss of quality against size, one line for each method, with the standard deviation over seeds.

    Args:
        record: what ``main`` writes.
    """
    methods = {name: found for name, found in record["methods"].items() if "rows" in found}
    losses = {name: [row["loss"]["mean"] for row in found["rows"]] for name, found in methods.items()}
    figure = Figure(figsize=(8.2, 5))
    axes = figure.subplots()
    for i, name in enumerate(sorted(methods, key=lambda name: -statistics.mean(losses[name]))):  # as they stand
        rows = methods[name]["rows"]
        first = name == "ours"
        axes.errorbar(
            [row["kept"]["mean"] for row in rows],
            losses[name],
            [row["loss"]["std"] or float("nan") for row in rows],  # no bar where there was one seed
            color=VERMILLION if first else COLOURS[i % len(COLOURS)],
            marker="o" if first else MARKERS[i % len(MARKERS)],
            linewidth=2.4 if first else 1.1,
            markersize=6 if first else 5,
            capsize=2.5,
            zorder=3 if first else 2,
            label=name,
        )
    every = np.array(list(losses.values()))
    if every.min() > 0:
        log_axis(axes, every)
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_xlabel("prunable parameters kept")
    axes.set_ylabel(record["loss"])
    axes.set_title(f"{record['model']}, no recovery")
    figure.legend(loc="outside right upper")
    return figure


def bench_parser(description: str | None, *, seeds: int) -> argparse.ArgumentParser:
    """The arguments that a ``Bench`` reads, and those of every benchmark."""
    arguments = parser(description, steps=None, seeds=seeds)
    arguments.add_argument("--model", required=True, choices=list(MODELS))
    arguments.add_argument("--keeps", type=float, nargs="+", metavar="SHARE", help="sizes, in place of the model's own")
    arguments.add_argument("--device", default="cpu", help="that runs the models, such as cuda")
    return arguments


class Bench:
    """Runs methods on one model, with what all of its runs share.

    Args:
        args: the command line.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.subject = MODELS[args.model](args.split, args.device)
        self.subject.keeps = tuple(args.keeps or self.subject.keeps)
        self.steps = args.steps or self.subject.steps
        self.settings = search_settings(args)
        self.subject.searched.requires_grad_(False).config.use_cache = False

    @lru_cache(maxsize=1)  # noqa: B019 (it lives as long as the process)
    def problem(self, seed: int) -> Problem:
        model, batches = self.subject.searched, self.subject.batches(seed, self.steps)
        pairs, objective = pp.find_pairs(model, batches[0]), get_objective(self.subject.objective, model, batches[0])
        return Problem(model, self.subject.dense, pairs, batches, objective, self.steps, seed, self.settings)

    def __call__(self, name: str, seed: int) -> dict[str, Any]:
        return {"seed": seed, "commit": COMMIT, **measure(METHODS[name], self.problem(seed), self.subject)}


BENCH: Bench  # set by ``begin``


def begin(args: argparse.Namespace) -> None:
    """In each process of a pool."""
    global BENCH
    BENCH = Bench(args)


def work(name: str, seed: int) -> dict[str, Any]:
    return BENCH(name, seed)


def results(bench: Bench, args: argparse.Namespace, todo: list[tuple[str, int]]) -> Iterator[tuple[str, Any]]:
    """Method and run, as they come, of methods and seeds."""
    if args.jobs == 1:
        yield from ((name, bench(name, seed)) for name, seed in todo)
        return
    spawn = multiprocessing.get_context("spawn")  # a process that was forked cannot use the GPU
    with ProcessPoolExecutor(args.jobs, spawn, begin, (args,)) as pool:
        futures = {pool.submit(work, name, seed): name for name, seed in todo}
        yield from ((futures[future], future.result()) for future in as_completed(futures))


def main() -> None:
    arguments = bench_parser(__doc__, seeds=3)
    arguments.add_argument("--plot", type=Path, help="SVG file to write")
    arguments.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS), metavar="METHOD")
    arguments.add_argument("--jobs", type=int, default=1, help="runs side by side")
    args = arguments.parse_args()

    bench = Bench(args)
    subject, pairs, count = bench.subject, bench.problem(0).pairs, len(bench.problem(0).batches)
    dense_quality = subject.quality(subject.dense)
    print(json.dumps({"dense": dense_quality}), flush=True)
    setting: dict[str, Any] = {
        "model": subject.label,
        "split": args.split,
        "steps": bench.steps,
        "keeps": list(subject.keeps),
        "settings": bench.settings,
    }
    commands, runs = [command()], held(args.out, setting)
    if args.out.exists():
        commands = [*json.loads(args.out.read_text())["commands"], *commands]
    todo = [
        (name, seed)
        for seed in range(args.seeds)
        for name in args.methods
        if all(run["seed"] != seed for run in runs.get(name, ()))
    ]
    for name, run in results(bench, args, todo):
        runs[name] = sorted([*runs.get(name, ()), run], key=lambda run: run["seed"])
        print(json.dumps({"method": name, **run}), flush=True)
        record = {
            "commands": commands,
            **setting,
            "params": pairs.base.params,
            "prunable_params": pairs.prunable_params,
            "batches": count,
            "loss": subject.loss_label,
            "dense": dense_quality,
            "methods": {name: summary(runs[name]) for name in METHODS if runs.get(name)},
            "runs": runs,
        }
        write_record(args.out, record)  # after every run: all take hours
    if args.plot:
        write_text(args.plot, frontier(json.loads(args.out.read_text())))


if __name__ == "__main__":
    main()
