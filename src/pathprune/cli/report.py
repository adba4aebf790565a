"""``pathprune report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(folder: Annotated[Path, typer.Argument(help="Folder with family.json and path/.")]) -> None:
    """Draw a family: one page with its table and pictures."""
    from pathprune.report import write_report

    typer.echo(f"{write_report(folder)}")
