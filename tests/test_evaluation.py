"""Measurements, and that what they record is what the report reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import pathprune as pp
from helpers import tiny_batches, tiny_bert
from pathprune.evaluation import bytes_on_disk, family_record, fidelity, latency, member
from pathprune.objectives.embedding import EmbeddingObjective
from pathprune.objectives.targets import Targets
from pathprune.report import write_report


def test_fidelity_is_the_mean_cosine() -> None:
    model, other, data = tiny_bert(), tiny_bert(seed=1), tiny_batches()
    data.append({key: value[:1] for key, value in data[0].items()})  # a last, smaller batch counts for less
    assert fidelity(model, model, data) == pytest.approx(1, abs=1e-6)

    def embed(which: nn.Module) -> torch.Tensor:
        rows = []
        for batch in data:
            with torch.no_grad():
                hidden = which(**batch).last_hidden_state
            rows += [h[m.bool()].mean(0) for h, m in zip(hidden, batch["attention_mask"], strict=True)]
        return torch.stack(rows)

    expected = torch.cosine_similarity(embed(other), embed(model), dim=-1).mean().item()
    assert fidelity(other, model, data) == pytest.approx(expected, abs=1e-6)
    assert fidelity(other, Targets(model, EmbeddingObjective()), data) == pytest.approx(expected, abs=1e-6)
    with pytest.raises(pp.DataError, match="data is empty"):
        fidelity(other, model, [])


def test_latency_tells_slow_from_fast() -> None:
    class Repeat(nn.Module):
        def __init__(self, times: int) -> None:
            super().__init__()
            self.times = times

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for _ in range(self.times):
                x = torch.tanh(x @ x)
            return x

    fast, slow = latency([Repeat(1), Repeat(20)], {"x": torch.rand(128, 128)}, seconds=0.1)
    assert slow > 3 * fast > 0


@pytest.mark.parametrize("kind", ["cpu", "cuda", "mps", "xpu"])
def test_latency_waits_for_what_is_not_the_cpu(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[torch.device] = []
    monkeypatch.setattr(torch.accelerator, "synchronize", waited.append)

    class Elsewhere:
        device = torch.device(kind)

    class Ready(nn.Module):
        def forward(self, x: Any) -> None: ...

    batch: Any = {"x": Elsewhere()}
    latency([Ready(), Ready()], batch, seconds=0)
    assert waited == [torch.device(kind)] * (0 if kind == "cpu" else 10)


@pytest.mark.parametrize("seconds", [float("nan"), float("inf"), -1.0])
def test_latency_refuses_a_time_that_never_ends(seconds: float) -> None:
    with pytest.raises(pp.SettingError, match=f"1 models for seconds={seconds}: it takes a model and a finite time"):
        latency([nn.Identity()], {"input": torch.zeros(1)}, seconds=seconds)
    with pytest.raises(pp.SettingError, match="0 models"):
        latency([], {"input": torch.zeros(1)})


def test_a_measured_family_makes_a_report(tmp_path: Path) -> None:
    model = tiny_bert()
    path = pp.search(model, tiny_batches(), steps=6, multiple=2, out=tmp_path / "path", progress=False)
    members = []
    for name, keep in (("dense", 1.0), ("half", 0.5)):
        selection = path.select(pp.Budget(keep=keep))
        small = pp.slice_model(model, selection)
        small.save_pretrained(tmp_path / name)
        entry = member(name, None if keep == 1 else name, selection, bytes_on_disk(tmp_path / name))
        entry["quality"]["before"]["cosine"] = fidelity(small, model, tiny_batches())
        entry["latency_ms"] = {"4": latency([small], tiny_batches()[0], seconds=0.01)[0]}
        members.append(entry)
        assert entry["params"] == sum(p.numel() for p in small.parameters())
    assert members[1]["bytes_on_disk"] < members[0]["bytes_on_disk"]
    family = family_record(
        "tiny",
        path.pairs,
        {"cosine": {"label": "cosine", "text": "to dense", "dense": 1.0}},
        members,
        latency_tokens=7,
        settings={"search": path.config},
        seconds={"search": 1.0},
    )
    assert {"processor", "cores", "platform"} <= set(family["machine"])
    assert {"torch", "transformers"} <= set(family["versions"])
    (tmp_path / "family.json").write_text(json.dumps(family))
    assert "tiny" in write_report(tmp_path).read_text()
