"""``pathprune elastic``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pathprune.cli.inputs import DataOptions, describe_batches, make_batches, read_data, reads_data
from pathprune.cli.models import check_model, load_dense
from pathprune.cli.options import (
    Bf16Opt,
    JsonOpt,
    ModelArg,
    OverwriteOpt,
    SeedOpt,
    check_fraction,
    check_rate,
)
from pathprune.cli.output import check_out, note_stale_members, print_json, say, shell_word


@reads_data
def elastic(
    run: Annotated[Path, typer.Argument(help="Folder of a solution path.")],
    model: ModelArg,
    source: DataOptions,
    out: Annotated[Path, typer.Option(help="Folder for the elastic model and its path.")],
    steps: Annotated[int, typer.Option(min=1, help="Distillation steps, for all sizes together.")] = 1000,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 3e-4,
    lowest: Annotated[float, typer.Option(help="Smallest fraction of the prunable parameters to train.")] = 0.2,
    seed: SeedOpt = 0,
    bf16: Bf16Opt = False,
    overwrite: OverwriteOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Recover every size of a path at once, in one checkpoint of the dense model's shapes."""
    from pathprune.family.path import SolutionPath

    check_rate(lr)
    check_fraction("--lowest", lowest)
    searched = SolutionPath.load(run)
    check_model(model)
    texts = read_data(source)
    from pathprune.checkpoint.save import save_model
    from pathprune.recovery import elastic as train

    check_out(out, overwrite, model)
    note_stale_members(out)
    dense = load_dense(model, source.device)
    batches = make_batches(dense, model, source, texts)
    settings: dict[str, Any] = {"steps": steps, "lr": lr, "lowest": lowest, "objective": source.objective, "seed": seed}
    settings["bf16"] = bf16
    say(f"elastic: {steps} steps over {describe_batches(batches)}")
    trained, path = train(dense, searched, data=batches, progress=True, **settings)
    save_model(trained, out, source=model, path=path)
    held_out = path.config["held_out"]
    if as_json:
        print_json(out=str(out), held_out=held_out, **settings)
        return
    typer.echo(f"{out}: {type(trained).__name__} in which every size from {lowest:.0%} up is recovered")
    found = zip(held_out["levels"], held_out["before"], held_out["after"], strict=True)
    gains = ", ".join(f"at {level:.0%} {1 - before:.4f} -> {1 - after:.4f}" for level, before, after in found)
    typer.echo(f"fidelity to dense on {held_out['samples']} samples that were held back: {gains}")
    typer.echo(f"Next: pathprune slice {shell_word(out)} {shell_word(out)} --keep 0.5 --out {shell_word(f'{out}-50')}")
