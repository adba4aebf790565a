"""Compensation: against least squares on the tokens themselves, whatever the layout, and bad input."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import pathprune as pp
from helpers import VOCAB, tiny_batches, tiny_bert
from pathprune.evaluation import fidelity
from pathprune.family.budget import Budget
from pathprune.family.pair_list import PairList
from pathprune.model.identity import identify
from pathprune.ranking import covariance as covariances
from pathprune.transform import reconstruction as compensation
from pathprune.transform.folding import axis_first
from pathprune.transform.masks import attach_masks
from pathprune.transform.reconstruction import by_place, untold
from pathprune.types import Floats
from strategies import moments


def gpt2() -> nn.Module:
    """Transposed maps, and query, key and value in one."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {"n_embd": 24, "n_layer": 2, "n_head": 3, "n_positions": 16}
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, initializer_range=0.3, **shape)).eval()


def llama() -> nn.Module:
    """Grouped queries, and no biases."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": 24, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, initializer_range=0.3, intermediate_size=20, **shape)).eval()


MODELS = {"bert": tiny_bert, "gpt2": gpt2, "llama": llama}


def random_path(model: nn.Module, *, fill: bool, basis: bool) -> pp.SolutionPath:
    """A random ranking, compensated; where ``fill`` is false, by the means."""
    pairs = pp.find_pairs(model)
    rng = np.random.default_rng(0)
    fills: dict[str, Floats] = {
        pair.name: rng.normal(size=(pair.groups, pair.width)) for pair in pairs if pair.fillable
    }
    bases: dict[str, Floats] = {
        pair.name: np.linalg.qr(rng.normal(size=(pair.groups, pair.width, pair.width)))[0] * rng.uniform(0.5, 2)
        for pair in pairs
        if pair.rotatable
    }
    path = pp.SolutionPath(
        pairs,
        {pair.name: rng.random(pair.shape) for pair in pairs},
        fill=fills if fill else {},
        basis=bases if basis else {},
    )
    return pp.compensate(model, path, tiny_batches(count=12), progress=False)


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
    monkeypatch.setattr(covariances, "RIDGE", 1e-6)
    model = MODELS[kind]().double()
    path = random_path(model, fill=fill, basis=basis)
    selection = path.select(Budget(keep=0.5))
    small = pp.slice_model(model, selection)
    means = {
        pair.name: path.centre[pair.name].reshape(pair.groups, -1, pair.width).mean(1)
        for pair in path.pairs
        if pair.name in path.centre
    }
    plain, at_mean = (
        pp.slice_model(model, replace(selection, centre={}, covariance={}, fill=fills)) for fills in (path.fill, means)
    )
    for pair in selection.pairs:
        if pair.kind == "qk":
            continue
        x, y = tokens(model, pair.consumer.module, tiny_batches(count=12))
        rotation = torch.from_numpy(path.basis.get(pair.name, np.eye(pair.width)[None].repeat(pair.groups, 0))).double()
        heads = x.unflatten(-1, (pair.groups, pair.consumer.repeat, pair.width))
        x = torch.einsum("...grd,ged->...gre", heads, rotation).flatten(-3)
        x = x[:, pair.positions(pair.consumer, selection.keep[pair.name])]
        fitted: Any = small.get_submodule(pair.consumer.module)
        dense: Any = model.get_submodule(pair.consumer.module)
        moved: Any = [small.get_submodule(pair.consumer.module).bias for small in (plain, at_mean)]
        ours = axis_first(fitted.weight.detach(), dense, "in")
        weight = 1 / y.norm(dim=1, keepdim=True)
        # Centred: the mean output is the dense map's, but for what the fills are apart from the mean.
        average = weight.square() / weight.square().sum()
        middle = (average * x).sum(0)
        expected = (average * y).sum(0) + (moved[0] - moved[1]).detach()
        torch.testing.assert_close(middle @ ours + fitted.bias.detach(), expected, rtol=0, atol=1e-5)
        x, y = x - middle, y - (average * y).sum(0)
        best = torch.linalg.lstsq(x * weight, y * weight).solution
        errors = [float(((x @ rows - y) * weight).square().sum()) for rows in (ours, best, torch.zeros_like(best))]
        assert errors[0] <= errors[1] + 1e-5 * errors[2]


def test_what_others_tell_exactly_may_leave_without_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where each neuron has a double, one of the two is enough, whatever both write."""
    monkeypatch.setattr(covariances, "RIDGE", 1e-7)
    model: Any = tiny_bert()
    pairs = pp.find_pairs(model)
    ups = [pair for pair in pairs if pair.kind == "mlp"]
    for pair in ups:
        half = pair.width // 2
        up = model.get_submodule(pair.slots[0].module)
        with torch.no_grad():
            up.weight[half : 2 * half] = up.weight[:half]
            up.bias[half : 2 * half] = up.bias[:half]
    pairs = pp.find_pairs(model)
    scores = {pair.name: np.ones(pair.shape) for pair in pairs}
    path = pp.compensate(model, pp.SolutionPath.from_scores(pairs, scores), tiny_batches(count=30), progress=False)
    keep = {pair.name: np.ones(pair.shape, dtype=bool) for pair in pairs}
    for pair in ups:
        keep[pair.name][0, pair.width // 2 :] = False
    told = replace(path.select(Budget(keep=1.0)), keep=keep)
    unseen = tiny_batches(seed=1)
    assert 1 - fidelity(pp.slice_model(model, told), model, unseen) < 1e-4
    assert 1 - fidelity(pp.slice_model(model, replace(told, centre={}, covariance={})), model, unseen) > 1e-2


@given(count=st.integers(0, 40), seed=st.integers(0, 1000))
def test_a_fit_is_the_same_from_either_side(count: int, seed: int) -> None:
    """By the covariance of what stays, or by the precision of what leaves; in the search's float32, too."""
    noise = torch.Generator().manual_seed(seed)
    rows = torch.randn(60, 40, generator=noise, dtype=torch.float64) * torch.logspace(-2, 2, 40, dtype=torch.float64)
    covariance = rows.mT @ rows / len(rows)
    covariance.diagonal().add_(covariances.RIDGE * covariance.diagonal().mean())
    keep = torch.randperm(40, generator=noise) < count
    deviation = covariance.diagonal().sqrt()
    expected = torch.linalg.solve(covariance[keep][:, keep], covariance[keep][:, ~keep])
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-3)):
        left, gone, fitted = compensation.Compensator(torch.zeros(40).to(dtype), covariance.to(dtype)).fit(keep)
        assert torch.equal(left, keep.nonzero()[:, 0])
        assert torch.equal(gone, (~keep).nonzero()[:, 0])
        share = (fitted.double() - expected) * deviation[left].unsqueeze(1) / deviation[gone]
        assert float(share.abs().amax() if share.numel() else 0) < tolerance


@pytest.mark.parametrize("fill", [False, True])
@pytest.mark.parametrize("kind", list(MODELS))
def test_masks_and_slices_agree(kind: str, fill: bool) -> None:
    model = MODELS[kind]().double()
    selection = random_path(model, fill=fill, basis=True).select(Budget(keep=0.5))
    small, batch = pp.slice_model(model, selection), tiny_batches(seed=1)[0]
    with torch.no_grad():
        expected = small(**batch)[0]
        with pp.masked(model, selection):
            torch.testing.assert_close(model(**batch)[0], expected, rtol=0, atol=1e-10)


@given(far=st.floats(0, 1e4), seed=st.integers(0, 100))
@settings(max_examples=10, deadline=None)
def test_a_large_mean_does_not_drown_what_varies(far: float, seed: int) -> None:
    model: Any = tiny_bert()
    pair = next(pair for pair in pp.find_pairs(model) if pair.kind == "mlp")
    noise = torch.Generator().manual_seed(seed)
    hook = covariances.InputMoments(pair, None)
    near = covariances.InputMoments(pair, None)
    for _ in range(3):
        x, y = torch.randn(200, pair.width, generator=noise) + far, torch.randn(200, 4, generator=noise)
        hook(model, (x,), y)
        near(model, (x - far,), y)  # exact, where x is far: both are multiples of x's last bit
    mean, spread = hook.central()
    torch.testing.assert_close(spread, near.central()[1], rtol=0, atol=1e-4)
    torch.testing.assert_close(mean - far, near.central()[0], rtol=0, atol=1e-4 + 1e-6 * far)


@pytest.mark.parametrize("bias", [0.0, 3.0])
def test_values_that_never_vary_are_no_error(bias: float) -> None:
    model: Any = tiny_bert()
    pair = [pair for pair in pp.find_pairs(model) if pair.kind == "vo"][1]
    with torch.no_grad():
        value = model.get_submodule(pair.mask_slot.module)
        value.weight.zero_()
        value.bias.fill_(bias)
    path = pp.search(model, tiny_batches(), steps=6, progress=False)
    assert pair.name in path.covariance
    pp.slice_model(model, path.select(Budget(keep=0.5)))


def test_a_token_of_nothing_has_no_part_in_a_fit() -> None:
    """Padding without a mask, whose embedding is zero: relative to it, every error would be infinite."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, initializer_range=0.3, pad_token_id=0)).eval()
    clean = [{"input_ids": batch["input_ids"]} for batch in tiny_batches()]
    first = clean[0]["input_ids"].clone()
    first[1, 0] = 0
    pairs = pp.find_pairs(model)
    path = pp.SolutionPath.from_scores(pairs, {pair.name: torch.ones(pair.shape) for pair in pairs})
    fits = [pp.compensate(model, path, [{"input_ids": ids}, *clean[1:]]) for ids in (clean[0]["input_ids"], first)]
    for name, array in fits[0].covariance.items():
        assert np.abs(fits[1].covariance[name] - array).max() < 0.2 * np.abs(array).max()
    pp.search(model, [{"input_ids": first}, *clean[1:]], steps=6, multiple=2, progress=False)


def test_the_path_of_a_sorted_model_is_refused() -> None:
    model = tiny_bert()
    ordered, path = pp.sort_units(model, random_path(model, fill=True, basis=True))
    with pytest.raises(pp.MismatchError, match="compensate the path of the search, then"):
        pp.compensate(ordered, path, tiny_batches(), progress=False)


@pytest.mark.parametrize("kind", list(MODELS))
def test_a_mask_s_gradient_is_of_what_the_others_do_not_tell(kind: str) -> None:
    """A unit that is gone, and a double of one that stays: nothing depends on its mask."""
    model = MODELS[kind]().double()
    path = random_path(model, fill=True, basis=False)
    pair = next(pair for pair in path.pairs if pair.kind == "mlp")
    keep = path.select(Budget(keep=0.5)).keep[pair.name]
    moments = path.centre[pair.name], path.covariance[pair.name]
    told = compensation.Compensator(*(torch.from_numpy(array).double() for array in moments))
    mask = torch.from_numpy(keep).double().requires_grad_()
    fill = {pair.name: torch.from_numpy(path.fill[pair.name])}
    read: list[torch.Tensor] = []
    consumer = model.get_submodule(pair.consumer.module)
    before = consumer.register_forward_pre_hook(lambda module, args: read.append(args[0]))
    with attach_masks(model, path.pairs, {pair.name: mask}, fill, told={pair.name: told}):
        after = consumer.register_forward_pre_hook(lambda module, args: read.append(args[0]))
        model(**tiny_batches()[0])
    before.remove()
    after.remove()
    dense, shipped = read
    left, gone, _ = told.fit(torch.from_numpy(keep[0]))
    error = dense - shipped
    assert float(error[..., left].detach().abs().max()) < 1e-12
    (slope,) = torch.autograd.grad(shipped.sum(), mask)
    torch.testing.assert_close(slope[0, gone], error[..., gone].sum((0, 1)))


@pytest.mark.parametrize("kind", list(MODELS))
def test_compensated_models_are_nearer_on_unseen_data(kind: str, tmp_path: Any) -> None:
    model = MODELS[kind]()
    path = pp.search(model, tiny_batches(count=60), steps=30, multiple=1, progress=False, out=tmp_path / "path")
    plain = pp.search(model, tiny_batches(count=60), steps=30, multiple=1, progress=False, compensate=False)
    assert not plain.covariance
    losses, sizes = [], []
    for one in (pp.SolutionPath.load(tmp_path / "path"), path, plain):
        small = pp.slice_model(model, one.select(Budget(keep=0.5)))
        losses.append(1 - fidelity(small, model, tiny_batches(seed=1)))
        sizes.append(sum(p.numel() for p in small.parameters()))
    assert losses[0] == losses[1] < 0.9 * losses[2]
    assert sorted(file.name.partition("-")[0] for file in (tmp_path / "path").iterdir()) == ["path", "path.json"]


@pytest.mark.parametrize("make", [gpt2, llama])
def test_a_unit_is_worth_what_units_of_more_value_do_not_tell(make: Any) -> None:
    """The squared diagonal of one factor is the residual variance of as many regressions."""
    rng = np.random.default_rng(0)
    for pair in pp.find_pairs(make()):
        if not pair.fillable:
            continue
        covariance = torch.from_numpy(moments(pair, rng)[1]).double()
        value = torch.from_numpy(rng.random(pair.shape))
        share = untold(pair, value, covariance)
        inner = by_place(pair.by_dim(torch.arange(value.numel()).reshape(pair.shape)), len(covariance))
        rank = value.flatten()[inner]
        for unit in range(value.numel()):
            mine, above = (inner == unit).nonzero()[:, 0], (rank > value.flatten()[unit]).nonzero()[:, 0]
            left, total = 0.0, 0.0
            for place in mine.tolist():
                right = covariance[above, place]
                told = right @ torch.linalg.solve(covariance[above][:, above], right) if len(above) else 0.0
                left, total = left + float(covariance[place, place] - told), total + float(covariance[place, place])
                above = torch.cat([above, torch.tensor([place])])  # heads of a group share their units
            assert float(share.flatten()[unit]) == pytest.approx(left / total, rel=1e-6)


def test_what_loses_nothing_is_as_it_was() -> None:
    model = tiny_bert()
    path = random_path(model, fill=True, basis=True)
    same = pp.slice_model(model, path.select(Budget(keep=1.0)))
    assert all(torch.equal(a, b) for a, b in zip(same.parameters(), model.parameters(), strict=True))


def test_bad_input_is_refused() -> None:
    model, other = tiny_bert(), tiny_bert(seed=1)
    path = random_path(model, fill=True, basis=True)
    with pytest.raises(pp.SettingError, match="count=0"):
        pp.compensate(model, path, tiny_batches(), count=0)
    with pytest.raises(pp.DataError, match="data is empty"):
        pp.compensate(model, path, [])
    with pytest.raises(pp.MismatchError, match="another model"):
        pp.compensate(other, path, tiny_batches())
    with pytest.raises(pp.MismatchError, match="centre and covariance must name the same pairs"):
        replace(path, fill={})
    with pytest.raises(pp.MismatchError, match=r"covariance of .* has shape"):
        replace(path, covariance={name: array[1:] for name, array in path.covariance.items()})
    none = replace(path, covariance={name: -array for name, array in path.covariance.items()})
    with pytest.raises(pp.MismatchError, match="not positive definite"):
        pp.slice_model(model, none.select(Budget(keep=0.5)))
    model.embeddings.word_embeddings.weight.data[5] = float("nan")
    with pytest.raises(pp.DataError, match="not finite"):
        pp.compensate(
            model, replace(path, pairs=PairList(path.pairs, identify(model, 0, 0))), tiny_batches(), progress=False
        )
