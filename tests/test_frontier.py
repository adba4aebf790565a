"""benchmarks/frontier.py: every method makes models of the asked size; baselines do what they say."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

import pathprune as pp
from helpers import VOCAB, tiny_batches

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import frontier
from baselines import METHODS, Problem
from baselines.peers import prunable_left
from baselines.problem import moments, probes
from baselines.scores import overlaps, rearranged, rescaled
from models import MODELS
from pathprune.objectives.choose import get_objective

SIZES: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


class Tiny:
    """What ``benchmarks/models.py`` gives of a real model."""

    label, loss_label, objective, keeps, steps = "tiny", "1 − cosine", "embedding", (0.75, 0.5), 6

    def __init__(self, model: Any, objective: str) -> None:
        self.dense = self.searched = model.eval().requires_grad_(False)
        self.objective = objective

    def batches(self, seed: int, steps: int) -> list[dict[str, torch.Tensor]]:
        padded = self.objective == "embedding"
        return [{k: v for k, v in b.items() if padded or k == "input_ids"} for b in tiny_batches(min(steps, 4), seed)]

    @torch.no_grad()
    def quality(self, model: nn.Module) -> dict[str, float]:
        batch = self.batches(9, 1)[0]
        apart = (model(**batch)[0] - self.dense(**batch)[0]).norm() / self.dense(**batch)[0].norm()
        return {"loss": float(apart)}


def bert() -> Tiny:
    torch.manual_seed(0)
    config = BertConfig(**SIZES, intermediate_size=192, initializer_range=0.2, max_position_embeddings=32)
    return Tiny(BertModel(config), "embedding")


def llama() -> Tiny:
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, num_key_value_heads=2, intermediate_size=192, initializer_range=0.2)
    return Tiny(LlamaForCausalLM(config), "logits")


def problem_of(subject: Tiny, seed: int = 0) -> Problem:
    subject.searched.config.use_cache = False
    batches = subject.batches(seed, subject.steps)
    objective = get_objective(subject.objective, subject.searched, batches[0])
    pairs = pp.find_pairs(subject.searched, batches[0])
    return Problem(subject.searched, subject.dense, pairs, batches, objective, subject.steps, seed, {})


@pytest.fixture(scope="module", params=[bert, llama])
def subject(request: pytest.FixtureRequest) -> Tiny:
    return request.param()


@pytest.mark.parametrize("name", METHODS)
def test_every_method_makes_models_of_the_asked_size(name: str, subject: Tiny) -> None:
    if name == "torch-pruning" and find_spec("torch_pruning") is None:
        pytest.skip("torch-pruning is not installed; see benchmarks/peers.txt")
    problem = problem_of(subject)
    before = {key: value.clone() for key, value in subject.dense.state_dict().items()}
    run = frontier.measure(METHODS[name], problem, subject)
    assert "error" not in run, run
    step = max(8 * pair.groups * pair.unit_params for pair in problem.pairs) / problem.pairs.prunable_params
    for row in run["rows"]:
        assert row["keep"] - 2 * step < row["kept"] <= row["keep"]
        assert 0 < row["loss"] < 3
    assert run["one_size_seconds"] <= run["family_seconds"]
    assert all(torch.equal(value, before[key]) for key, value in subject.dense.state_dict().items())


def test_the_size_is_that_of_a_selection(subject: Tiny) -> None:
    problem = problem_of(subject)
    assert prunable_left(subject.dense, problem) == problem.pairs.prunable_params
    selection = METHODS["random"](problem).select(pp.Budget(keep=0.5))
    assert prunable_left(pp.slice_model(subject.dense, selection), problem) == selection.pair_params


def consumed(problem: Problem, pair: pp.Pair) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and outputs of the pair's consumer at all real tokens, in float64."""
    seen: list[list[torch.Tensor]] = [[], []]

    def hook(_: nn.Module, args: Any, output: torch.Tensor) -> None:
        for part, tensor in zip(seen, (args[0], output), strict=True):
            part.append(tensor)

    handle = problem.dense.get_submodule(pair.consumer.module).register_forward_hook(hook)
    for batch in problem.batches:
        problem.dense(**batch)
        real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        for part in seen:
            part[-1] = part[-1][real].double()
    handle.remove()
    return torch.cat(seen[0]), torch.cat(seen[1])


def test_moments_are_those_of_the_real_tokens() -> None:
    problem = problem_of(bert())
    pair = next(pair for pair in problem.pairs if pair.kind == "mlp")
    mean, square = moments(problem)[pair.name, pair.consumer]
    x, _ = consumed(problem, pair)
    torch.testing.assert_close(mean.flatten(), x.mean(0))
    torch.testing.assert_close(square.flatten(), x.square().mean(0))


def test_probes_are_each_samples_own() -> None:
    """Another batch's samples, or a sample's neighbours, change nothing."""
    problem = problem_of(bert())
    rows = probes(problem, 2)
    assert rows.shape == (8, sum(problem.sizes))
    assert len(rows.unique(dim=0)) == 8
    torch.testing.assert_close(rows[:4], probes(problem, 1))


def test_rearranging_lowers_the_quadratic_and_keeps_the_shape() -> None:
    rng = np.random.default_rng(0)
    problem = problem_of(llama())
    for pair in problem.pairs:
        mixing = rng.normal(size=(pair.units, pair.units))
        gradients = np.einsum("sgu,uv->sgv", rng.normal(size=(64, *pair.shape)), mixing)
        order = np.square(gradients).mean(0).mean(0).argsort() if pair.rotary else None
        keep = np.ones(pair.shape, dtype=bool)
        for row in range(pair.groups):
            by_diagonal = np.square(gradients[:, row]).mean(0).argsort() if order is None else order
            keep[row, by_diagonal[: pair.units // 2]] = False
        better = rearranged(pair, keep, gradients)
        assert (better.sum(1) == keep.sum(1)).all()
        assert not pair.rotary or (better == better[0]).all()
        worth = [np.square((gradients * ~kept).sum(2)).sum() for kept in (keep, better)]
        assert worth[1] < worth[0]


@pytest.mark.parametrize("make", [bert, llama])
def test_rescaling_is_the_least_squares(make: Any) -> None:
    """Against a direct solution, on the consumers' own inputs."""
    problem = problem_of(make())
    found, taken = overlaps(problem), 0
    for pair in (pair for pair in problem.pairs if pair.kind != "qk"):
        x, y = consumed(problem, pair)
        index = torch.from_numpy(pair.consumer.index(pair.groups, pair.width))  # (G, R, D)
        weight = problem.dense.get_parameter(f"{pair.consumer.module}.weight").double()[:, index]
        shares = torch.einsum("tgrd,ogrd->togd", x[:, index], weight) / y.norm(dim=1)[:, None, None, None]
        design = shares.flatten(2).flatten(0, 1)  # (tokens x outputs, G U)
        keep = np.random.default_rng(0).random(pair.shape) < 0.6
        left = torch.from_numpy(keep.ravel())
        direct = torch.linalg.lstsq(design[:, left], design.sum(1, keepdim=True)).solution.flatten()
        ours = torch.from_numpy(rescaled(keep, found[pair.name], ridge=0))
        expected = torch.ones_like(direct) if direct.abs().max() > 10 else direct
        torch.testing.assert_close(ours.flatten()[left], expected, rtol=1e-4, atol=1e-4)
        taken += int(expected is direct)
        assert (ours.flatten()[~left] == 1).all()
    assert taken >= 2


def test_record_and_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODELS, "minilm", lambda split, device: bert())
    monkeypatch.setitem(METHODS, "flap", lambda problem: 1 / 0)
    out, plot = tmp_path / "frontier.json", tmp_path / "frontier.svg"
    arguments = ["--model", "minilm", "--out", str(out), "--plot", str(plot), "--seeds", "2", "--methods"]
    monkeypatch.setattr(sys, "argv", ["frontier.py", *arguments, "random", "taylor", "flap"])
    frontier.main()
    record = json.loads(out.read_text())
    assert record["methods"]["flap"] == {"error": "ZeroDivisionError: division by zero"}
    for name in ("random", "taylor"):
        found = record["methods"][name]
        losses = [run["rows"][0]["loss"] for run in record["runs"][name]]
        assert found["rows"][0]["loss"]["mean"] == pytest.approx(sum(losses) / 2)
        assert found["rows"][0]["loss"]["std"] == pytest.approx(abs(losses[0] - losses[1]) / 2**0.5)
        assert found["seeds"] == 2
    assert {"machine", "versions", "steps", "split"} <= record.keys()

    monkeypatch.setitem(METHODS, "random", lambda problem: 1 / 0)  # it is not run again
    monkeypatch.setattr(sys, "argv", ["frontier.py", *arguments, "random", "magnitude"])
    frontier.main()
    again = json.loads(out.read_text())
    assert again["methods"]["random"] == record["methods"]["random"]
    assert again["methods"]["magnitude"]["seeds"] == 2
    assert len(again["commands"]) == 2
    monkeypatch.setattr(sys, "argv", ["frontier.py", *arguments, "random", "--steps", "5"])
    with pytest.raises(SystemExit, match="steps=6, now 5"):
        frontier.main()
    svg = plot.read_text()
    assert svg.startswith("<svg")
    assert "random" in svg
    assert "flap" not in svg
