"""Masks on units of a dense model, for as long as a context lasts."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from conftest import Subject, run_model, snapshot, tiny_model
from pathprune.errors import MismatchError
from pathprune.family.pairs import Pair, Slot
from pathprune.family.selection import Selection
from pathprune.transform.masks import attach_masks, masked
from strategies import CASES, selection_of


def weight_of(model: nn.Module, slot: Slot) -> nn.Linear:
    module = model.get_submodule(slot.module)
    assert isinstance(module, nn.Linear)
    return module


def overwrite(linear: nn.Linear, slot: Slot, index: np.ndarray, value: float) -> None:
    """Rows and their biases, or columns, of one map."""
    with torch.no_grad():
        if slot.side == "in":
            linear.weight[:, index] = value
        else:
            linear.weight[index] = value
            if linear.bias is not None:
                linear.bias[index] = value


def masks_of(selection: Selection) -> dict[str, Tensor]:
    return {name: torch.from_numpy(keep) for name, keep in selection.keep.items()}


@pytest.mark.parametrize("case", CASES)
def test_masking_is_zeroing_weights(subject: Subject, case: str) -> None:
    """Without constants: the rows that make a unit, or the columns that read it, are zero."""
    selection = selection_of(subject.pairs, case, constants=False)
    zeroed = copy.deepcopy(subject.model)
    for pair in subject.pairs:
        gone = pair.positions(pair.mask_slot, ~selection.keep[pair.name])
        overwrite(weight_of(zeroed, pair.mask_slot), pair.mask_slot, gone, 0.0)
    with masked(subject.model, selection):
        got = subject.output()
    torch.testing.assert_close(got, run_model(zeroed, subject.inputs), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_removed_units_are_not_read(subject: Subject, case: str) -> None:
    """Whatever stands in their rows and columns, in every map of the pair."""
    selection = selection_of(subject.pairs, case, constants=False)
    noisy = copy.deepcopy(subject.model)
    for pair in subject.pairs:
        for slot in pair.slots:
            gone = pair.positions(slot, ~selection.keep[pair.name])
            overwrite(weight_of(noisy, slot), slot, gone, 7.0)
    with masked(subject.model, selection):
        expected = subject.output()
    with attach_masks(noisy, subject.pairs, masks_of(selection)):
        torch.testing.assert_close(run_model(noisy, subject.inputs), expected, rtol=1e-10, atol=1e-10)


def test_full_masks_change_no_bit(subject: Subject) -> None:
    dense = subject.output()
    with masked(subject.model, selection_of(subject.pairs, "full")):
        assert torch.equal(subject.output(), dense)


def test_full_masks_in_any_basis_and_with_any_fill_change_nothing(subject: Subject) -> None:
    selection = selection_of(subject.pairs, "full")
    fill = {name: torch.from_numpy(array) for name, array in selection.fill.items()}
    assert selection.basis
    with attach_masks(subject.model, subject.pairs, masks_of(selection), fill, selection.basis):
        torch.testing.assert_close(subject.output(), subject.output(), rtol=0, atol=0)
        got = subject.output()
    torch.testing.assert_close(got, subject.output(), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("constants", [False, True])
def test_one_mask_a_sample(subject: Subject, constants: bool) -> None:
    selections = [
        selection_of(subject.pairs, case, constants=constants) for case in ("uneven", "no mlp", "fewer heads")
    ]
    first = selections[0]
    fill = {name: torch.from_numpy(array) for name, array in first.fill.items()}
    masks = {name: torch.stack([masks_of(s)[name] for s in selections]).double() for name in first.keep}
    real = subject.inputs["attention_mask"].bool()
    with torch.no_grad(), attach_masks(subject.model, subject.pairs, masks, fill, first.basis):
        together = subject.model(**subject.inputs)[0]
    for i, selection in enumerate(selections):
        with torch.no_grad(), attach_masks(subject.model, subject.pairs, masks_of(selection), fill, first.basis):
            alone = subject.model(**subject.inputs)[0]
        torch.testing.assert_close(together[i][real[i]], alone[i][real[i]], rtol=1e-11, atol=1e-11)


def test_masks_and_fills_are_looked_up_at_every_pass(subject: Subject) -> None:
    selection = selection_of(subject.pairs, "uneven")
    masks: dict[str, Tensor] = {}
    fill: dict[str, Tensor] = {}
    dense = subject.output()
    with attach_masks(subject.model, subject.pairs, masks, fill):
        assert torch.equal(subject.output(), dense)
        masks.update(masks_of(selection))
        without_fill = subject.output()
        assert not torch.allclose(without_fill, dense)
        fill.update({name: torch.from_numpy(array) for name, array in selection.fill.items()})
        assert torch.allclose(subject.output(), without_fill) == (not selection.fill)
        masks.clear()
        assert torch.equal(subject.output(), dense)


def test_soft_masks_and_fills_have_gradients(subject: Subject) -> None:
    # RMS norms compute in float32 whatever the model's precision, which the differences must outweigh.
    step, rel, abs_ = (1e-6, 1e-5, 1e-8) if subject.family == "bert" else (1e-3, 1e-2, 2e-4)
    selection = selection_of(subject.pairs, "uneven")
    generator = torch.Generator().manual_seed(0)
    soft = {p.name: torch.rand(p.shape, generator=generator).double().requires_grad_() for p in subject.pairs}
    fill = {name: torch.from_numpy(array).double().requires_grad_() for name, array in selection.fill.items()}

    def loss() -> Tensor:
        return subject.model(**subject.inputs)[0].square().mean()

    with attach_masks(subject.model, subject.pairs, soft, fill, selection.basis):
        leaves = [*soft.values(), *fill.values()]
        gradients = torch.autograd.grad(loss(), leaves)
        for leaf, gradient in zip(leaves, gradients, strict=True):
            direction = torch.randn(leaf.shape, generator=generator).double()
            with torch.no_grad():
                difference = 0.0
                for sign in (1, -1):
                    leaf += sign * step * direction
                    difference += sign * float(loss()) / (2 * step)
                    leaf -= sign * step * direction
            assert difference == pytest.approx(float((gradient * direction).sum()), rel=rel, abs=abs_)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_low_precision_models_stay_in_their_precision(subject: Subject, dtype: torch.dtype) -> None:
    model = copy.deepcopy(subject.model).to(dtype)
    with masked(model, selection_of(subject.pairs, "fewer heads")):
        output = run_model(model, subject.inputs)
    assert output.dtype == dtype
    assert torch.isfinite(output).all()


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(subject: Subject, fails: bool) -> None:
    before = snapshot(subject.model)
    try:
        with masked(subject.model, selection_of(subject.pairs, "fewer heads")) as model:
            assert model is subject.model
            subject.output()
            if fails:
                raise ZeroDivisionError
    except ZeroDivisionError:
        pass
    assert snapshot(subject.model) == before


def test_hooks_are_removed_where_attaching_fails(subject: Subject) -> None:
    before = snapshot(subject.model)
    last = subject.pairs[-1]
    missing = Pair(
        last.name, last.kind, last.block, 1, last.width, tuple(Slot("nowhere", s.side, 4) for s in last.slots)
    )
    with pytest.raises(AttributeError), attach_masks(subject.model, [*subject.pairs[:-1], missing], {}):
        pass
    assert snapshot(subject.model) == before


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"seed": 1}, r"belongs to another model: weights was \w+, here it is \w+\. Load the model that was searched"),
        ({"intermediate_size": 22}, r"size was [\d,]+ parameters, here it is [\d,]+ parameters"),
        ({"layer_norm_eps": 1e-3, "rms_norm_eps": 1e-3}, r"configuration was"),
    ],
)
def test_a_selection_of_another_model_is_refused(subject: Subject, other: dict[str, Any], message: str) -> None:
    model = tiny_model(subject.family, **other)
    before = snapshot(model)
    with pytest.raises(MismatchError, match=message), masked(model, selection_of(subject.pairs, "uneven")):
        pass
    assert snapshot(model) == before
