"""benchmarks/faults.py, a sample of it: no fault at any file event costs an artifact or a file beside it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import pathprune

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="faults fall in forked processes")
def test_no_fault_loses_anything(tmp_path: Path) -> None:
    """In a process of its own, which has one thread and may fork."""
    out = tmp_path / "faults.json"
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "faults.py", "--out", out, "--every", "23", "--every-slow", "199"],
        env={**os.environ, "PYTHONPATH": str(Path(pathprune.__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr
    record = json.loads(out.read_text())
    for row in record["scenarios"]:
        assert row["lost"] == row["not_finished_by_the_next_run"] == row["errors_that_are_not_ours"] == [], row
        assert row["faults"] > 0
    assert record["faults"] > 80
    killed = [code for row in record["scenarios"] for code in row["exit_codes"]]
    assert {"-9", "-15", "130", "2", "0"} <= set(killed), "faults of every kind fell"
