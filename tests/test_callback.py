"""A search beside a training run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import pathprune as pp
from helpers import VOCAB, tiny_batches, tiny_bert
from pathprune.objectives.embedding import EmbeddingObjective
from pathprune.objectives.targets import Targets

CONFIG = pp.SearchConfig(steps=24, multiple=2)


def train(model: nn.Module, callback: pp.SearchCallback | None, steps: int = 12) -> list[float]:
    """As a Trainer does, but for all that has nothing to do with callbacks; with dropout."""
    torch.manual_seed(0)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses, state = [], SimpleNamespace(global_step=0)
    if callback:
        callback.on_train_begin(None, state, None, model=model)
    for batch in tiny_batches(steps, seed=7):
        loss = (model(**batch)[0][:, 0] - 1).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
        state.global_step += 1
        if callback:
            callback.on_step_end(None, state, None, model=model)
    if callback:
        callback.on_train_end(None, state, None, model=model)
    return losses


def distance(model: nn.Module, path: pp.SolutionPath, keep: float) -> float:
    """Mean distance of a size's embeddings from the dense model's."""
    objective, total = EmbeddingObjective(), 0.0
    for batch in tiny_batches():
        with torch.no_grad():
            target = objective.target(model(**batch), batch)
            with pp.masked(model, path.select(pp.Budget(keep=keep))):
                total += float(objective.loss(model(**batch), batch, target))
    return total


def test_training_is_what_it_would_be_and_the_path_is_of_the_trained_model(tmp_path: Path) -> None:
    alone, model = tiny_bert(), tiny_bert()
    callback = pp.SearchCallback(tiny_batches(), CONFIG, every=3, out=tmp_path)
    assert train(model, callback) == train(alone, None)
    trained = dict(alone.named_parameters())
    assert all(torch.equal(parameter, trained[name]) for name, parameter in model.named_parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.training
    model.eval()
    path = pp.SolutionPath.load(tmp_path)
    assert len(path.trajectory.loss) == CONFIG.path_steps
    batch, selection = tiny_batches()[0], path.select(pp.Budget(keep=0.6))
    with pp.masked(model, selection), torch.no_grad():  # which refuses a path of other weights
        expected = model(**batch)[0]
    torch.testing.assert_close(pp.slice_model(model, selection)(**batch)[0], expected, rtol=1e-4, atol=1e-4)
    rng = np.random.default_rng(0)
    by_chance = pp.SolutionPath.from_scores(path.pairs, {pair.name: rng.random(pair.shape) for pair in path.pairs})
    by_chance = pp.compensate(model, replace(by_chance, multiple=2), tiny_batches(), progress=False)
    assert distance(model, path, 0.6) < 0.6 * distance(model, by_chance, 0.6)


def test_a_step_of_the_search_comes_every_so_many_steps_and_sees_the_model_of_then() -> None:
    model, state = tiny_bert(), SimpleNamespace(global_step=0)
    callback = pp.SearchCallback(tiny_batches(1), CONFIG, every=5)
    callback.on_train_begin(None, state, None, model=model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    for state.global_step in range(1, 12):
        callback.on_step_end(None, state, None, model=model)
    assert callback.search.steps_done == 2
    (target,) = callback.search.problem.targets.known.values()
    assert torch.equal(target, Targets(model, EmbeddingObjective())(tiny_batches(1)[0]))


def test_every_must_be_positive() -> None:
    with pytest.raises(pp.SettingError, match="every=0 must be positive"):
        pp.SearchCallback(tiny_batches(), every=0)


def test_a_trainer_takes_it(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    model = BertForSequenceClassification(BertConfig(vocab_size=VOCAB, **sizes, max_position_embeddings=32))
    rows = [
        {**{name: part[0] for name, part in batch.items()}, "labels": i % 2} for i, batch in enumerate(tiny_batches(16))
    ]
    callback = pp.SearchCallback(tiny_batches(), CONFIG, every=2, out=tmp_path / "run")
    settings: dict[str, Any] = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "save_strategy": "no"}
    arguments = TrainingArguments(str(tmp_path / "trainer"), max_steps=8, per_device_train_batch_size=4, **settings)
    Trainer(model, arguments, train_dataset=rows, callbacks=[callback]).train()
    path = pp.SolutionPath.load(tmp_path / "run")
    assert path.config["objective"] == "logits"
    small = pp.slice_model(model, path.select(pp.Budget(keep=0.5)))
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
