"""``pathprune search``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from pathprune.cli.inputs import DataOptions, describe_batches, make_batches, read_data, reads_data
from pathprune.cli.models import check_model, load_dense
from pathprune.cli.options import (
    Bf16Opt,
    DynamicsOpt,
    JsonOpt,
    ModelArg,
    OverwriteOpt,
    SeedOpt,
    UnitOpt,
    check_fraction,
)
from pathprune.cli.output import note_stale_members, print_json, say, shell_word
from pathprune.errors import PathpruneError

if TYPE_CHECKING:
    from pathprune.family.order import Unit


@reads_data
def search(
    model: ModelArg,
    source: DataOptions,
    out: Annotated[Path, typer.Option(help="Folder for the solution path and its checkpoints.")],
    dynamics: DynamicsOpt = "sampled",
    steps: Annotated[int, typer.Option(min=3, help="Forward-backward passes.")] = 400,
    unit: UnitOpt = "mixed",
    multiple: Annotated[int, typer.Option(min=1, max=2**20, help="Keep widths at multiples of this.")] = 8,
    lowest: Annotated[
        float, typer.Option(help="Smallest fraction of the prunable parameters to try; the search goes to larger ones.")
    ] = 0.1,
    compensate: Annotated[
        bool, typer.Option(help="Tell what leaves from what stays; without, less memory and worse models.")
    ] = True,
    seed: SeedOpt = 0,
    bf16: Bf16Opt = False,
    resume: Annotated[bool, typer.Option(help="Go on from the checkpoint in --out.")] = False,
    overwrite: OverwriteOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Find the solution path: one run that ranks every unit of the model."""
    check_fraction("--lowest", lowest)
    if resume and overwrite:
        raise PathpruneError("--resume goes on with the search in --out, --overwrite begins anew; give one of them")
    if resume and not any((out / name).exists() for name in ("checkpoint.json", "path.json")):
        raise PathpruneError(f"--resume: {out} holds no search to go on with; leave it out to begin one")
    check_model(model)
    texts = read_data(source)
    from pathprune.ranking.checkpoint import RESUMING, held_search
    from pathprune.ranking.run import search as run

    held = held_search(out)
    if held and not (resume or overwrite):
        raise PathpruneError(
            f"{out} holds {held}; --resume to {RESUMING[held]}, --overwrite to search anew in its place, or choose "
            "another --out"
        )
    if overwrite:
        note_stale_members(out)
    dense = load_dense(model, source.device)
    batches = make_batches(dense, model, source, texts)
    say(f"search: {steps} steps over {describe_batches(batches)}")
    try:
        path = run(
            dense,
            batches,
            objective=source.objective,
            out=out,
            resume=resume,
            overwrite=overwrite,
            progress=True,
            dynamics=dynamics,
            steps=steps,
            seed=seed,
            unit=cast("Unit", unit),
            multiple=multiple,
            lowest_level=lowest,
            compensate=compensate,
            bf16=bf16,
        )
    except KeyboardInterrupt:
        typer.echo(f"\nStopped. What is done is in {out}; the same command with --resume goes on from there.", err=True)
        raise typer.Exit(130) from None
    if as_json:
        print_json(out=str(out), pairs=len(path.pairs), prunable_params=path.pairs.prunable_params, config=path.config)
        return
    typer.echo(f"The path of {len(path.pairs)} pairs is in {out}.")
    typer.echo(
        f"Next: pathprune slice {shell_word(out)} {shell_word(model)} --keep 0.5 --out {shell_word(out / 'keep-50')}"
    )
