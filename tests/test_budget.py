"""Budgets are never exceeded, missed by less than one removal, and count what a real sliced model has."""

from __future__ import annotations

import copy
import itertools
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from conftest import Subject, run_model, tiny_model
from pathprune.checkpoint.save import save_model
from pathprune.discovery.discover import find_pairs
from pathprune.errors import BudgetError
from pathprune.family.budget import Budget
from pathprune.family.costs import BIAS_ENTRY, dense_macs
from pathprune.family.pair_list import PairList
from pathprune.family.pairs import Pair, Slot
from pathprune.family.path import SolutionPath
from pathprune.family.selection import Selection
from pathprune.transform.slicing import slice_model
from strategies import CASES, budgets, mlp_pair, pair_list, paths, selection_of


def cost(selection: Selection, kind: str) -> int:
    """Counted map by map from the masks, not by units."""
    pairs, total = selection.pairs, 0
    for pair in pairs:
        for slot in pair.slots:
            inner = len(pair.positions(slot, selection.keep[pair.name]))
            if kind == "macs":
                # Queries meet keys, and attention weights meet values, once for every query head.
                attended = selection.seq_len if pair.kind != "mlp" and slot == widest(pair) else 0
                total += inner * (slot.size + attended)
            else:
                total += inner * (slot.size + (slot.bias and slot.side == "out"))
        if kind == "params" and pair.name in selection.fill and not selection.keep[pair.name].all():
            total += 0 if pair.consumer.bias else pair.consumer.size  # the bias that takes the fill
    if kind == "bytes":
        tensors = [
            len(pair.consumer.module) + BIAS_ENTRY
            for pair in pairs
            if pair.name in selection.fill and not selection.keep[pair.name].all() and not pair.consumer.bias
        ]
        return 4 * cost(selection, "params") + 800 + sum(tensors)
    linear = sum(pair.groups * pair.units * pair.unit_macs(0) for pair in pairs)
    outside = {
        "keep": 0,
        "params": pairs.base.params - pairs.prunable_params,
        "macs": pairs.base.macs_per_token - int(linear),
    }
    return total + outside[kind]


def widest(pair: Pair) -> Slot:
    return max(pair.slots, key=lambda slot: slot.repeat)


def dense_size(path: SolutionPath, kind: str) -> int:
    base = path.pairs.base
    return {
        "keep": path.pairs.prunable_params,
        "params": base.params,
        "macs": dense_macs(path.pairs, path.seq_len),
        "bytes": base.bytes,
    }[kind]


def some_budgets(path: SolutionPath) -> st.SearchStrategy[Budget]:
    return budgets(path.pairs.base.params, dense_size(path, "macs"), path.pairs.base.bytes)


@given(st.data(), paths())
def test_a_budget_is_kept_and_missed_by_less_than_the_next_removal(data: st.DataObject, path: SolutionPath) -> None:
    budget = data.draw(some_budgets(path))
    dense = dense_size(path, budget.kind)
    limit = budget.value if isinstance(budget.value, int) else budget.value * dense
    nothing = path.order.keep(len(path.order.units))
    smallest = cost(Selection(path.pairs, nothing, seq_len=path.seq_len, fill=path.fill), budget.kind)
    if limit < smallest:
        with pytest.raises(BudgetError, match=r"the path's smallest model, with every pair removed, has") as error:
            path.select(budget)
        assert f"{smallest:,} of {dense:,}" in str(error.value)
        remedy = re.search(r"ask for (params|macs|bytes)=([\d.]+) or more$", str(error.value))
        assert remedy
        value = float(remedy[2]) if isinstance(budget.value, float) else int(remedy[2])
        path.select(Budget(**{remedy[1]: value}))  # following the advice works
        return
    selection = path.select(budget)
    assert cost(selection, budget.kind) <= limit
    if selection.removals:
        one_less = Selection(path.pairs, path.order.keep(selection.removals - 1), seq_len=path.seq_len, fill=path.fill)
        assert cost(one_less, budget.kind) > limit


@given(paths(), st.integers(0, 100))
def test_a_selection_counts_itself(path: SolutionPath, removals: int) -> None:
    keep = path.order.keep(min(removals, len(path.order.units)))
    selection = Selection(path.pairs, keep, seq_len=path.seq_len, fill=path.fill)
    assert selection.pair_params == cost(selection, "keep")
    assert selection.params == cost(selection, "params")
    assert selection.macs == cost(selection, "macs")
    assert selection.bytes == cost(selection, "bytes")
    facts = selection.to_dict()
    assert facts["params"] == selection.params
    assert facts["widths"].keys() == keep.keys()
    for pair in path.pairs:
        heads, width = selection.widths(pair)
        assert heads * width == selection.kept(pair) * pair.dims_per_unit


@given(st.data(), paths())
def test_selections_are_nested_whatever_their_budgets(data: st.DataObject, path: SolutionPath) -> None:
    selections = []
    for _ in range(3):
        try:
            selections.append(path.select(data.draw(some_budgets(path))))
        except BudgetError:
            continue
    selections.sort(key=lambda selection: selection.removals)
    for larger, smaller in itertools.pairwise(selections):
        assert all((smaller.keep[name] <= larger.keep[name]).all() for name in larger.keep)


@given(paths())
def test_everything_is_kept_where_everything_is_allowed(path: SolutionPath) -> None:
    dense = {kind: dense_size(path, kind) for kind in ("params", "macs", "bytes")}
    for budget in (
        Budget(keep=1.0),
        Budget(params=1.0),
        Budget(macs=1.0),
        *(Budget(**{k: v}) for k, v in dense.items()),
    ):
        selection = path.select(budget)
        assert selection.removals == 0
        assert all(keep.all() for keep in selection.keep.values())
        assert selection.params == dense["params"]
        assert selection.macs == dense["macs"]


@given(paths(), st.sampled_from(["params", "macs", "bytes"]))
def test_more_than_the_dense_model_is_taken_for_a_slip(path: SolutionPath, kind: str) -> None:
    dense = dense_size(path, kind)
    with pytest.raises(BudgetError, match=rf"{kind}={dense + 1} is more than the dense model's {dense:,}; ask for"):
        path.select(Budget(**{kind: dense + 1}))


@pytest.mark.parametrize(
    ("given_budget", "message"),
    [
        ({}, r"exactly one of keep=, params=, macs= or bytes=; got none"),
        ({"keep": 0.5, "macs": 0.5}, r"exactly one .* got \['keep', 'macs'\]"),
        ({"keep": 0.5, "params": 10, "macs": 1}, r"exactly one"),
        ({"keep": 0.0}, r"keep=0.0 is not in \(0, 1\]; a float is the fraction kept$"),
        ({"keep": 1.5}, r"keep=1.5 is not in \(0, 1\]"),
        ({"keep": 2}, r"keep=2 is not in \(0, 1\]"),
        ({"keep": -0.1}, r"keep=-0.1 is not in"),
        ({"keep": float("nan")}, r"keep=nan is not in"),
        ({"macs": float("inf")}, r"macs=inf is not in \(0, 1\].* an int an absolute number"),
        ({"params": 1.5}, r"params=1.5 is not in \(0, 1\].* an int an absolute number"),
        ({"params": 0}, r"params=0 must be positive"),
        ({"macs": -5}, r"macs=-5 must be positive"),
        ({"keep": True}, r"keep=True is not a number"),
        ({"params": True}, r"params=True is not a number"),
        ({"macs": "0.5"}, r"macs='0.5' is not a number"),
        ({"keep": [0.5]}, r"keep=\[0.5\] is not a number"),
    ],
)
def test_what_is_not_a_budget_is_refused(given_budget: dict[str, Any], message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        Budget(**given_budget)


@pytest.mark.parametrize("number", [np.float32(0.5), np.float64(0.5)])
def test_numbers_of_numpy_are_numbers(number: Any) -> None:
    assert Budget(keep=number).value == 0.5
    count: Any = np.int64(7)
    assert Budget(params=count).value == 7


def count_macs(model: nn.Module, inputs: dict[str, Tensor]) -> int:
    """Multiply-accumulates of all linear maps, from their real inputs, and of attention over every position."""
    batch, length = inputs["input_ids"].shape
    total = 0

    def count(module: nn.Linear, args: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        total += math.prod(args[0].shape[:-1]) * module.weight.numel()

    handles = [module.register_forward_hook(count) for module in model.modules() if isinstance(module, nn.Linear)]
    run_model(model, inputs)
    for handle in handles:
        handle.remove()
    for name, module in model.named_modules():
        if name.endswith(("q_proj", "query")):  # logits: one product per query dimension and pair of positions
            total += batch * length * length * module.weight.shape[0]
        if name.endswith(("o_proj", "attention.output.dense")):  # attention weights times values
            total += batch * length * length * module.weight.shape[1]
    return total


def real_macs(model: nn.Module, length: int) -> float:
    """Per token."""
    ids = torch.ones(2, length, dtype=torch.long)
    return count_macs(model, {"input_ids": ids, "attention_mask": ids}) / ids.numel()


@pytest.mark.parametrize("case", CASES)
def test_sizes_are_those_of_the_real_sliced_model(subject: Subject, case: str) -> None:
    selection = selection_of(subject.pairs, case)
    small = slice_model(subject.model, selection)
    assert selection.params == sum(parameter.numel() for parameter in small.parameters())
    assert selection.macs == real_macs(small, selection.seq_len)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [0.9, 0.7, 0.6])
def test_a_file_is_as_small_as_was_asked(subject: Subject, size: float, dtype: torch.dtype, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    path = SolutionPath.from_scores(subject.pairs, {pair.name: generator.random(pair.shape) for pair in subject.pairs})
    path = replace(path, fill={pair.name: np.ones((pair.groups, pair.width)) for pair in path.pairs if pair.fillable})
    whole = copy.deepcopy(subject.model).to(dtype)
    whole.save_pretrained(tmp_path / "dense")
    limit = round(size * bytes_of_weights(tmp_path / "dense"))
    selection = path.select(Budget(bytes=limit), itemsize=dtype.itemsize)
    save_model(slice_model(whole, selection), tmp_path / "small")
    found = bytes_of_weights(tmp_path / "small")
    assert found <= limit
    kept = path.order.keep(selection.removals - 1)
    step = sum(int((kept[p.name] ^ selection.keep[p.name]).sum()) * p.unit_params for p in path.pairs)
    headers = 100 + (BIAS_ENTRY + 40) * len(path.pairs)  # of the dense model's numbers and of biases, at the most
    assert found >= limit - step * dtype.itemsize - headers


def bytes_of_weights(folder: Path) -> int:
    return (folder / "model.safetensors").stat().st_size


def test_a_path_of_0_1_0_says_that_it_does_not_know_bytes(subject: Subject) -> None:
    path = SolutionPath.from_scores(subject.pairs, {pair.name: np.ones(pair.shape) for pair in subject.pairs})
    base = replace(path.pairs.base, bytes=0, itemsize=0)
    old = replace(path, pairs=PairList(path.pairs, base))
    assert old.select(Budget(keep=0.5)).bytes is None
    with pytest.raises(BudgetError, match=r"does not say how many bytes .* search again, or ask for params="):
        old.select(Budget(bytes=0.5))


def test_a_pooler_counts_once_a_sequence() -> None:
    model = tiny_model("bert", "BertModel")
    selection = selection_of(find_pairs(model), "uneven")
    assert selection.macs == pytest.approx(real_macs(slice_model(model, selection), selection.seq_len), abs=1)


def test_the_remedy_of_an_impossible_budget_works() -> None:
    """116 of 200 parameters stay; 0.58 * 200 is less than 116 in floating point."""
    pairs = pair_list([mlp_pair("b", 7, bias=False)], outside=116)
    path = SolutionPath.from_scores(pairs, {"b.mlp": np.ones((1, 7))})
    with pytest.raises(BudgetError, match=r"116 of 200; ask for params=.* or more") as error:
        path.select(Budget(params=0.5))
    value = float(str(error.value).split("params=")[-1].split()[0])
    assert path.select(Budget(params=value)).params == 116


def test_a_budget_says_what_it_is_of(subject: Subject) -> None:
    path = SolutionPath.from_scores(subject.pairs, {pair.name: np.ones(pair.shape) for pair in subject.pairs})
    text = str(path.select(Budget(keep=0.5)))
    for part in ("of the prunable parameters", "of the whole model's parameters", "of its MACs at 128 tokens"):
        assert part in text
    assert f"{subject.pairs.prunable_params:,}" in text
