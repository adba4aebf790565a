"""The ``pathprune`` command: parses, calls, prints. Everything it does is a call of the library."""

from __future__ import annotations

import inspect as signatures
import json
import math
import os
import re
import shlex
import signal
import sys
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pathprune import __version__
from pathprune.errors import BudgetError, DataError, PathpruneError, SettingError

if TYPE_CHECKING:
    from pathprune.reading import Texts

WINDOW = 256  # tokens
LARGEST_SEED = 2**63 - 1
HUB_ID = r"[\w-][\w.-]*(/[\w-][\w.-]*)?"
UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9, "t": 10**12}

app = typer.Typer(
    name="pathprune",
    help="One search on a pretrained transformer gives the whole family: a model of any size.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


class Dynamics(StrEnum):
    sampled = "sampled"
    lbi = "lbi"
    spp_released = "spp-released"


class UnitName(StrEnum):
    mixed = "mixed"
    dim = "dim"
    shared = "shared"
    head = "head"


class ObjectiveName(StrEnum):
    auto = "auto"
    embedding = "embedding"
    embedding_mean = "embedding-mean"
    embedding_class = "embedding-class"
    embedding_last = "embedding-last"
    hidden = "hidden"
    hidden_mean = "hidden-mean"
    hidden_class = "hidden-class"
    hidden_last = "hidden-last"
    logits = "logits"
    task = "task"


ModelArg = Annotated[str, typer.Argument(help="Folder or hub id of the dense model.")]
DataOpt = Annotated[
    Path,
    typer.Option(
        help="Texts: a file, one a line (.txt), with a header (.csv, .tsv), or JSON (.json, .jsonl). "
        "Or a folder of images."
    ),
]
ObjectiveOpt = Annotated[
    ObjectiveName,
    typer.Option(
        help="What to stay close to. auto goes by what the model returns; task is the model's own loss, on labels: "
        "of --label-field, of subfolders' names, or the next token."
    ),
]
PrefixOpt = Annotated[
    str | None, typer.Option(help="What stands before every text, such as 'query: '; by default what the folder says.")
]
FieldOpt = Annotated[str, typer.Option(help="Column or field that holds the text.")]
LabelFieldOpt = Annotated[str, typer.Option(help="Column or field that holds the label, for --objective task.")]
MaxBadOpt = Annotated[int, typer.Option(min=0, help="Images that may be left out because they cannot be read.")]
BatchOpt = Annotated[
    int | None, typer.Option(min=1, help="Texts or images in a batch: by default 16, of language models 4.")
]
LengthOpt = Annotated[
    int | None,
    typer.Option(
        min=2,
        help="Tokens of a text; longer ones are cut. By default, what holds 95 % of them, at most 512. "
        "Of language models, the window's length, by default 256.",
    ),
]
DeviceOpt = Annotated[str | None, typer.Option(help="cpu, cuda, ...; the default is a GPU where there is one.")]
SeedOpt = Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="Seed of everything random.")]
Bf16Opt = Annotated[bool, typer.Option("--bf16", help="Multiply matrices in bfloat16: faster where the hardware can.")]
OverwriteOpt = Annotated[bool, typer.Option("--overwrite", help="Replace what --out holds.")]
JsonOpt = Annotated[bool, typer.Option("--json", help="Print one JSON object, for programs.")]


def main() -> None:
    """Entry point: bad input ends with one clear line and exit code 2, Ctrl-C with 130, as does what a scheduler sends
    before it kills.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *rest: typer.echo(f"warning: {_line(message)}", err=True)
        sys.exit(_run())


def _run() -> int:
    try:
        code = app(standalone_mode=False)
    except PathpruneError as error:
        return _failed(_line(error))
    except (typer.Abort, KeyboardInterrupt):
        return 130
    except BrokenPipeError:  # whoever read the output has gone
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (Python flushes it at its end)
        return 141
    except OSError as error:
        return _failed(f"{error.strerror or error}" + (f": {error.filename}" if error.filename else ""))
    except MemoryError as error:
        return _failed(f"out of memory; a smaller --batch-size needs less {error}")
    except Exception as error:
        if hasattr(error, "exit_code"):  # a wrong option or argument, which knows how to show itself
            error.show()  # type: ignore[attr-defined]
            return int(error.exit_code)
        if os.environ.get("PATHPRUNE_TRACEBACK"):
            raise
        if type(error).__name__ == "OutOfMemoryError":  # torch's
            return _failed("the device is out of memory; a smaller --batch-size or --max-length needs less")
        return _failed(
            f"{type(error).__name__}: {_line(error)[:300]}. pathprune did not foresee this; please report it "
            "with what the same command prints under PATHPRUNE_TRACEBACK=1"
        )
    return code if isinstance(code, int) else 0


def _failed(message: str) -> int:
    typer.echo(f"error: {message}", err=True)
    return 2


def _line(message: object) -> str:
    """One line, in which arguments of the library are options: ``steps=1`` is ``--steps 1``."""
    options = {
        name: name.replace("_", "-")
        for command in app.registered_commands
        for name in signatures.signature(command.callback or main).parameters
        if name not in ("model", "models", "run", "folder")  # arguments
    }
    options["lowest_level"] = "lowest"
    return re.sub(
        r"(?<![^\s(])(\w+)=([\w'.-]*)",
        lambda found: f"--{options[found[1]]} {found[2]}".rstrip() if found[1] in options else found[0],
        " ".join(str(message).split()),
    )


@app.callback(invoke_without_command=True)
def version(show: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if show:
        typer.echo(__version__)
        raise typer.Exit()


@app.command()
def inspect(model: ModelArg, as_json: JsonOpt = False) -> None:
    """Show what can be pruned in a model, and what cannot and why."""
    _check_model(model)
    from pathprune.discovery import find_pairs

    dense = _load(model, "cpu")
    pairs = find_pairs(dense)
    share = pairs.prunable_params / pairs.base.params
    if as_json:
        from dataclasses import asdict

        _print_json(
            base=asdict(pairs.base),
            prunable_params=pairs.prunable_params,
            prunable_fraction=share,
            pairs=[asdict(pair) for pair in pairs],
            refused=pairs.refused,
        )
        return
    typer.echo(
        f"{pairs.base.architecture}: {pairs.prunable_params:,} of {pairs.base.params:,} parameters "
        f"({share:.1%}) are prunable"
    )
    typer.echo(f"{'pair':<44} {'kind':<4} {'heads':>5} {'width':>6} {'params':>12}")
    for pair in pairs:
        typer.echo(f"{pair.name:<44} {pair.kind:<4} {pair.groups:>5} {pair.width:>6} {pair.params:>12,}")
    for name, reason in pairs.refused.items():
        typer.echo(f"refused {name}: {reason}")
    data = "IMAGES" if getattr(dense, "main_input_name", "") == "pixel_values" else "TEXTS"
    typer.echo(f"\nNext: pathprune search {_word(model)} --data {data} --out run")


@app.command()
def search(
    model: ModelArg,
    data: DataOpt,
    out: Annotated[Path, typer.Option(help="Folder for the solution path and its checkpoints.")],
    objective: ObjectiveOpt = ObjectiveName.auto,
    dynamics: Annotated[Dynamics, typer.Option(help="How the path is found.")] = Dynamics.sampled,
    steps: Annotated[int, typer.Option(min=3, help="Forward-backward passes.")] = 400,
    unit: Annotated[UnitName, typer.Option(help="What an attention layer may lose.")] = UnitName.mixed,
    multiple: Annotated[int, typer.Option(min=1, max=2**20, help="Keep widths at multiples of this.")] = 8,
    lowest: Annotated[
        float, typer.Option(help="Smallest fraction of the prunable parameters to try; the search goes to larger ones.")
    ] = 0.1,
    compensate: Annotated[
        bool, typer.Option(help="Tell what leaves from what stays; without, less memory and worse models.")
    ] = True,
    batch_size: BatchOpt = None,
    max_length: LengthOpt = None,
    field: FieldOpt = "text",
    prefix: PrefixOpt = None,
    label_field: LabelFieldOpt = "label",
    max_bad: MaxBadOpt = 10,
    seed: SeedOpt = 0,
    bf16: Bf16Opt = False,
    device: DeviceOpt = None,
    resume: Annotated[bool, typer.Option(help="Go on from the checkpoint in --out.")] = False,
    overwrite: OverwriteOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Find the solution path: one run that ranks every unit of the model."""
    _check_fraction("--lowest", lowest)
    if resume and overwrite:
        raise PathpruneError("--resume goes on with the search in --out, --overwrite begins anew; give one of them")
    if resume and not any((out / name).exists() for name in ("checkpoint.json", "path.json")):
        raise PathpruneError(f"--resume: {out} holds no search to go on with; leave it out to begin one")
    _check_model(model)
    given = _given(data, field, label_field, objective, max_bad)
    from pathprune.searching import RESUMING, held_search
    from pathprune.searching import search as run

    held = held_search(out)
    if held and not (resume or overwrite):
        raise PathpruneError(
            f"{out} holds {held}; --resume to {RESUMING[held]}, --overwrite to search anew in its place, or choose "
            "another --out"
        )
    if overwrite:
        _name_members(out)
    dense = _load(model, device)
    batches = _batches(dense, model, given, batch_size, max_length, prefix)
    _say(f"search: {steps} steps over {_amount(batches)}")
    try:
        path = run(
            dense,
            batches,
            objective=objective.value,
            out=out,
            resume=resume,
            overwrite=overwrite,
            progress=True,
            dynamics=dynamics.value,
            steps=steps,
            seed=seed,
            unit=unit.value,
            multiple=multiple,
            lowest_level=lowest,
            compensate=compensate,
            bf16=bf16,
        )
    except KeyboardInterrupt:
        typer.echo(f"\nStopped. What is done is in {out}; the same command with --resume goes on from there.", err=True)
        raise typer.Exit(130) from None
    if as_json:
        _print_json(out=str(out), pairs=len(path.pairs), prunable_params=path.pairs.prunable_params, config=path.config)
        return
    typer.echo(f"The path of {len(path.pairs)} pairs is in {out}.")
    typer.echo(f"Next: pathprune slice {_word(out)} {_word(model)} --keep 0.5 --out {_word(out / 'keep-50')}")


@app.command("slice")
def slice_(
    run: Annotated[Path, typer.Argument(help="Folder of a solution path.")],
    model: ModelArg,
    out: Annotated[Path, typer.Option(help="Folder for the sliced model.")],
    keep: Annotated[str | None, typer.Option(help="Share of the prunable parameters to keep: 0.5 or 50%.")] = None,
    params: Annotated[
        str | None, typer.Option(help="Parameters of the whole model: a share (0.7, 70%) or a number (18M, 90000000).")
    ] = None,
    macs: Annotated[
        str | None, typer.Option(help="MACs per token of the whole model: a share (0.7, 70%) or a number (18M).")
    ] = None,
    overwrite: OverwriteOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Cut a model of the size you ask for from a path, and save it like any other."""
    from pathprune.budget import Budget
    from pathprune.path import SolutionPath

    budget = Budget(keep=_size("--keep", keep), params=_size("--params", params), macs=_size("--macs", macs))
    selection = SolutionPath.load(run).select(budget)
    _check_model(model)
    from pathprune.hub import save_model
    from pathprune.slicing import slice_model

    _check_out(out, overwrite, model)
    save_model(slice_model(_load(model, "cpu"), selection), out, source=model)
    if as_json:
        _print_json(out=str(out), **selection.to_dict())
        return
    typer.echo(f"{out}: {selection}")
    typer.echo(
        f"Next: pathprune recover {_word(out)} --teacher {_word(model)} --data DATA --out {_word(f'{out}-recovered')} "
        "(DATA: what was searched on, or more of the kind)"
    )


@app.command()
def recover(
    model: Annotated[str, typer.Argument(help="Folder of a sliced model.")],
    teacher: Annotated[str, typer.Option(help="Folder or hub id of the dense model.")],
    data: DataOpt,
    out: Annotated[Path, typer.Option(help="Folder for the recovered model.")],
    steps: Annotated[int, typer.Option(min=1, help="Distillation steps.")] = 300,
    lr: Annotated[
        float | None,
        typer.Option(help="Peak learning rate; by default it goes by how much of the model is gone."),
    ] = None,
    lora_rank: Annotated[
        int | None, typer.Option(min=1, help="Train updates of this rank (LoRA), not the weights themselves.")
    ] = None,
    objective: ObjectiveOpt = ObjectiveName.auto,
    batch_size: BatchOpt = None,
    max_length: LengthOpt = None,
    field: FieldOpt = "text",
    prefix: PrefixOpt = None,
    label_field: LabelFieldOpt = "label",
    max_bad: MaxBadOpt = 10,
    seed: SeedOpt = 0,
    bf16: Bf16Opt = False,
    device: DeviceOpt = None,
    overwrite: OverwriteOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Train a sliced model to imitate the dense one again, without labels."""
    _check_rate(lr)
    for name in (model, teacher):
        _check_model(name)
    given = _given(data, field, label_field, objective, max_bad)
    from pathprune.hub import save_model
    from pathprune.recovery import recover as run

    _check_out(out, overwrite, model, teacher)
    dense, small = _load(teacher, device), _load(model, device)
    batches = _batches(dense, teacher, given, batch_size, max_length, prefix)
    settings: dict[str, Any] = {"steps": steps, "lr": lr, "seed": seed, "objective": objective.value, "bf16": bf16}
    settings["lora_rank"] = lora_rank
    _say(f"recover: {steps} steps over {_amount(batches)}")
    recovered: Any = run(small, teacher=dense, data=batches, progress=True, **settings)
    outcome = recovered.recovery
    save_model(recovered, out, source=model)
    before, after = 1 - outcome.before[0], 1 - outcome.after[0]
    if as_json:
        held_out = {"samples": outcome.samples, "before": before, "after": after}
        _print_json(out=str(out), fidelity_held_out=held_out, steps=outcome.steps, kept=outcome.kept, lr=outcome.lr)
        return
    typer.echo(
        f"{out}: fidelity to dense on {outcome.samples} samples that were held back {before:.4f} -> {after:.4f} "
        f"(step {outcome.kept} of {outcome.steps})"
    )
    typer.echo(
        f"Next: pathprune evaluate {_word(out)} --teacher {_word(teacher)} --data UNSEEN "
        f"(UNSEEN: of the kind of {data}, and not in it)"
    )


@app.command()
def elastic(
    run: Annotated[Path, typer.Argument(help="Folder of a solution path.")],
    model: ModelArg,
    data: DataOpt,
    out: Annotated[Path, typer.Option(help="Folder for the elastic model and its path.")],
    steps: Annotated[int, typer.Option(min=1, help="Distillation steps, for all sizes together.")] = 1000,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 3e-4,
    lowest: Annotated[float, typer.Option(help="Smallest fraction of the prunable parameters to train.")] = 0.2,
    objective: ObjectiveOpt = ObjectiveName.auto,
    batch_size: BatchOpt = None,
    max_length: LengthOpt = None,
    field: FieldOpt = "text",
    prefix: PrefixOpt = None,
    label_field: LabelFieldOpt = "label",
    max_bad: MaxBadOpt = 10,
    seed: SeedOpt = 0,
    bf16: Bf16Opt = False,
    device: DeviceOpt = None,
    overwrite: OverwriteOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Recover every size of a path at once, in one checkpoint of the dense model's shapes."""
    from pathprune.path import SolutionPath

    _check_rate(lr)
    _check_fraction("--lowest", lowest)
    searched = SolutionPath.load(run)
    _check_model(model)
    given = _given(data, field, label_field, objective, max_bad)
    from pathprune.hub import save_model
    from pathprune.recovery import elastic as train

    _check_out(out, overwrite, model)
    _name_members(out)
    dense = _load(model, device)
    batches = _batches(dense, model, given, batch_size, max_length, prefix)
    settings: dict[str, Any] = {"steps": steps, "lr": lr, "lowest": lowest, "objective": objective.value, "seed": seed}
    settings["bf16"] = bf16
    _say(f"elastic: {steps} steps over {_amount(batches)}")
    trained, path = train(dense, searched, data=batches, progress=True, **settings)
    save_model(trained, out, source=model, path=path)
    held_out = path.config["held_out"]
    if as_json:
        _print_json(out=str(out), held_out=held_out, **settings)
        return
    typer.echo(f"{out}: {type(trained).__name__} in which every size from {lowest:.0%} up is recovered")
    found = zip(held_out["levels"], held_out["before"], held_out["after"], strict=True)
    gains = ", ".join(f"at {level:.0%} {1 - before:.4f} -> {1 - after:.4f}" for level, before, after in found)
    typer.echo(f"fidelity to dense on {held_out['samples']} samples that were held back: {gains}")
    typer.echo(f"Next: pathprune slice {_word(out)} {_word(out)} --keep 0.5 --out {_word(f'{out}-50')}")


@app.command()
def evaluate(
    models: Annotated[list[str], typer.Argument(help="Folders of sliced models.")],
    teacher: Annotated[str, typer.Option(help="Folder or hub id of the dense model.")],
    data: DataOpt,
    objective: ObjectiveOpt = ObjectiveName.auto,
    batch_size: BatchOpt = None,
    max_length: LengthOpt = None,
    field: FieldOpt = "text",
    prefix: PrefixOpt = None,
    label_field: LabelFieldOpt = "label",
    max_bad: MaxBadOpt = 10,
    device: DeviceOpt = None,
    as_json: JsonOpt = False,
) -> None:
    """Compare sliced models with the dense one: fidelity on unseen data, size, and latency in turns.

    Fidelity is one minus the objective's loss: for embeddings, the mean cosine to the dense ones; for logits, one
    minus the divergence in nats.
    """
    for name in (teacher, *models):
        _check_model(name)
    given = _given(data, field, label_field, objective, max_bad)
    from pathprune.data import Batches
    from pathprune.evaluation import bytes_on_disk, fidelities, latency
    from pathprune.objectives import Targets, get_objective, objective_name

    dense = _load(teacher, device)
    batches = _batches(dense, teacher, given, batch_size, max_length, prefix)
    loaded = [dense, *(_load(model, device) for model in models)]
    timing = Batches(dense, batches).first
    goal = get_objective(objective.value, dense, timing)
    times = latency(loaded, timing)
    qualities = fidelities(loaded, Targets(dense, goal), batches)
    rows = [
        {
            "model": name,
            "params": sum(parameter.numel() for parameter in model.parameters()),
            "bytes_on_disk": bytes_on_disk(name) if Path(name).is_dir() else None,
            "latency_ms": time,
            "latency_ratio": time / times[0],
            "fidelity": quality,
        }
        for name, model, time, quality in zip([teacher, *models], loaded, times, qualities, strict=True)
    ]
    shape = [int(size) for size in next(iter(timing.values())).shape]
    if as_json:
        _print_json(latency_input=shape, objective=objective_name(goal), models=rows)
        return
    typer.echo(
        f"{'model':<32} {'params':>12} {'MB':>8} {'ms':>8} {'x dense':>8} {'fidelity':>8}   "
        f"(latency at input {shape}, fidelity by {objective_name(goal)})"
    )
    for row in rows:
        size = "-" if row["bytes_on_disk"] is None else f"{row['bytes_on_disk'] / 1e6:.1f}"
        typer.echo(
            f"{row['model'][-32:]:<32} {row['params']:>12,} {size:>8} {row['latency_ms']:>8.1f} "
            f"{row['latency_ratio']:>8.2f} {row['fidelity']:>8.4f}"
        )
    typer.echo(f"(fidelity on {_amount(batches)})")


@app.command()
def report(folder: Annotated[Path, typer.Argument(help="Folder with family.json and path/.")]) -> None:
    """Draw a family: one page with its table and pictures."""
    from pathprune.report import write_report

    typer.echo(f"{write_report(folder)}")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for everything the demo makes.")] = Path("pathprune-demo"),
    steps: Annotated[int, typer.Option(min=3, help="Search steps.")] = 300,
    recover_steps: Annotated[
        int | None,
        typer.Option(min=1, help="Distillation steps for each size; by default 800 where bfloat16 is fast, else 400."),
    ] = None,
    seed: SeedOpt = 0,
    overwrite: OverwriteOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Search, slice, recover and measure a real sentence encoder (needs the extra: pip install 'pathprune[demo]')."""
    if not overwrite and out.is_dir() and any(out.iterdir()):
        raise PathpruneError(f"{out} is not empty; --overwrite replaces a demo that is there, or choose another --out")
    from pathprune.demo import run, table

    say: Callable[[str], None] = (lambda text: None) if as_json else typer.echo
    family = run(out, steps=steps, recover_steps=recover_steps, seed=seed, say=say, overwrite=overwrite)
    if as_json:
        _print_json(**family)
        return
    typer.echo(table(family))
    typer.echo(f"\nReport: {out / 'report.html'}")
    typer.echo(f"Load one: import pathprune; AutoModel.from_pretrained('{out / 'keep-50'}')")


def _check_out(out: Path, overwrite: bool, *sources: str) -> None:
    """Refuse a folder that a model may not be written to, before anything is loaded."""
    from pathprune.hub import check_free

    folder = check_free(out, *sources)
    if not overwrite and folder.is_dir() and any(folder.iterdir()):
        raise PathpruneError(f"{out} holds a model; --overwrite replaces it, or choose another --out")


def _name_members(out: Path) -> None:
    """Say which models in a folder were cut from the path that is to be replaced there."""
    if not (out / "path.json").exists():
        return
    members = []
    for config in sorted(out.glob("*/config.json")):
        try:
            method = json.loads(config.read_bytes())["quantization_config"]["quant_method"]
        except (OSError, ValueError, KeyError, TypeError):  # another model, or none
            continue
        if str(method).startswith("pathprune"):
            members.append(str(config.parent))
    if members:
        typer.echo(f"note: {', '.join(members)}: cut from the path that is replaced; slice again", err=True)


def _print_json(**facts: Any) -> None:
    typer.echo(json.dumps(facts, indent=1))


def _word(text: object) -> str:
    """As a shell wants it."""
    return shlex.quote(str(text))


def _say(text: str) -> None:
    typer.echo(text, err=True)


def _size(option: str, text: str | None) -> float | int | None:
    """``0.5`` and ``50%`` are shares, ``18M``, ``1.5B`` and ``18000000`` absolute numbers."""
    if text is None:
        return None
    found = re.fullmatch(r"([0-9_]+|[0-9_]*\.[0-9]+|[0-9.]+e[+-]?[0-9]+)\s*([kmbgt%]?)", text.strip().lower())
    try:
        number = float(found[1]) if found else math.nan
    except ValueError:
        number = math.nan
    if not found or not math.isfinite(number):
        absolute = "" if option == "--keep" else ", and no number like 18M, 1.5B or 18000000"
        raise BudgetError(f"{option} {text} is neither a fraction like 0.5 nor 50%{absolute}")
    share = found[2] == "%" or (found[2] == "" and (not found[1].isdigit() or option == "--keep"))
    value = number / 100 if found[2] == "%" else number
    if option == "--keep" and found[2] not in ("", "%"):
        raise BudgetError(
            f"{option} {text} is not in (0, 1]; it is a share of the prunable parameters, like 0.5 or 50%"
        )
    if not share and value * UNITS[found[2]] <= 100:
        raise BudgetError(f"{option} {text} is an absolute number, and no model is that small; a share is 0.5 or 50%")
    if share and found[2] == "" and value > 1 and option != "--keep" and value.is_integer():
        share = False  # 9e7
    if not share:
        return round(value * UNITS[found[2]])
    if not 0 < value <= 1:
        meant = f"; for {number:g} % write {number / 100:g} or {number:g}%" if 1 < number <= 100 else ""
        raise BudgetError(f"{option} {text} is not in (0, 1]{meant or '; half is 0.5 or 50%'}")
    return value


def _check_fraction(option: str, value: float) -> None:
    if not 0 < value < 1:
        raise SettingError(f"{option} {value:g} must lie between 0 and 1")


def _check_rate(lr: float | None) -> None:
    if lr is not None and not 0 < lr < math.inf:
        raise SettingError(f"--lr {lr:g} must be positive, such as 1e-4")


def _check_model(name: str) -> None:
    """That there is such a model, before anything slow: a folder of one, or an id that the hub knows.

    Raises:
        PathpruneError: there is none.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        if (folder / "adapter_config.json").exists():
            raise PathpruneError(
                f"{name} is an adapter (LoRA or the like); merge it into its model first, "
                "model.merge_and_unload().save_pretrained(FOLDER), and give that folder"
            )
        if not (folder / "config.json").exists():
            inside = [file.parent for file in sorted(folder.glob("*/config.json"))]
            what = (
                "is the folder of a search, not of a model" if (folder / "path.json").exists() else "is no model folder"
            )
            beside = f"; is it {inside[0]}?" if inside else ""
            raise PathpruneError(f"cannot load a model from {name}: it {what}, it has no config.json{beside}")
        return
    if folder.exists():
        raise PathpruneError(f"cannot load a model from {name}: it is a file; give the folder that it is in")
    if not re.fullmatch(HUB_ID, name, re.ASCII):
        raise PathpruneError(f"cannot load a model from {name}: no such folder")
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import GatedRepoError, OfflineModeIsEnabled, RepositoryNotFoundError

    if isinstance(try_to_load_from_cache(name, "config.json"), str):
        return
    no = f"cannot load a model from {name}: there is no folder of that name here, and"
    try:
        # Asked once: transformers would try six times, and not say what it looked for.
        get_hf_file_metadata(hf_hub_url(name, "config.json"), timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except OfflineModeIsEnabled:
        raise PathpruneError(f"{no} not in the hub's cache either (HF_HUB_OFFLINE forbids to ask the hub)") from None
    except GatedRepoError:
        raise PathpruneError(
            f"{no} the hub gives {name} only to whom it has granted access; log in: hf auth login"
        ) from None
    except RepositoryNotFoundError:
        raise PathpruneError(f"{no} the hub has no such model, or does not show it to you (hf auth login)") from None
    except Exception as error:  # of the HTTP client, whose kinds change with the hub's library
        raise PathpruneError(f"{no} the hub could not be asked: {error}") from None


def _load(name: str, device: str | None) -> Any:
    """A model by folder or hub id, ready to run: with the head that the checkpoint holds, or none."""
    import torch

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        if torch.empty(1, device=device).is_meta:
            raise PathpruneError(f"cannot run on --device {device}: it holds no numbers; use cpu, cuda or the like")
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise PathpruneError(f"cannot run on --device {device}: {str(error).partition(chr(10))[0]}") from None
    import transformers
    from transformers.utils import logging

    from pathprune.serving import served

    logging.disable_progress_bar()
    name = str(Path(name).expanduser()) if name.startswith("~") else name
    try:
        config = transformers.AutoConfig.from_pretrained(name)
        kind = getattr(transformers, (config.architectures or ["AutoModel"])[0], transformers.AutoModel)
        if served(name, fetch=True):  # a sentence encoder is used without the head that some checkpoints hold
            kind = transformers.AutoModel
        model, found = kind.from_pretrained(name, output_loading_info=True)
        if found["missing_keys"]:  # a configuration that names a head, and weights without it
            model = transformers.AutoModel.from_pretrained(name)
        return model.to(device).eval()
    except Exception as error:  # of any kind: the files are the user's, and each library has its own
        raise PathpruneError(f"cannot load a model from {name!r}: {error}") from error


@dataclass(frozen=True)
class _Given:
    """What --data holds, as far as can be seen before a model is loaded.

    Attributes:
        texts: None of a folder of images.
        task: labels are wanted.
    """

    data: Path
    texts: Texts | None
    field: str
    label_field: str
    task: bool
    max_bad: int


def _given(data: Path, field: str, label_field: str, objective: ObjectiveName, max_bad: int) -> _Given:
    """Read the texts, or look for images.

    Raises:
        DataError: there is nothing to read.
    """
    from pathprune.reading import image_files, read_file

    task = objective is ObjectiveName.task
    if data.is_dir():
        files = image_files(data)
        _say(f"found {len(files):,} images in {data}")
        return _Given(data, None, field, label_field, task, max_bad)
    texts = read_file(data, field)
    _say(texts.summary)
    return _Given(data, texts, field, label_field, task, max_bad)


def _batches(
    model: Any, source: str, given: _Given, batch_size: int | None, max_length: int | None, prefix: str | None
) -> Iterable[dict[str, Any]]:
    """A folder is images; a file is texts: full windows for a language model, else one padded line each."""
    from transformers import AutoImageProcessor, AutoTokenizer

    from pathprune.data import Images, packed, tokenized

    data = given.data
    if given.task and "labels" not in signatures.signature(model.forward).parameters:
        raise DataError(
            f"--objective task is the model's own loss on labels, and {type(model).__name__} has none; "
            "give a model with its head, or use --objective auto"
        )
    kind: Any = AutoImageProcessor if data.is_dir() else AutoTokenizer
    try:
        reader = kind.from_pretrained(source)
    except (OSError, ValueError) as error:
        what = "a folder, of images," if data.is_dir() else "a file, of texts,"
        raise PathpruneError(f"--data {data} is {what} and {source} has nothing to read them with: {error}") from error
    if given.texts is None:
        labels = _known_labels(model) if given.task else None
        return Images(data, reader, batch_size=batch_size or 16, max_bad=given.max_bad, labels=labels)
    tokenizer = reader
    texts = _as_served(source, given.texts.texts, tokenizer, prefix)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # what stands there is masked
    if model.can_generate() and not model.config.is_encoder_decoder:
        longest = getattr(model.config, "max_position_embeddings", None) or WINDOW
        batches = packed(texts, tokenizer, batch_size=batch_size or 4, length=max_length or min(WINDOW, longest))
        return [{**batch, "labels": batch["input_ids"]} for batch in batches] if given.task else batches
    length = _length(model, texts, tokenizer, max_length)
    batches = tokenized(texts, tokenizer, batch_size=batch_size or 16, max_length=length)
    if model.can_generate():  # an encoder-decoder writes each text again
        for batch in batches:
            batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    elif given.task:
        _label(batches, model, given)
    return batches


def _as_served(source: str, texts: list[Any], tokenizer: Any, prefix: str | None) -> list[Any]:
    """Texts as the model's users feed them: with what stands before them, and cut where the folder says."""
    from pathprune.serving import served

    use = served(source, fetch=True)
    if use is not None:
        prefix = use.prefix if prefix is None else prefix
        tokenizer.model_max_length = min(tokenizer.model_max_length, use.max_length or tokenizer.model_max_length)
        named = f" (its prompts: {', '.join(use.prompts)})" if use.prompts else ""
        _say(f"as served: pooling {use.pooling}; --prefix {prefix!r}{named}")
    if not isinstance(texts[0], str):
        if prefix:
            raise SettingError(f"--prefix {prefix!r} goes before texts; a conversation begins as its template says")
        return texts
    texts = [(prefix or "") + text for text in texts]
    return [text.lower() for text in texts] if use is not None and use.lower_case else texts


def _length(model: Any, texts: list[str], tokenizer: Any, asked: int | None) -> int:
    """Tokens at which texts are cut: the same rule for every command; says what it comes to."""
    from pathprune.data import fitting_length, token_lengths

    positions = getattr(model.config, "max_position_embeddings", None) or math.inf
    if asked and asked > positions:
        raise SettingError(
            f"--max-length {asked} is more than the {positions:,} tokens that {type(model).__name__} reads"
        )
    most = min(512, positions, tokenizer.model_max_length)
    lengths = token_lengths(texts, tokenizer)
    length = asked or fitting_length(lengths, most)
    longer = sum(size > length for size in lengths)
    of = f"the {len(lengths):,} texts" if len(lengths) == len(texts) else f"{len(lengths):,} texts looked at"
    _say(f"texts are cut at {length} tokens (--max-length); {longer:,} of {of} {'is' if longer == 1 else 'are'} longer")
    return length


def _amount(batches: Any) -> str:
    """What data there is, in words."""
    if not isinstance(batches, list):
        return f"{len(batches.files):,} images, {batches.batch_size} at a time"
    samples = sum(len(batch["input_ids"]) for batch in batches)
    tokens = sum(
        int(batch["attention_mask"].sum()) if "attention_mask" in batch else batch["input_ids"].numel()
        for batch in batches
    )
    longest = max(batch["input_ids"].shape[1] for batch in batches)
    what = "texts" if "attention_mask" in batches[0] else "windows"
    return f"{samples:,} {what} of up to {longest} tokens, {tokens:,} tokens in {len(batches):,} batches"


def _known_labels(model: Any) -> dict[str, int]:
    """Name -> label of a classifier.

    Raises:
        DataError: it is none, or tells no single label.
    """
    config, kind = model.config, type(model).__name__
    if (
        not kind.endswith(("SequenceClassification", "ImageClassification"))
        or config.num_labels < 2
        or config.problem_type not in (None, "single_label_classification")
    ):
        raise DataError(
            f"--objective task reads one label for each text or image, which {kind} does not tell; "
            "from Python, search takes batches with labels of any kind"
        )
    return dict(config.label2id)


def _label(batches: list[dict[str, Any]], model: Any, given: _Given) -> None:
    """Put labels into the batches, by the model's names or as whole numbers.

    Raises:
        DataError: the texts have none, or one that the model does not know.
    """
    import torch

    from pathprune.reading import read_file

    known, ids = _known_labels(model), []
    for label in read_file(given.data, given.field, given.label_field).labels or ():
        number = known.get(str(label), int(label) if str(label).isdigit() else -1)
        if not 0 <= number < model.config.num_labels:
            some = ", ".join(str(name)[:40] for name in sorted(known, key=known.__getitem__)[:8]) + (
                ", ..." if len(known) > 8 else ""
            )
            raise DataError(
                f"{given.data}: the label {str(label)[:40]!r} of {given.label_field!r} is none of the model's ({some})"
            )
        ids.append(number)
    start = 0
    for batch in batches:
        size = len(batch["input_ids"])
        batch["labels"] = torch.tensor(ids[start : start + size])
        start += size
