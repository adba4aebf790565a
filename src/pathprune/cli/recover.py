"""``pathprune recover``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pathprune.cli.inputs import DataOptions, describe_batches, make_batches, read_data, reads_data
from pathprune.cli.models import check_model, load_dense
from pathprune.cli.options import (
    Bf16Opt,
    JsonOpt,
    OverwriteOpt,
    SeedOpt,
    check_rate,
)
from pathprune.cli.output import check_out, print_json, say, shell_word


@reads_data
def recover(
    model: Annotated[str, typer.Argument(help="Folder of a sliced model.")],
    teacher: Annotated[str, typer.Option(help="Folder or hub id of the dense model.")],
    source: DataOptions,
    out: Annotated[Path, typer.Option(help="Folder for the recovered model.")],
    steps: Annotated[int, typer.Option(min=1, help="Distillation steps.")] = 300,
    lr: Annotated[
        float | None,
        typer.Option(help="Peak learning rate; by default it goes by how much of the model is gone."),
    ] = None,
    seed: SeedOpt = 0,
    bf16: Bf16Opt = False,
    lora_rank: Annotated[
        int | None, typer.Option(min=1, help="Train updates of this rank (LoRA), not the weights themselves.")
    ] = None,
    overwrite: OverwriteOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Train a sliced model to imitate the dense one again, without labels."""
    check_rate(lr)
    for name in (model, teacher):
        check_model(name)
    texts = read_data(source)
    from pathprune.checkpoint.save import save_model
    from pathprune.recovery import recover as run

    check_out(out, overwrite, model, teacher)
    dense, small = load_dense(teacher, source.device), load_dense(model, source.device)
    batches = make_batches(dense, teacher, source, texts)
    settings: dict[str, Any] = {"steps": steps, "lr": lr, "seed": seed, "objective": source.objective, "bf16": bf16}
    settings["lora_rank"] = lora_rank
    say(f"recover: {steps} steps over {describe_batches(batches)}")
    recovered: Any = run(small, teacher=dense, data=batches, progress=True, **settings)
    outcome = recovered.recovery
    save_model(recovered, out, source=model)
    before, after = 1 - outcome.before[0], 1 - outcome.after[0]
    if as_json:
        held_out = {"samples": outcome.samples, "before": before, "after": after}
        print_json(out=str(out), fidelity_held_out=held_out, steps=outcome.steps, kept=outcome.kept, lr=outcome.lr)
        return
    typer.echo(
        f"{out}: fidelity to dense on {outcome.samples} samples that were held back {before:.4f} -> {after:.4f} "
        f"(step {outcome.kept} of {outcome.steps})"
    )
    typer.echo(
        f"Next: pathprune evaluate {shell_word(out)} --teacher {shell_word(teacher)} --data UNSEEN "
        f"(UNSEEN: of the kind of {source.data}, and not in it)"
    )
