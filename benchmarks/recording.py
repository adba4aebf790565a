"""What the benchmarks share: their command line, and the end of their records."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from pathprune.evaluation import machine, peak_memory
from pathprune.family.files import write_text
from pathprune.versions import library_versions


def parser(description: str | None, *, steps: int | None, seeds: int) -> argparse.ArgumentParser:
    """The arguments of every benchmark that searches, with its defaults."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--out", type=Path, required=True, help="JSON file to write")
    made.add_argument("--steps", type=int, default=steps, help="forward-backward passes of a search")
    made.add_argument("--seeds", type=int, default=seeds)
    made.add_argument("--split", default="test", choices=["choice", "test"], help="settings are chosen on choice")
    made.add_argument("--setting", action="append", default=[], metavar="NAME=VALUE", help="of SearchConfig")
    return made


def search_settings(args: argparse.Namespace) -> dict[str, Any]:
    """What ``--setting`` gave."""
    return {name: json.loads(value) for name, _, value in (item.partition("=") for item in args.setting)}


def command() -> str:
    """What repeats this run."""
    return shlex.join(["python", *sys.argv])


def _commit() -> str:
    """Of the code, with ``-dirty`` where the code differs from it; or what ``PATHPRUNE_COMMIT`` says, where the code is
    no clone's; or empty.
    """
    if told := os.environ.get("PATHPRUNE_COMMIT"):
        return told

    def git(*words: str) -> subprocess.CompletedProcess[str]:
        root = Path(__file__).parents[1]
        return subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=False)

    name = git("rev-parse", "--short=10", "HEAD").stdout.strip()
    changed = git("diff", "--quiet", "HEAD", "--", "src", ":(glob)benchmarks/**/*.py").returncode == 1
    return f"{name}-dirty" if changed else name


COMMIT = _commit()  # when the run begins: another may be checked out before it ends


def write_record(out: Path, record: dict[str, Any]) -> None:
    """Write a record with the machine and the versions that it was measured with."""
    facts = {"peak_memory_gib": round(peak_memory() / 2**30, 2), "machine": machine(), "versions": library_versions()}
    write_text(out, json.dumps(record | facts, indent=1))
