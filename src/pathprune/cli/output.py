"""What commands print, and where they write."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import typer

from pathprune.errors import PathpruneError


def check_out(out: Path, overwrite: bool, *sources: str) -> None:
    """Refuse a folder that a model may not be written to, before anything is loaded."""
    from pathprune.checkpoint.folders import check_free

    folder = check_free(out, *sources)
    if not overwrite and folder.is_dir() and any(folder.iterdir()):
        raise PathpruneError(f"{out} holds a model; --overwrite replaces it, or choose another --out")


def note_stale_members(out: Path) -> None:
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


def print_json(**facts: Any) -> None:
    typer.echo(json.dumps(facts, indent=1))


def shell_word(text: object) -> str:
    """As a shell wants it."""
    return shlex.quote(str(text))


def say(text: str) -> None:
    typer.echo(text, err=True)
