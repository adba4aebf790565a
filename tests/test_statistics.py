"""Refitted weights: against least squares on the tokens themselves, whatever the layout, and bad input."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import pathprune as pp
from helpers import VOCAB, tiny_batches, tiny_bert
from pathprune import statistics
from pathprune.budget import Budget, Selection
from pathprune.discovery import identify
from pathprune.evaluation import fidelity
from pathprune.pairs import PairList
from pathprune.slicing import axis_first


def gpt2() -> nn.Module:
    """Transposed maps, and query, key and value in one."""
    torch.manual_seed(0)
    shape = {"n_embd": 24, "n_layer": 2, "n_head": 3, "n_positions": 16}
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, initializer_range=0.3, **shape)).eval()


def llama() -> nn.Module:
    """Grouped queries, and no biases."""
    torch.manual_seed(0)
    shape = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, initializer_range=0.3, intermediate_size=20, **shape)).eval()


MODELS = {"bert": tiny_bert, "gpt2": gpt2, "llama": llama}


def random_selection(model: nn.Module, *, fill: bool, basis: bool) -> Selection:
    """Half of the units."""
    pairs = pp.find_pairs(model)
    rng = np.random.default_rng(0)
    path = pp.SolutionPath.from_scores(pairs, {pair.name: rng.random(pair.shape) for pair in pairs})
    chosen = path.select(Budget(keep=0.5))
    fills = {pair.name: rng.normal(size=(pair.groups, pair.width)) for pair in pairs if pair.fillable}
    bases = {pair.name: rng.normal(size=(pair.groups, pair.width, pair.width)) for pair in pairs if pair.rotatable}
    scale = {pair.name: rng.uniform(0.5, 1.5, pair.shape) for pair in pairs if pair.scalable}
    return Selection(pairs, chosen.keep, fill=fills if fill else {}, basis=bases if basis else {}, scale=scale)


def tokens(model: nn.Module, name: str, data: list[dict[str, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """What a map reads and gives at every token that is not padding."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    module: Any = model.get_submodule(name)
    for batch in data:
        real = batch["attention_mask"].bool()
        handle = module.register_forward_hook(lambda m, args, out, real=real: seen.append((args[0][real], out[real])))
        with torch.no_grad():
            model(**batch)
        handle.remove()
    inputs, outputs = zip(*seen, strict=True)
    return torch.cat(inputs), torch.cat(outputs)


@pytest.mark.parametrize("basis", [False, True])
@pytest.mark.parametrize("fill", [False, True])
@pytest.mark.parametrize("kind", list(MODELS))
def test_no_weights_that_stay_come_nearer(kind: str, fill: bool, basis: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "RIDGE", 1e-10)
    model = MODELS[kind]().double()
    data = tiny_batches(count=12)
    selection = random_selection(model, fill=fill, basis=basis)
    small = pp.slice_model(model, selection, pp.gather_statistics(model, selection.pairs, data, progress=False))
    plain: Any = pp.slice_model(model, selection)
    for pair in selection.pairs:
        if pair.kind == "qk":
            continue
        x, y = tokens(model, pair.consumer.module, data)
        rotation = torch.from_numpy(selection.basis.get(pair.name, np.eye(pair.width)[None].repeat(pair.groups, 0)))
        heads = x.unflatten(-1, (pair.groups, pair.consumer.repeat, pair.width))
        x = torch.einsum("...grd,ged->...gre", heads, rotation).flatten(-3)
        x = x[:, pair.positions(pair.consumer, selection.keep[pair.name])]
        fitted: Any = small.get_submodule(pair.consumer.module)
        dense: Any = model.get_submodule(pair.consumer.module)
        ours = axis_first(fitted.weight.detach(), dense, "in")
        offset = 0 if dense.bias is None else dense.bias.detach()
        weight = 1 / y.norm(dim=1, keepdim=True)
        y = y - offset
        if fitted.bias is not None:  # centred; and the mean output is what it was without a refit
            average = weight.square() / weight.square().sum()
            middle = (average * x).sum(0)
            there = plain.get_submodule(pair.consumer.module)
            expected = middle @ axis_first(there.weight.detach(), dense, "in") + there.bias.detach()
            torch.testing.assert_close(middle @ ours + fitted.bias.detach(), expected, rtol=0, atol=1e-9)
            x, y = x - middle, y - (average * y).sum(0)
        best = torch.linalg.lstsq(x * weight, y * weight).solution
        torch.testing.assert_close(ours, best, rtol=0, atol=1e-5 * float(best.abs().max()))


@pytest.mark.parametrize("kind", list(MODELS))
def test_refitted_models_are_nearer_on_unseen_data(kind: str, tmp_path: Any) -> None:
    model = MODELS[kind]()
    data = tiny_batches(count=60)
    path = pp.search(model, data[:12], steps=10, multiple=1, progress=False)
    selection = path.select(Budget(keep=0.5))
    before = copy.deepcopy(model.state_dict())
    fitted = pp.slice_model(model, selection, pp.gather_statistics(model, path.pairs, data, progress=False))
    plain = pp.slice_model(model, selection)
    unseen = tiny_batches(seed=1)
    assert 1 - fidelity(fitted, model, unseen) < 0.9 * (1 - fidelity(plain, model, unseen))
    assert {n: p.shape for n, p in fitted.named_parameters()} == {n: p.shape for n, p in plain.named_parameters()}
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    fitted.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)  # type: ignore[attr-defined]
    batch = unseen[0]
    with torch.no_grad():
        assert torch.equal(again(**batch)[0], fitted(**batch)[0])


def test_what_loses_nothing_is_not_refitted() -> None:
    model = tiny_bert()
    pairs = pp.find_pairs(model)
    found = pp.gather_statistics(model, pairs, tiny_batches(), progress=False)
    whole = Selection(pairs, {pair.name: np.ones(pair.shape, dtype=bool) for pair in pairs})
    same = pp.slice_model(model, whole, found)
    assert all(torch.equal(a, b) for a, b in zip(same.parameters(), model.parameters(), strict=True))


def test_bad_input_is_refused() -> None:
    model, other = tiny_bert(), tiny_bert(seed=1)
    pairs = pp.find_pairs(model)
    selection = random_selection(model, fill=True, basis=True)
    with pytest.raises(pp.DataError, match="count=0"):
        pp.gather_statistics(model, pairs, tiny_batches(), count=0)
    with pytest.raises(pp.DataError, match="data is empty"):
        pp.gather_statistics(model, pairs, [])
    with pytest.raises(pp.MismatchError, match="another model"):
        pp.gather_statistics(other, pairs, tiny_batches())
    with pytest.raises(pp.MismatchError, match="statistics were gathered from another model"):
        pp.slice_model(model, selection, pp.gather_statistics(other, pp.find_pairs(other), tiny_batches()))
    model.embeddings.word_embeddings.weight.data[5] = float("nan")
    with pytest.raises(pp.DataError, match="not finite"):
        pp.gather_statistics(model, PairList(pairs, identify(model, 0, 0)), tiny_batches())
