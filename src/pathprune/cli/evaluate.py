"""``pathprune evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pathprune.cli.inputs import DataOptions, describe_batches, make_batches, read_data, reads_data
from pathprune.cli.models import check_model, load_dense
from pathprune.cli.options import (
    JsonOpt,
)
from pathprune.cli.output import print_json


@reads_data
def evaluate(
    models: Annotated[list[str], typer.Argument(help="Folders of sliced models.")],
    teacher: Annotated[str, typer.Option(help="Folder or hub id of the dense model.")],
    source: DataOptions,
    as_json: JsonOpt = False,
) -> None:
    """Compare sliced models with the dense one: fidelity on unseen data, size, and latency in turns.

    Fidelity is one minus the objective's loss: for embeddings, the mean cosine to the dense ones; for logits, one
    minus the divergence in nats.
    """
    for name in (teacher, *models):
        check_model(name)
    texts = read_data(source)
    from pathprune.data.batches import Batches
    from pathprune.evaluation import bytes_on_disk, fidelities, latency
    from pathprune.objectives.choose import get_objective, objective_name
    from pathprune.objectives.targets import Targets

    dense = load_dense(teacher, source.device)
    batches = make_batches(dense, teacher, source, texts)
    loaded = [dense, *(load_dense(model, source.device) for model in models)]
    timing = Batches(dense, batches).first
    goal = get_objective(source.objective, dense, timing)
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
        print_json(latency_input=shape, objective=objective_name(goal), models=rows)
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
    typer.echo(f"(fidelity on {describe_batches(batches)})")
