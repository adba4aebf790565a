"""Folders that earlier releases wrote open for ever, and compute what they did (``golden/make.py`` made them)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

import pathprune as pp
from golden import make

GOLDEN = Path(make.__file__).parent
RELEASES = sorted(folder.name for folder in GOLDEN.iterdir() if (folder / "path").is_dir())
SLICED = ("bert", "llama", "mixtral", "t5", "other")


@pytest.fixture(params=RELEASES)
def release(request: pytest.FixtureRequest) -> Path:
    return GOLDEN / request.param


def expected(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    return load_file(folder / "expected.safetensors"), json.loads((folder / "expected.json").read_text())


def agree(found: Tensor, stored: Tensor) -> None:
    assert found.shape == stored.shape
    assert (found - stored).abs().max() <= 1e-9 * stored.abs().max()


def dense(release: Path) -> Any:
    return transformers.AutoModel.from_pretrained(release / "dense").eval()


def test_there_are_golden_artifacts() -> None:
    assert "0.1.0" in RELEASES


def test_a_path_selects_and_slices_as_it_did(release: Path) -> None:
    outputs, facts = expected(release / "path")
    path = pp.SolutionPath.load(release / "path")
    assert make.numbers(path) == facts["selections"]
    for keep, stored in outputs.items():
        small = pp.slice_model(dense(release), path.select(pp.Budget(keep=float(keep))))
        agree(make.outputs(small, "bert"), stored)


def test_a_path_is_written_as_it_was(release: Path, tmp_path: Path) -> None:
    for name in ("path", "elastic"):
        pp.SolutionPath.load(release / name).save(tmp_path / name)
        before, after = (json.loads((folder / name / "path.json").read_text()) for folder in (release, tmp_path))
        assert after == before
        one, other = (load_file(folder / name / before["tensors"]["file"]) for folder in (release, tmp_path))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_an_elastic_folder_loads_at_every_size_as_it_did(release: Path) -> None:
    outputs, facts = expected(release / "elastic")
    path = pp.SolutionPath.load(release / "elastic")
    assert make.numbers(path) == facts["selections"]
    whole = transformers.AutoModel.from_pretrained(release / "elastic").eval()
    for keep, stored in outputs.items():
        budget = pp.Budget(keep=float(keep))
        agree(make.outputs(pp.slice_model(whole, path.select(budget)), "bert"), stored)
        agree(make.outputs(pp.load_slice(release / "elastic", budget), "bert"), stored)


@pytest.mark.filterwarnings("ignore:steps=12")
def test_a_search_goes_on_to_the_same_path(release: Path, tmp_path: Path) -> None:
    ranking, facts = expected(release / "checkpoint")
    out = shutil.copytree(release / "checkpoint", tmp_path / "search")
    path = pp.search(dense(release), make.batches(), out=out, resume=True, objective="embedding", **make.SEARCH)
    for name, stored in ranking.items():
        torch.testing.assert_close(torch.from_numpy(path.ranking[name]), stored, rtol=1e-4, atol=1e-5)
    assert make.numbers(path) == facts["selections"]


@pytest.mark.parametrize("name", SLICED)
def test_a_sliced_model_computes_what_it_did(release: Path, name: str) -> None:
    folder = release / f"sliced-{name}"
    if name == "other":
        model: Any = pp.load_model(make.Block().double(), folder)
    else:
        model = getattr(transformers, make.MODELS[name][1]).from_pretrained(folder, experts_implementation="eager")
    agree(make.outputs(model, name), expected(folder)[0]["output"])
