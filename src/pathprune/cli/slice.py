"""``pathprune slice``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pathprune.cli.models import check_model, load_dense
from pathprune.cli.options import (
    JsonOpt,
    ModelArg,
    OverwriteOpt,
    parse_size,
)
from pathprune.cli.output import check_out, print_json, shell_word


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
    on_disk: Annotated[
        str | None, typer.Option("--bytes", help="Bytes of the weights on disk: a share (0.7, 70%) or a size (60MB).")
    ] = None,
    overwrite: OverwriteOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Cut a model of the size you ask for from a path, and save it like any other."""
    from pathprune.family.budget import Budget
    from pathprune.family.path import SolutionPath

    budget = Budget(
        keep=parse_size("--keep", keep),
        params=parse_size("--params", params),
        macs=parse_size("--macs", macs),
        bytes=parse_size("--bytes", on_disk),
    )
    path = SolutionPath.load(run)
    selection = path.select(budget)
    check_model(model)
    from pathprune.checkpoint.save import save_model
    from pathprune.model.identity import itemsize
    from pathprune.transform.slicing import slice_model

    check_out(out, overwrite, model)
    dense = load_dense(model, "cpu")
    if budget.kind == "bytes":  # in the precision of this folder, which need not be the one that was searched
        selection = path.select(budget, itemsize=itemsize(dense))
    save_model(slice_model(dense, selection), out, source=model)
    if as_json:
        print_json(out=str(out), **selection.to_dict())
        return
    typer.echo(f"{out}: {selection}")
    typer.echo(
        f"Next: pathprune recover {shell_word(out)} --teacher {shell_word(model)} --data DATA "
        f"--out {shell_word(f'{out}-recovered')} "
        "(DATA: what was searched on, or more of the kind)"
    )
