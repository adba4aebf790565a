"""The whole contract on a small random model of every architecture that the installed ``transformers`` has.

    python benchmarks/coverage.py --out benchmarks/results/coverage.json --table docs/coverage.md
    python benchmarks/coverage.py --only bert,llama

For each configuration type: build a small model, run it on ``example_inputs``, find its pairs, and check that

- the sliced model computes what the masked model computes, for random rankings at two sizes,
- a search of a few steps runs, and what it found computes the same sliced as masked: rotations, fills, compensation,
- saved and loaded it is the same model,
- gradients reach what they reach in the masked model,
- a model that generates gives the same tokens with and without its cache, if the masked model does.

Nothing is downloaded. Each architecture has a time limit and runs in a process that may not take all memory.
"""

from __future__ import annotations

import argparse
import copy
import gc
import importlib.metadata
import json
import multiprocessing
import os
import re
import resource
import time
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import pathprune as pp
import zoo
from pathprune.discovery.dummy_inputs import example_inputs
from pathprune.errors import DataError, UnsupportedModelError
from pathprune.evaluation import machine
from pathprune.family.files import write_text
from pathprune.transform.masks import masked
from pathprune.versions import library_versions
from recording import command

KEEPS = (0.7, 0.4)
SEEDS = 2
STEPS = 4  # of the search
DIFFER = "masked: tokens differ too"
MEMORY = 8 << 30  # bytes of address space of one process
# Relative differences of outputs: in float64, in float64 where the model's own code rounds activations to float32 on
# the way, and in float32 where it cannot run in float64.
DOUBLE, MIXED, SINGLE = 1e-8, 1e-6, 1e-3
RELOADED = 1e-12  # of a model that was saved and loaded, in float64


# One architecture.


def examine(model_type: str) -> dict[str, Any]:
    """One row of the result; ``status`` says how far it came and ``reason`` why no further."""
    row: dict[str, Any] = {"type": model_type, "status": "not built"}
    try:
        cls = zoo.model_class(model_type)
    except (LookupError, ImportError) as error:
        return {**row, "reason": _said(error)}
    row["class"] = cls.__name__
    model, inputs = _running(cls, model_type, row)
    if model is None:
        return row
    row["transformer"] = any(re.search(r"attention|attn", type(m).__name__, re.I) for m in model.modules())
    row["inputs"] = {name: list(value.shape) for name, value in inputs.items() if isinstance(value, Tensor)}
    row["precision"] = str(model.dtype).removeprefix("torch.")
    if not _same(_outputs(model, inputs), _outputs(model, inputs), 0):
        return {**row, "status": "not run", "reason": "the dense model's output changes from one run to the next"}
    try:
        pairs = pp.find_pairs(model, inputs)
    except UnsupportedModelError as error:
        return {**row, "status": "refused", "reason": _said(error)}
    row["pairs"] = dict(Counter(pair.kind for pair in pairs))
    row["share"] = pairs.prunable_params / pairs.base.params
    row["refused"] = dict(pairs.refused)
    row["status"] = "failed"
    row["tolerance"] = tolerance = _tolerance(model, inputs)
    checks = row["checks"] = {}
    for name, check in (
        ("sliced is masked", _sliced),
        ("searched", _searched),
        ("loaded", _loaded),
        ("gradients", _gradients),
        ("tokens", _tokens),
    ):
        try:
            checks[name] = check(model, inputs, pairs, tolerance)
        except Exception as error:
            checks[name] = _said(error)
    wrong = {name: said for name, said in checks.items() if said not in ("passed", "does not generate")}
    wrong = {name: said for name, said in wrong.items() if not said.startswith("masked: ")}
    if wrong:
        row["reason"] = "; ".join(f"{name}: {said}" for name, said in wrong.items())
    else:
        row["status"] = "supported" if {"qk", "vo", "mlp"} <= row["pairs"].keys() else "partly"
    return row


def _running(cls: Any, model_type: str, row: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The smallest model that runs, in float64 if it can."""
    for widths in (True, False):
        for dtype in (torch.float64, torch.float32):
            try:
                model = zoo.build(cls, zoo.small_config(model_type, widths=widths), dtype)
            except Exception as error:
                row.setdefault("reason", _said(error))
                break
            if row["status"] == "not built":
                row |= {"status": "not run", "params": sum(p.numel() for p in model.parameters()), "reason": None}
            try:
                inputs = example_inputs(model)
            except UnsupportedModelError as error:
                row["reason"] = row["reason"] or _said(error.__cause__ or error)
                continue
            try:
                model = zoo.reloaded(model)
                row["reloads"] = True
            except Exception as error:
                row["reloads"] = _said(error)
            try:
                outputs = _outputs(model, inputs)
            except Exception as error:  # XLNet, loaded, does not run in float64
                row["reason"] = row["reason"] or _said(error)
                continue
            if not outputs or not all(torch.isfinite(x).all() for x in outputs):
                row["reason"] = "no finite floating output" if outputs else "no floating output"
                continue
            del row["reason"]
            row["params"] = sum(p.numel() for p in model.parameters())
            return model, inputs
    return None, {}


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".replace("\n", " ")[:400]


@torch.no_grad()
def _outputs(model: nn.Module, inputs: dict[str, Any]) -> list[Tensor]:
    """All floating tensors that the model returns."""
    torch.manual_seed(0)
    return [x for x in pytree.tree_leaves(model(**inputs)) if _floating(x)]


def _floating(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def _gap(one: list[Tensor], other: list[Tensor]) -> float:
    """The largest relative difference, output by output."""
    if [x.shape for x in one] != [x.shape for x in other]:
        return float("inf")
    gaps = [
        float((x - y).abs().max() / x.abs().max().clamp_min(1e-300))
        for x, y in zip(one, other, strict=True)
        if x.numel()
    ]
    return max(gaps) if gaps and not any(np.isnan(gaps)) else float("nan")


def _same(one: list[Tensor], other: list[Tensor], tolerance: float) -> bool:
    return _gap(one, other) <= tolerance


class _Casts(TorchDispatchMode):
    """Notes whether activations are rounded to float32 on their way."""

    seen = False

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function is torch.ops.aten._to_copy.default and result.dtype == torch.float32:
            self.seen |= args[0].dtype == torch.float64
        return result


def _tolerance(model: Any, inputs: dict[str, Any]) -> float:
    """Relative difference of outputs that rounding may cause."""
    with _Casts() as casts:
        _outputs(model, inputs)
    return SINGLE if model.dtype == torch.float32 else MIXED if casts.seen else DOUBLE


def _selection(pairs: Any, seed: int, keep: float) -> Any:
    rng = np.random.default_rng(seed)
    path = pp.SolutionPath.from_scores(pairs, {pair.name: rng.random(pair.shape) for pair in pairs})
    return path.select(pp.Budget(keep=keep))


def _sliced(model: Any, inputs: dict[str, Any], pairs: Any, tolerance: float) -> str:
    dense = _outputs(model, inputs)
    for seed in range(SEEDS):
        for keep in KEEPS:
            selection = _selection(pairs, seed, keep)
            with masked(model, selection):
                expected = _outputs(model, inputs)
            small = pp.slice_model(model, selection)
            gap, effect = _gap(expected, _outputs(small, inputs)), _gap(dense, expected)
            if not gap <= tolerance:
                return f"keep {keep}: differ by {gap:.1e}"
            if not effect > tolerance:
                return f"keep {keep}: masking changes nothing"
            if sum(p.numel() for p in small.parameters()) >= sum(p.numel() for p in model.parameters()):
                return f"keep {keep}: the sliced model is not smaller"
    return "passed"


class _Outputs:
    """An objective for models that ``auto`` knows none for: the squared distance of all that they return."""

    def target(self, outputs: Any, batch: Any) -> Tensor:
        return torch.cat([x.flatten() for x in pytree.tree_leaves(outputs) if _floating(x)])

    def loss(self, outputs: Any, batch: Any, target: Tensor) -> Tensor:
        return (self.target(outputs, batch) - target).square().mean()

    def probe(self, outputs: Any, batch: Any, noise: torch.Generator) -> Tensor:
        values = self.target(outputs, batch)
        return (values * torch.randn(values.shape, generator=noise).to(values)).sum()


def _searched(model: Any, inputs: dict[str, Any], pairs: Any, tolerance: float) -> str:
    batch = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
    for objective in ("auto", _Outputs()):
        try:
            path = pp.search(model, [batch], objective=objective, steps=STEPS, multiple=1, progress=False)
            break
        except DataError as error:
            if objective != "auto" or "objective='auto'" not in str(error):
                raise
    selection = path.select(pp.Budget(keep=KEEPS[1]))
    with masked(model, selection):
        expected = _outputs(model, inputs)
    gap = _gap(expected, _outputs(pp.slice_model(model, selection), inputs))
    return "passed" if gap <= tolerance else f"differ by {gap:.1e}"


def _loaded(model: Any, inputs: dict[str, Any], pairs: Any, tolerance: float) -> str:
    small = pp.slice_model(model, _selection(pairs, 0, KEEPS[1]))
    gap = _gap(_outputs(small, inputs), _outputs(zoo.reloaded(small), inputs))
    limit = SINGLE if model.dtype == torch.float32 else RELOADED
    return "passed" if gap <= limit else f"differ by {gap:.1e}"


def _gradients(model: Any, inputs: dict[str, Any], pairs: Any, tolerance: float) -> str:
    """Every parameter that has a gradient in the masked model (whose tokens go to the same experts) has one in the
    sliced model; kept units' are not zero.
    """
    selection = _selection(pairs, 0, KEEPS[0])
    small = pp.slice_model(model, selection)
    dense = copy.deepcopy(model)  # some keep their last states, and a graph with them (RecurrentGemma)
    reached = {}
    for one in (dense, small):
        one.zero_grad()
        torch.manual_seed(0)
        try:
            with masked(dense, selection):
                outputs = [x for x in pytree.tree_leaves(one(**inputs)) if isinstance(x, Tensor) and x.requires_grad]
            sum((x.square().mean() for x in outputs if x.numel()), torch.zeros(())).backward()
        except Exception as error:
            if one is dense:
                return f"masked: {_said(error)}"
            raise
        reached[one is small] = {name: p.grad for name, p in one.named_parameters() if p.grad is not None}
        one.zero_grad()
    missing = reached[False].keys() - reached[True].keys()
    missing -= {name for name, p in small.named_parameters() if not p.numel()}
    for pair in pairs:
        for slot in pair.slots if selection.kept(pair) else ():
            name = f"{slot.module}.weight"
            both = [gradients[name] for gradients in reached.values() if name in gradients]
            if len(both) == 2 and both[0].any() and not both[1].any():
                missing.add(name)
    return f"none in {', '.join(sorted(missing)[:3])} ({len(missing)} in all)" if missing else "passed"


def _tokens(model: Any, inputs: dict[str, Any], pairs: Any, tolerance: float) -> str:
    """Greedy tokens with and without cache, if the masked model has the same ones with and without."""
    if not model.can_generate():
        return "does not generate"
    given = {name: value for name, value in inputs.items() if name not in ("use_cache", "decoder_input_ids")}
    if "attention_mask" in given:
        given["attention_mask"] = torch.ones_like(given["attention_mask"])
    selection = _selection(pairs, 0, KEEPS[0])
    for one in (model, pp.slice_model(model, selection)):
        one.generation_config.eos_token_id, one.generation_config.pad_token_id = None, 0
        if one.config.is_encoder_decoder and one.generation_config.decoder_start_token_id is None:
            one.generation_config.decoder_start_token_id = 0
        tokens = []
        for cache in (False, True):
            torch.manual_seed(0)
            try:
                settings = {"max_new_tokens": 4, "do_sample": False, "use_cache": cache}
                with torch.no_grad(), masked(model, selection):
                    tokens.append(one.generate(**given, **settings))
            except Exception as error:
                if one is model:
                    return f"masked: {_said(error)}"
                raise
        if not torch.equal(*tokens):
            return DIFFER if one is model else "tokens differ with and without cache"
    return "passed"


# All of them.


def _serve(pipe: Connection) -> None:
    """A process that examines what it is told to."""
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    while True:
        try:
            model_type = pipe.recv()
        except EOFError:
            return
        start = time.perf_counter()
        try:
            row = examine(model_type)
        except Exception as error:
            row = {"type": model_type, "status": "failed", "reason": _said(error)}
        gc.collect()
        pipe.send({**row, "seconds": round(time.perf_counter() - start, 1)})


class Worker:
    """One process, started again when an architecture runs out of time or takes it down."""

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self.process: Any = None

    def __call__(self, model_type: str) -> dict[str, Any]:
        if self.process is None:
            self.pipe, other = multiprocessing.Pipe()
            self.process = multiprocessing.get_context("spawn").Process(target=_serve, args=(other,), daemon=True)
            self.process.start()
        self.pipe.send(model_type)
        try:
            if self.pipe.poll(self.limit):
                return self.pipe.recv()
            reason = f"no result after {self.limit:g} s"
        except EOFError:
            reason = "the process ended"
        self.process.kill()
        self.process.join()
        self.process = None
        return {"type": model_type, "status": "failed", "reason": reason}


def sweep(types: list[str], jobs: int, limit: float) -> list[dict[str, Any]]:
    """Rows in the order of ``types``."""
    workers = [Worker(limit) for _ in range(jobs)]
    rows: dict[str, dict[str, Any]] = {}

    def run(index: int) -> None:
        for model_type in types[index::jobs]:
            rows[model_type] = workers[index](model_type)
            row = rows[model_type]
            print(f"{len(rows)}/{len(types)} {model_type}: {row['status']} {row.get('reason', '')}"[:200], flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(run, range(jobs)))
    return [rows[model_type] for model_type in types]


# The table.

STATUSES = {
    "supported": "attention and MLP pairs found, and the whole contract passes",
    "partly": "only one of attention and MLP found, and the whole contract passes on it",
    "refused": "no pair could be proved; the model is refused by name with a reason",
    "failed": "pairs were found and a check fails, or it ran out of time",
    "not run": "built, but no input of ours runs, or runs to the same output twice",
    "not built": "needs a package that is not installed, is no model by itself, or could not be built small",
}


def totals(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts, with the denominators that they are out of."""
    run = [row for row in rows if "inputs" in row or row["status"] == "failed"]
    attention = [row for row in run if row.get("transformer", True)]  # what ran out of time may be one
    return {
        "configuration types": len(rows),
        "built": sum(row["status"] != "not built" for row in rows),
        "run": len(run),
        "transformers that run": len(attention),
        "status of all": dict(Counter(row["status"] for row in rows)),
        "status of transformers that run": dict(Counter(row["status"] for row in attention)),
    }


def table(rows: list[dict[str, Any]], versions: dict[str, str]) -> str:
    """The Markdown page."""
    count = totals(rows)
    of = count["status of transformers that run"]
    n = count["transformers that run"]
    good = of.get("supported", 0)
    lines = [
        "# Coverage",
        "",
        f"Generated by `{command()}`; do not edit. "
        f"transformers {versions['transformers']}, torch {versions['torch']}, pathprune {versions['pathprune']}.",
        "",
        f"transformers registers {count['configuration types']} configuration types, parts of models among them. "
        f"{count['built']} could be built small with random weights, {count['run']} of these run on a tiny input, "
        f"and {n} of those have an attention module: the transformers.",
        "",
        f"**{good} of these {n} transformers ({good / max(n, 1):.0%}) pass the whole contract with attention and MLP "
        f"pairs; {of.get('partly', 0)} more pass it with one of the two.** "
        f"Of all {count['configuration types']} types that is {good / len(rows):.0%}.",
        "",
        "| status | of all types | of transformers that run | meaning |",
        "|---|---|---|---|",
    ]
    for status, meaning in STATUSES.items():
        lines.append(f"| {status} | {count['status of all'].get(status, 0)} | {of.get(status, 0)} | {meaning} |")
    lines += [
        "",
        "The contract: for random rankings at 70 and 40 % kept, the sliced model computes what the masked model "
        f"computes (relative difference of every output in float64 at most {DOUBLE:g}, {MIXED:g} where the model's "
        f"own code rounds to float32 on the way, {SINGLE:g} where it cannot run in float64); so it does for what a "
        f"search of {STEPS} steps found, rotations, fills and compensation included; saved and loaded it is the same "
        "model; gradients reach what they reach in the masked model; greedy tokens are the same with and "
        'without cache, where that is so for the masked model. "Share" is the part of all parameters that pairs hold '
        "in the small model.",
        "",
        "| type | class | status | pairs | share | notes |",
        "|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: row["type"]):
        pairs = ", ".join(f"{count} {kind}" for kind, count in sorted(row.get("pairs", {}).items()))
        share = f"{row['share']:.0%}" if "share" in row else ""
        lines.append(
            f"| {row['type']} | {row.get('class', '')} | {row['status']} | {pairs} | {share} | {_notes(row)} |"
        )
    return "\n".join(lines) + "\n"


def _notes(row: dict[str, Any]) -> str:
    notes = []
    if row.get("reason"):
        notes.append(row["reason"])
    if "inputs" in row and not row["transformer"]:
        notes.append("no attention module")
    if row.get("precision") == "float32":
        notes.append("runs in float32 only")
    if row.get("refused"):
        reason, many = Counter(row["refused"].values()).most_common(1)[0]
        notes.append(f"{len(row['refused'])} sublayers refused, {many} of them: {reason}")
    checks = row.get("checks", {})
    if checks.get("gradients", "").startswith("masked: "):
        notes.append("the masked model has no gradients on this input")
    tokens = checks.get("tokens", "")
    if tokens == DIFFER:
        notes.append("the masked model generates other tokens with a cache than without")
    elif tokens.startswith("masked: "):
        notes.append("the masked model does not generate on this input")
    return re.sub(r"\s+", " ", "; ".join(notes)).replace("|", "\\|")[:300]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--table", type=Path, help="Markdown file")
    parser.add_argument("--only", help="configuration types, separated by commas")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=60, help="time limit of one architecture")
    args = parser.parse_args()
    types = args.only.split(",") if args.only else zoo.model_types()
    start = time.perf_counter()
    rows = sweep(types, args.jobs, args.seconds)
    versions = {**library_versions(), "scipy": _version("scipy"), "timm": _version("timm")}
    result = {
        "command": command(),
        "seconds": round(time.perf_counter() - start),
        "totals": totals(rows),
        "rows": rows,
        "machine": machine(),
        "versions": versions,
    }
    if args.out:
        write_text(args.out, json.dumps(result, indent=1))
    if args.table:
        write_text(args.table, table(rows, versions))
    print(json.dumps(result["totals"], indent=1))


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    main()
