"""``pathprune export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pathprune.cli.models import check_model, load_dense
from pathprune.cli.options import JsonOpt, OverwriteOpt, one_of
from pathprune.cli.output import check_out, print_json
from pathprune.registry import EXPORTERS


def export(
    target: Annotated[
        str,
        typer.Argument(
            callback=one_of(lambda: EXPORTERS),
            help="For what: auto, transformers where pathprune is not installed (trust_remote_code=True).",
        ),
    ],
    model: Annotated[str, typer.Argument(help="Folder of a sliced model.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    overwrite: OverwriteOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Write a sliced model for a runtime that does not know pathprune."""
    check_model(model)
    check_out(out, overwrite, model)
    how = EXPORTERS[target](load_dense(model, "cpu"), out, source=model)
    if as_json:
        print_json(out=str(out), target=target, open=how)
        return
    typer.echo(f"{out}: {how}")
