"""Balanced bases leave the function as it is, and order its directions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import T5Config, T5Model

from conftest import Subject, snapshot, tiny_inputs
from pathprune.data.batches import Batches
from pathprune.discovery.discover import find_pairs
from pathprune.family.pairs import Pair, Slot
from pathprune.ranking.basis import Calibration, Moments, balance, calibrate, sensitivity
from pathprune.ranking.covariance import gather
from pathprune.transform.masks import attach_masks

BATCHES = [tiny_inputs(seed, batch=8, length=12) for seed in range(6)]


def felt(model: Any, pairs: list[Pair], batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Gramians by a random probe of every real token."""
    gramians: dict[str, Tensor] = {}
    noise = torch.Generator().manual_seed(0)
    with sensitivity(model, [pair for pair in pairs if pair.rotatable], gramians):
        for batch in batches:
            hidden = model(**batch)[0]
            real = batch.get("decoder_attention_mask", batch["attention_mask"]).bool()
            xi = torch.randn(hidden.shape, generator=noise).to(hidden)
            torch.autograd.grad((hidden * xi)[real].sum(), list(model.parameters()), allow_unused=True)
    return gramians


@pytest.fixture(scope="module")
def gramians(subjects: dict[str, Subject]) -> dict[str, dict[str, Tensor]]:
    return {family: felt(s.model, s.pairs, BATCHES) for family, s in subjects.items()}


@pytest.fixture(scope="module")
def calibrations(subjects: dict[str, Subject], gramians: dict[str, dict[str, Tensor]]) -> dict[str, Calibration]:
    return {f: calibrate(s.model, s.pairs, BATCHES, gramians[f], fill=True, spreads=True) for f, s in subjects.items()}


@pytest.fixture
def calibration(subject: Subject, calibrations: dict[str, Calibration]) -> Calibration:
    return calibrations[subject.family]


def activations(subject: Subject, slot: Slot, heads: int) -> Tensor:
    """Inner activations of one map over all real tokens, (tokens, heads, D)."""
    module, seen = subject.model.get_submodule(slot.module), []

    def on_output(module: nn.Module, args: Any, output: Tensor) -> None:
        seen.append(output)

    def on_input(module: nn.Module, args: Any) -> None:
        seen.append(args[0])

    out = slot.side == "out"
    handle = module.register_forward_hook(on_output) if out else module.register_forward_pre_hook(on_input)
    with torch.no_grad():
        for batch in BATCHES:
            subject.model(**batch)
    handle.remove()
    real = [y[batch["attention_mask"].bool()] for y, batch in zip(seen, BATCHES, strict=True)]
    return torch.cat(real).unflatten(-1, (heads, -1))


def inner(subject: Subject, pair: Pair) -> Tensor:
    """What the consumer reads, (tokens, G, R, D): keys, heads' outputs or neurons."""
    slot = pair.consumer
    return activations(subject, slot, pair.groups * slot.repeat).unflatten(1, (pair.groups, -1))


def test_full_masks_in_the_balanced_basis_are_the_dense_model(subject: Subject, calibration: Calibration) -> None:
    masks = {pair.name: torch.ones(pair.shape) for pair in subject.pairs}
    fill = {name: torch.from_numpy(mean) for name, mean in calibration.mean.items()}
    with attach_masks(subject.model, subject.pairs, masks, fill, calibration.basis):
        got = subject.output()
    torch.testing.assert_close(got, subject.output(), rtol=1e-8, atol=1e-8)


def test_every_pair_that_may_be_rotated_or_filled_is(subject: Subject, calibration: Calibration) -> None:
    assert set(calibration.basis) == {pair.name for pair in subject.pairs if pair.rotatable}
    assert set(calibration.mean) == set(calibration.std) == {pair.name for pair in subject.pairs if pair.fillable}
    for pair in subject.pairs:
        if pair.rotatable:
            assert calibration.basis[pair.name].shape == (pair.groups, pair.width, pair.width)
        if pair.fillable:
            assert calibration.mean[pair.name].shape == calibration.std[pair.name].shape == (pair.groups, pair.width)


def test_the_gramian_is_the_second_moment_of_the_gradient(subject: Subject) -> None:
    pair = next((pair for pair in subject.pairs if pair.kind == "vo" and pair.rotatable), None)
    if pair is None:
        pytest.skip("no pair may be rotated")
    seen: list[Tensor] = []
    module = subject.model.get_submodule(pair.consumer.module)
    handle = module.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    gramians: dict[str, Tensor] = {}
    total = torch.zeros(pair.groups, pair.width, pair.width).double()
    with sensitivity(subject.model, [pair], gramians):
        for batch in BATCHES[:2]:
            value = subject.model(**batch)[0].square().sum()
            grad = torch.autograd.grad(value, seen[-1])[0]
            heads = grad.unflatten(-1, (pair.groups, -1, pair.width))  # (B, T, G, R, D)
            total += torch.einsum("btgrd,btgre->gde", heads, heads)
    handle.remove()
    assert set(gramians) == {pair.name}
    torch.testing.assert_close(gramians[pair.name], total)


def test_what_flows_and_what_is_felt_have_the_same_diagonal_sorted_moment(
    subject: Subject, calibration: Calibration, gramians: dict[str, dict[str, Tensor]]
) -> None:
    for pair in subject.pairs:
        if pair.name not in calibration.basis:
            continue
        rotation = torch.from_numpy(calibration.basis[pair.name]).double()
        partner = torch.linalg.inv(rotation)
        tokens = inner(subject, pair)
        tokens = tokens - tokens.mean(0)
        ours = torch.einsum("tgrd,tgre->gde", tokens, tokens)
        theirs = gramians[subject.family][pair.name]
        ours, theirs = (moment / moment.diagonal(dim1=-2, dim2=-1).mean() for moment in (ours, theirs))
        ours, theirs = rotation @ ours @ rotation.mT, partner.mT @ theirs @ partner
        diagonal = ours.diagonal(dim1=-2, dim2=-1)
        scale = diagonal.max()
        for moment in (ours, theirs):
            assert (moment - torch.diag_embed(diagonal)).abs().max() < 1e-4 * scale, pair.name
        assert (diagonal.diff(dim=-1) <= 1e-6 * scale).all(), f"{pair.name}: directions in descending order"
        assert (diagonal > 0).all()


def test_the_basis_does_not_know_how_large_gradients_are(
    subject: Subject, calibration: Calibration, gramians: dict[str, dict[str, Tensor]]
) -> None:
    """Else weights in sixteen bits would go under, or over."""
    small = {name: 1e-20 * gramian for name, gramian in gramians[subject.family].items()}
    again = calibrate(subject.model, subject.pairs, BATCHES, small, fill=True, spreads=True)
    for name, array in calibration.basis.items():
        np.testing.assert_allclose(again.basis[name], array, rtol=1e-3, atol=1e-5, err_msg=name)


def test_mean_and_spread_are_those_of_the_activation_in_the_basis(subject: Subject, calibration: Calibration) -> None:
    for pair in subject.pairs:
        if pair.name not in calibration.mean:
            continue
        tokens = inner(subject, pair)
        if pair.name in calibration.basis:
            tokens = torch.einsum("ged,tgrd->tgre", torch.from_numpy(calibration.basis[pair.name]).double(), tokens)
        weight = torch.ones(len(tokens), 1, 1, 1).double()
        if pair.kind == "mlp":  # tokens count by their inverse length
            weight = 1 / tokens.flatten(1).norm(dim=1)[:, None, None, None]
        weight = weight / weight.sum()
        mean = (weight * tokens).sum(0)  # (G, R, D)
        std = (weight * (tokens - mean).square()).sum(0).mean(1).sqrt()
        np.testing.assert_allclose(calibration.mean[pair.name], mean.mean(1), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(calibration.std[pair.name], std, rtol=1e-3, atol=1e-5)


def test_a_massive_token_does_not_own_the_mean() -> None:
    tokens = torch.randn(100, 6, generator=torch.Generator().manual_seed(0)).double() + 1
    plain, with_outlier = Moments(), Moments()
    plain.add(tokens, 2, outer=False, relative=True)
    with_outlier.add(torch.cat([tokens, torch.full((1, 6), 1e4).double()]), 2, outer=False, relative=True)
    assert (with_outlier.central()[0] - plain.central()[0]).abs().max() < 0.1


def test_padding_does_not_count(subject: Subject, calibration: Calibration) -> None:
    """Other words under the padding are not read."""
    garbled = [
        {**batch, "input_ids": torch.where(batch["attention_mask"].bool(), batch["input_ids"], 1)} for batch in BATCHES
    ]
    assert any(
        not torch.equal(batch["input_ids"], other["input_ids"]) for batch, other in zip(BATCHES, garbled, strict=True)
    )
    again = calibrate(
        subject.model, subject.pairs, garbled, felt(subject.model, subject.pairs, garbled), fill=True, spreads=True
    )
    for part in ("basis", "mean", "std", "out"):
        for name, array in getattr(calibration, part).items():
            np.testing.assert_allclose(getattr(again, part)[name], array, rtol=1e-3, atol=1e-5, err_msg=name)


def test_spreads_of_outputs_are_those_of_the_real_tokens(subject: Subject, calibration: Calibration) -> None:
    for pair in subject.pairs:
        if not pair.adjustable:
            assert pair.name not in calibration.out
            continue
        y = activations(subject, replace(pair.consumer, side="out"), 1).double().squeeze(1)  # (tokens, d)
        weight = 1 / y.norm(dim=1, keepdim=True)
        weight = weight / weight.sum()
        spread = (weight * (y - (weight * y).sum(0)).square()).sum(0).sqrt()
        np.testing.assert_allclose(calibration.out[pair.name], spread.clamp_max(4 * spread.median()), rtol=1e-4)


def test_each_side_of_an_encoder_decoder_has_its_own_padding() -> None:
    """Encoder and decoder of the same length, other ends: what stands under either padding is not read."""
    config = T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, dropout_rate=0.0)
    torch.manual_seed(0)
    model = T5Model(config).eval()
    batch = {
        "input_ids": torch.randint(2, 50, (4, 6)),
        "attention_mask": (torch.arange(6) < torch.tensor([[6], [5], [3], [2]])).long(),
        "decoder_input_ids": torch.randint(2, 50, (4, 6)),
        "decoder_attention_mask": (torch.arange(6) < torch.tensor([[2], [6], [4], [5]])).long(),
    }
    garbled = {
        **batch,
        "input_ids": batch["input_ids"].where(batch["attention_mask"].bool(), torch.tensor(1)),
        "decoder_input_ids": batch["decoder_input_ids"].where(batch["decoder_attention_mask"].bool(), torch.tensor(1)),
    }
    pairs = find_pairs(model, batch)
    found, again = (
        calibrate(model, pairs, [one], felt(model, pairs, [one]), fill=True, spreads=True) for one in (batch, garbled)
    )
    assert any("EncDec" in name for name in found.mean)
    for part in ("basis", "mean", "std", "out"):
        for name, array in getattr(found, part).items():
            np.testing.assert_allclose(getattr(again, part)[name], array, rtol=1e-3, atol=1e-5, err_msg=name)
    gathered = [
        gather(model, pairs, Batches(model, [one]), found.basis, count=1, progress=False) for one in (batch, garbled)
    ]
    for first, second in zip(*gathered, strict=True):
        for name, array in first.items():
            np.testing.assert_allclose(second[name], array, rtol=1e-3, atol=1e-5, err_msg=name)


def test_nothing_is_gathered_where_nothing_is_wanted(subject: Subject) -> None:
    empty = calibrate(subject.model, subject.pairs, BATCHES[:1], {}, fill=False, spreads=False)
    assert empty == Calibration()


def test_what_the_data_does_not_reach_is_left_alone(subject: Subject, gramians: dict[str, dict[str, Tensor]]) -> None:
    assert (
        calibrate(subject.model, subject.pairs, [], gramians[subject.family], fill=True, spreads=True) == Calibration()
    )


def test_dead_directions_are_no_trouble(subject: Subject) -> None:
    """One token: second moments of rank one, and of rank zero once centred."""
    one = {"input_ids": torch.tensor([[5]]), "attention_mask": torch.tensor([[1]])}
    unfelt = {pair.name: torch.zeros(pair.groups, pair.width, pair.width) for pair in subject.pairs if pair.rotatable}
    found = calibrate(subject.model, subject.pairs, [one], unfelt, fill=True, spreads=True)
    for name, basis in found.basis.items():
        assert np.isfinite(basis).all(), name
        assert np.isfinite(np.linalg.inv(basis.astype(np.float64))).all(), name


@pytest.mark.parametrize("varies", [0.0, 1e-6, 1e-3])
def test_a_mean_does_not_drown_what_varies_beside_it(varies: float) -> None:
    generator = torch.Generator().manual_seed(0)
    constant = 1e4 * torch.randn(1, 24, generator=generator).double()
    noise = varies * torch.randn(999, 24, generator=generator).double()
    moments = Moments()
    for part in (constant + noise).split(100):
        moments.add(part, heads=3, outer=True)
    mean, spread = moments.central()
    torch.testing.assert_close(mean, (constant + noise).mean(0).view(3, 8), rtol=1e-12, atol=0)
    for head, of in zip(spread, (constant + noise - constant).mT.split(8), strict=True):
        torch.testing.assert_close(head, torch.cov(of, correction=0), rtol=1e-4, atol=1e-30)
    basis = balance(spread, torch.eye(8, dtype=torch.float64).expand(3, -1, -1))
    torch.testing.assert_close(torch.linalg.inv(basis) @ basis, torch.eye(8).double().expand(3, -1, -1))


def test_the_model_is_left_as_it_was(subject: Subject) -> None:
    def interrupted() -> Iterator[dict[str, Tensor]]:
        yield BATCHES[0]
        raise ZeroDivisionError

    before = snapshot(subject.model)
    with pytest.raises(ZeroDivisionError):
        calibrate(subject.model, subject.pairs, interrupted(), {}, fill=True, spreads=True)
    assert snapshot(subject.model) == before
