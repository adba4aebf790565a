"""The ``pathprune`` command: parses, calls, prints. Everything it does is a call of the library."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Iterable
from enum import StrEnum
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer

from pathprune import __version__
from pathprune.errors import PathpruneError

WINDOW = 256  # tokens

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


ModelArg = Annotated[str, typer.Argument(help="Folder or hub id of the dense model.")]
DataOpt = Annotated[
    Path, typer.Option(help="Unlabelled texts, one a line or .jsonl with a field; or a folder of images.")
]
ObjectiveOpt = Annotated[
    str, typer.Option(help="What to stay close to: embedding, hidden, logits; auto goes by what the model returns.")
]
FieldOpt = Annotated[str, typer.Option(help="Field of a .jsonl file that holds the text.")]
BatchOpt = Annotated[
    int | None, typer.Option(min=1, help="Texts or images in a batch: by default 16, of language models 4.")
]
LengthOpt = Annotated[
    int | None,
    typer.Option(
        min=2,
        help="Tokens of a text, by default 48 (128 to evaluate); longer ones are cut. "
        "Of language models, the window's length, by default 256.",
    ),
]
DeviceOpt = Annotated[str | None, typer.Option(help="cpu, cuda, ...; the default is a GPU where there is one.")]
SeedOpt = Annotated[int, typer.Option(help="Seed of everything random.")]
Bf16Opt = Annotated[bool, typer.Option("--bf16", help="Multiply matrices in bfloat16: faster where the hardware can.")]
OverwriteOpt = Annotated[bool, typer.Option("--overwrite", help="Replace what --out holds.")]
JsonOpt = Annotated[bool, typer.Option("--json", help="Print one JSON object, for programs.")]


def main() -> None:
    """Entry point: bad input ends with one clear line and exit code 2, Ctrl-C with 130, as does what a scheduler sends
    before it kills.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
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
    objective: ObjectiveOpt = "auto",
    dynamics: Annotated[Dynamics, typer.Option(help="How the path is found.")] = Dynamics.sampled,
    steps: Annotated[int, typer.Option(help="Forward-backward passes.")] = 400,
    unit: Annotated[UnitName, typer.Option(help="What an attention layer may lose.")] = UnitName.mixed,
    multiple: Annotated[int, typer.Option(help="Keep widths at multiples of this.")] = 8,
    lowest: Annotated[
        float, typer.Option(help="Smallest fraction of the prunable parameters to try; the search goes to larger ones.")
    ] = 0.1,
    compensate: Annotated[
        bool, typer.Option(help="Tell what leaves from what stays; without, less memory and worse models.")
    ] = True,
    batch_size: BatchOpt = None,
    max_length: LengthOpt = None,
    field: FieldOpt = "text",
    seed: SeedOpt = 0,
    bf16: Bf16Opt = False,
    device: DeviceOpt = None,
    resume: Annotated[bool, typer.Option(help="Go on from the checkpoint in --out.")] = False,
    overwrite: OverwriteOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Find the solution path: one run that ranks every unit of the model."""
    from pathprune.searching import RESUMING, held_search
    from pathprune.searching import search as run

    if resume and overwrite:
        raise PathpruneError("--resume goes on with the search in --out, --overwrite begins anew; give one of them")
    held = held_search(out)
    if held and not (resume or overwrite):
        raise PathpruneError(
            f"{out} holds {held}; --resume to {RESUMING[held]}, --overwrite to search anew in its place, or choose "
            "another --out"
        )
    if overwrite:
        _name_members(out)
    dense = _load(model, device)
    try:
        path = run(
            dense,
            _batches(dense, model, data, field, batch_size, max_length),
            objective=objective,
            out=out,
            resume=resume,
            overwrite=overwrite,
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
    overwrite: OverwriteOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Cut a model of the size you ask for from a path, and save it like any other."""
    from pathprune.budget import Budget
    from pathprune.hub import save_model
    from pathprune.path import SolutionPath
    from pathprune.slicing import slice_model

    _check_out(out, overwrite, model)
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
    steps: Annotated[int, typer.Option(help="Distillation steps.")] = 300,
    lr: Annotated[
        float | None,
        typer.Option(help="Peak learning rate; by default it goes by how much of the model is gone."),
    ] = None,
    lora_rank: Annotated[
        int | None, typer.Option(help="Train updates of this rank (LoRA), not the weights themselves.")
    ] = None,
    objective: ObjectiveOpt = "auto",
    batch_size: BatchOpt = None,
    max_length: LengthOpt = None,
    field: FieldOpt = "text",
    seed: SeedOpt = 0,
    bf16: Bf16Opt = False,
    device: DeviceOpt = None,
    overwrite: OverwriteOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Train a sliced model to imitate the dense one again, without labels."""
    from pathprune.evaluation import fidelity
    from pathprune.hub import save_model
    from pathprune.recovery import recover as run

    _check_out(out, overwrite, model, teacher)
    dense, small = _load(teacher, device), _load(model, device)
    batches = _batches(dense, teacher, data, field, batch_size, max_length)
    settings: dict[str, Any] = {"steps": steps, "lr": lr, "seed": seed, "objective": objective, "bf16": bf16}
    settings["lora_rank"] = lora_rank
    first = list(islice(batches, 8))
    before = fidelity(small, dense, first, objective)
    recovered = run(small, teacher=dense, data=batches, **settings)
    after = fidelity(recovered, dense, first, objective)
    save_model(recovered, out, source=model)
    if as_json:
        _print_json(out=str(out), fidelity_on_training_data={"before": before, "after": after})
        return
    typer.echo(f"{out}: fidelity to dense on the first batches of this data {before:.4f} -> {after:.4f}")
    typer.echo(f"Next: pathprune evaluate {out} --teacher {teacher} --data unseen.txt")


@app.command()
def elastic(
    run: Annotated[Path, typer.Argument(help="Folder of a solution path.")],
    model: ModelArg,
    data: DataOpt,
    out: Annotated[Path, typer.Option(help="Folder for the elastic model and its path.")],
    steps: Annotated[int, typer.Option(help="Distillation steps, for all sizes together.")] = 1000,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 3e-4,
    lowest: Annotated[float, typer.Option(help="Smallest fraction of the prunable parameters to train.")] = 0.2,
    objective: ObjectiveOpt = "auto",
    batch_size: BatchOpt = None,
    max_length: LengthOpt = None,
    field: FieldOpt = "text",
    seed: SeedOpt = 0,
    bf16: Bf16Opt = False,
    device: DeviceOpt = None,
    overwrite: OverwriteOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Recover every size of a path at once, in one checkpoint of the dense model's shapes."""
    from pathprune.hub import save_model
    from pathprune.path import SolutionPath
    from pathprune.recovery import elastic as train

    _check_out(out, overwrite, model)
    _name_members(out)
    dense = _load(model, device)
    batches = _batches(dense, model, data, field, batch_size, max_length)
    settings: dict[str, Any] = {"steps": steps, "lr": lr, "lowest": lowest, "objective": objective, "seed": seed}
    settings["bf16"] = bf16
    trained, path = train(dense, SolutionPath.load(run), data=batches, **settings)
    save_model(trained, out, source=model, path=path)
    if as_json:
        _print_json(out=str(out), **settings)
        return
    typer.echo(f"{out}: {type(trained).__name__} in which every size from {lowest:.0%} up is recovered")
    typer.echo(f"Next: pathprune slice {out} {out} --keep 0.5 --out {out}-50")


@app.command()
def evaluate(
    models: Annotated[list[str], typer.Argument(help="Folders of sliced models.")],
    teacher: Annotated[str, typer.Option(help="Folder or hub id of the dense model.")],
    data: DataOpt,
    objective: ObjectiveOpt = "auto",
    batch_size: BatchOpt = None,
    max_length: LengthOpt = None,
    field: FieldOpt = "text",
    device: DeviceOpt = None,
    as_json: JsonOpt = False,
) -> None:
    """Compare sliced models with the dense one: fidelity on unseen data, size, and latency in turns.

    Fidelity is one minus the objective's loss: for embeddings, the mean cosine to the dense ones; for logits, one
    minus the divergence in nats.
    """
    from pathprune.data import Batches
    from pathprune.evaluation import bytes_on_disk, fidelity, latency
    from pathprune.objectives import get_objective, objective_name

    dense = _load(teacher, device)
    batches = _batches(dense, teacher, data, field, batch_size, max_length, tokens=128)
    loaded = [dense, *(_load(model, device) for model in models)]
    timing = Batches(dense, batches).first
    goal = get_objective(objective, dense, timing)
    times = latency(loaded, timing)
    rows = [
        {
            "model": name,
            "params": sum(parameter.numel() for parameter in model.parameters()),
            "bytes_on_disk": bytes_on_disk(name) if Path(name).is_dir() else None,
            "latency_ms": time,
            "latency_ratio": time / times[0],
            "fidelity": fidelity(model, dense, batches, goal),
        }
        for name, model, time in zip([teacher, *models], loaded, times, strict=True)
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


@app.command()
def report(folder: Annotated[Path, typer.Argument(help="Folder with family.json and path/.")]) -> None:
    """Draw a family: one page with its table and pictures."""
    from pathprune.report import write_report

    typer.echo(f"{write_report(folder)}")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for everything the demo makes.")] = Path("pathprune-demo"),
    steps: Annotated[int, typer.Option(help="Search steps.")] = 300,
    recover_steps: Annotated[
        int | None,
        typer.Option(help="Distillation steps for each size; by default 800 where bfloat16 is fast, else 400."),
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


def _number(text: str | None) -> float | int | None:
    """``"0.7"`` is a fraction, ``"90000000"`` an absolute number."""
    if text is None:
        return None
    try:
        return int(text) if text.lstrip("-").isdigit() else float(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is neither a fraction nor a number") from None


def _load(name: str, device: str | None) -> Any:
    """A model by folder or hub id, ready to run: with the head that the checkpoint holds, or none."""
    import torch
    import transformers
    from safetensors import SafetensorError
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        config = transformers.AutoConfig.from_pretrained(name)
        kind = getattr(transformers, (config.architectures or ["AutoModel"])[0], transformers.AutoModel)
        model, found = kind.from_pretrained(name, output_loading_info=True)
        if found["missing_keys"]:  # a configuration that names a head, and weights without it
            model = transformers.AutoModel.from_pretrained(name)
    except (OSError, ValueError, SafetensorError) as error:
        raise PathpruneError(f"cannot load a model from {name!r}: {error}") from error
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return model.to(device).eval()
    except (RuntimeError, AssertionError) as error:
        raise PathpruneError(f"cannot run on --device {device}: {error}") from error


def _batches(
    model: Any,
    source: str,
    data: Path,
    field: str,
    batch_size: int | None,
    max_length: int | None,
    tokens: int = 48,
) -> Iterable[dict[str, Any]]:
    """A folder is images; a file is texts: full windows for a language model, else one padded line each."""
    from transformers import AutoImageProcessor, AutoTokenizer

    from pathprune.data import Images, packed, read_texts, tokenized

    kind: Any = AutoImageProcessor if data.is_dir() else AutoTokenizer
    try:
        reader = kind.from_pretrained(source)
    except (OSError, ValueError) as error:
        what = "a folder, of images," if data.is_dir() else "a file, of texts,"
        raise PathpruneError(f"--data {data} is {what} and {source} has nothing to read them with: {error}") from error
    if data.is_dir():
        return Images(data, reader, batch_size=batch_size or 16)
    texts, tokenizer = read_texts(data, field), reader
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # what stands there is masked
    if model.can_generate() and not model.config.is_encoder_decoder:
        longest = getattr(model.config, "max_position_embeddings", None) or WINDOW
        return packed(texts, tokenizer, batch_size=batch_size or 4, length=max_length or min(WINDOW, longest))
    batches = tokenized(texts, tokenizer, batch_size=batch_size or 16, max_length=max_length or tokens)
    if model.can_generate():  # an encoder-decoder writes each text again
        for batch in batches:
            batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return batches
