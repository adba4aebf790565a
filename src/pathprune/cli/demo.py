"""``pathprune demo``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from pathprune.cli.options import (
    JsonOpt,
    OverwriteOpt,
    SeedOpt,
)
from pathprune.cli.output import print_json
from pathprune.errors import PathpruneError


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
        print_json(**family)
        return
    typer.echo(table(family))
    typer.echo(f"\nReport: {out / 'report.html'}")
    typer.echo(f"Load one: import pathprune; AutoModel.from_pretrained('{out / 'keep-50'}')")
