"""Every public docstring has an example, and it runs."""

from __future__ import annotations

import doctest
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import pathprune as pp
from helpers import tiny_batches, tiny_bert


@pytest.fixture(scope="module")
def names() -> dict[str, Any]:
    """What examples take as given: a tiny dense model, batches for it, and its path."""
    model, batches = tiny_bert(), tiny_batches()
    path = pp.search(model, batches, steps=20, progress=False)
    known = {"pp": pp, "torch": torch, "AutoModel": transformers.AutoModel}
    return {**known, "model": model, "batches": batches, "path": path}


@pytest.mark.parametrize("name", pp.__all__)
def test_the_example_of(name: str, names: dict[str, Any], tmp_path: Path) -> None:
    subject = getattr(pp, name)
    found = doctest.DocTestFinder(recurse=False).find(subject, name, globs={**names, "folder": tmp_path})
    examples = [test for test in found if test.examples]
    assert examples, f"{name} has no example"
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    said: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for test in examples:
            runner.run(test, out=said.append)
    assert not runner.summarize(verbose=False).failed, "".join(said)
