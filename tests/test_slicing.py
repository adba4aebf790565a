"""Sliced models compute what masked models compute, and are models like any other."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from conftest import Subject, run_model, snapshot, tiny_inputs, tiny_model
from pathprune.discovery.discover import find_pairs
from pathprune.errors import MismatchError, UnsupportedModelError
from pathprune.family.selection import Selection
from pathprune.transform.masks import masked
from pathprune.transform.modules import Padding
from pathprune.transform.slicing import slice_model
from strategies import CASES, selection_of


def assert_equal_to_masked(subject: Subject, small: nn.Module, selection: Selection, tolerance: float = 1e-10) -> None:
    with masked(subject.model, selection):
        expected = subject.output()
    error = (subject.output(small) - expected).abs().max() / expected.abs().max()
    assert error < tolerance
    if not all(keep.all() for keep in selection.keep.values()):
        assert (expected - subject.output()).abs().max() > 1e-3 * expected.abs().max(), "pruning changes the output"


@pytest.mark.parametrize("constants", [False, True], ids=["plain", "fill and basis"])
@pytest.mark.parametrize("case", CASES)
def test_sliced_is_masked(subject: Subject, case: str, constants: bool) -> None:
    for seed in range(2):
        selection = selection_of(subject.pairs, case, seed=seed, constants=constants)
        small = slice_model(subject.model, selection)
        assert_equal_to_masked(subject, small, selection)
        for pair in subject.pairs:
            for slot in pair.slots:
                linear = small.get_submodule(slot.module)
                inner = linear.out_features if slot.side == "out" else linear.in_features
                assert inner == selection.kept(pair) * pair.dims_per_unit * slot.repeat


def test_query_key_and_value_widths_differ_for_real(subject: Subject) -> None:
    selection = selection_of(subject.pairs, "uneven")
    widths = {pair.name: selection.widths(pair) for pair in subject.pairs if pair.kind != "mlp"}
    assert len(set(widths.values())) > 1
    small = slice_model(subject.model, selection)
    hooks = [hook for module in small.modules() for hook in module._forward_hooks.values()]
    assert any(isinstance(hook, Padding) for hook in hooks)
    dense_size = sum(parameter.numel() for parameter in subject.model.parameters())
    assert sum(parameter.numel() for parameter in small.parameters()) < dense_size


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_every_attention_implementation_agrees(subject: Subject, implementation: str) -> None:
    model = copy.deepcopy(subject.model)
    model.set_attn_implementation(implementation)
    same = replace(subject, model=model)
    for case in ("uneven", "fewer heads", "no attention"):
        selection = selection_of(subject.pairs, case)
        small = slice_model(model, selection)
        assert_equal_to_masked(same, small, selection)
        small.set_attn_implementation("eager" if implementation == "sdpa" else "sdpa")
        assert_equal_to_masked(same, small, selection)


def test_the_model_is_untouched_and_shares_nothing(subject: Subject) -> None:
    before = snapshot(subject.model)
    small = slice_model(subject.model, selection_of(subject.pairs, "half of a path"))
    assert snapshot(subject.model) == before
    with torch.no_grad():
        for tensor in (*small.parameters(), *small.buffers()):
            tensor.fill_(0)
    small.config.vocab_size = 1
    assert snapshot(subject.model) == before


def test_flags_are_kept(subject: Subject) -> None:
    model = copy.deepcopy(subject.model).train()
    frozen = [name for i, (name, _) in enumerate(model.named_parameters()) if i % 3 == 0]
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    small = slice_model(model, selection_of(find_pairs(model), "uneven"))
    assert all(module.training for module in small.modules())
    assert [name for name, parameter in small.named_parameters() if not parameter.requires_grad] == frozen


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_every_parameter(subject: Subject, case: str, checkpointing: bool) -> None:
    selection = selection_of(subject.pairs, case)
    small = slice_model(subject.model, selection).train()
    if checkpointing:
        small.gradient_checkpointing_enable()
    small(**subject.inputs)[0].square().mean().backward()
    for name, parameter in small.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.shape == parameter.shape
    for pair in subject.pairs:
        for slot in pair.slots if selection.kept(pair) else ():
            assert small.get_parameter(f"{slot.module}.weight").grad.abs().max() > 0, slot.module


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_precision_is_kept(subject: Subject, dtype: torch.dtype) -> None:
    model = copy.deepcopy(subject.model).to(dtype)
    small = slice_model(model, selection_of(find_pairs(model), "uneven"))
    assert {parameter.dtype for parameter in small.parameters()} == {dtype}
    output = run_model(small, subject.inputs)
    assert output.dtype == dtype
    assert torch.isfinite(output).all()


def test_a_path_of_the_float32_model_fits_its_bfloat16_copy(subject: Subject) -> None:
    single = copy.deepcopy(subject.model).float()
    selection = selection_of(find_pairs(single), "uneven")
    slice_model(copy.deepcopy(single).bfloat16(), selection)


@pytest.mark.parametrize("case", CASES)
def test_a_decoder_generates_the_same_with_and_without_a_cache(subjects: dict[str, Subject], case: str) -> None:
    llama = subjects["llama"]
    small = slice_model(llama.model, selection_of(llama.pairs, case))
    ids = llama.inputs["input_ids"]
    padded = torch.ones_like(ids)
    padded[0, :3] = 0  # on the left, as for generation
    for mask in (torch.ones_like(ids), padded):
        tokens = [
            small.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0, **settings)
            for settings in ({"use_cache": False}, {"use_cache": True}, {"cache_implementation": "static"})
        ]
        assert tokens[0].shape[1] == ids.shape[1] + 8
        assert torch.equal(tokens[0], tokens[1])
        assert torch.equal(tokens[0], tokens[2])


@pytest.mark.parametrize("case", CASES)
def test_a_decoder_fed_token_by_token_is_the_decoder(subjects: dict[str, Subject], case: str) -> None:
    """Positions come from the cache, which must know its length whatever layers are left."""
    llama = subjects["llama"]
    small = slice_model(llama.model, selection_of(llama.pairs, case))
    cache: Any = None
    ids, steps = llama.inputs["input_ids"], []
    with torch.no_grad():
        for token in ids.split(1, dim=1):
            output = small(token, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            steps.append(output.logits)
        torch.testing.assert_close(torch.cat(steps, dim=1), small(ids).logits, rtol=1e-10, atol=1e-10)
    assert cache.get_seq_length() == ids.shape[1]


def test_a_sliced_model_can_be_copied(subject: Subject) -> None:
    small = slice_model(subject.model, selection_of(subject.pairs, "uneven"))
    assert torch.equal(subject.output(copy.deepcopy(small)), subject.output(small))


@pytest.mark.parametrize("other", [{"seed": 1}, {"intermediate_size": 22}, {"num_hidden_layers": 3}])
def test_a_selection_of_another_model_is_refused(subject: Subject, other: dict[str, Any]) -> None:
    with pytest.raises(MismatchError, match="this path belongs to another model"):
        slice_model(tiny_model(subject.family, **other), selection_of(subject.pairs, "uneven"))


def test_another_class_is_refused(subjects: dict[str, Subject]) -> None:
    with pytest.raises(MismatchError, match="architecture was BertForMaskedLM, here it is BertModel"):
        slice_model(tiny_model("bert", "BertModel"), selection_of(subjects["bert"].pairs, "uneven"))


def head_gone(keep: dict[str, Any], qk: str, vo: str) -> None:
    keep[qk][0] = False


def one_head_narrower(keep: dict[str, Any], qk: str, vo: str) -> None:
    keep[vo][0, 0] = False


def rotary_by_head(keep: dict[str, Any], qk: str, vo: str) -> None:
    keep[qk][0, 0] = keep[qk][1, 1] = False


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("bert", head_gone, "query-key and value-output must keep the same heads"),
        ("bert", one_head_narrower, "heads must keep equally many dimensions"),
        ("llama", head_gone, "query-key and value-output must keep the same heads"),
        ("llama", one_head_narrower, "heads must keep equally many dimensions"),
        ("llama", rotary_by_head, "heads must keep the same dimensions"),
    ],
)
def test_ragged_selections_are_refused(subjects: dict[str, Subject], family: str, change: Any, message: str) -> None:
    subject = subjects[family]
    selection = selection_of(subject.pairs, "full")
    names = [pair.name for pair in subject.pairs if pair.kind != "mlp"]
    change(selection.keep, *names[:2])
    with pytest.raises(MismatchError, match=message):
        slice_model(subject.model, selection)


@pytest.mark.parametrize("side", ["out", "in"])
def test_a_padded_map_is_a_small_map_between_zeros(side: str) -> None:
    sizes = (6, 5) if side == "in" else (5, 6)
    linear = nn.Linear(*sizes).double()
    Padding(side, blocks=3, width=2, padded=4).put_on(linear)
    x = torch.randn(2, 12 if side == "in" else 5, dtype=torch.float64)
    real = np.flatnonzero(np.arange(12) % 4 < 2)
    got: Tensor = linear(x)
    if side == "in":
        torch.testing.assert_close(got, nn.functional.linear(x[:, real], linear.weight, linear.bias))
    else:
        torch.testing.assert_close(got[:, real], nn.functional.linear(x, linear.weight, linear.bias))
        assert (np.delete(got.detach().numpy(), real, axis=1) == 0).all()


@pytest.mark.parametrize("case", ["uneven", "fewer heads", "no attention"])
def test_a_static_cache_is_filled_by_chunks(case: str) -> None:
    dense = tiny_model("llama").float()
    dense.generation_config.pad_token_id = 0
    small: Any = slice_model(dense, selection_of(find_pairs(dense), case))
    inputs: dict[str, Any] = {"input_ids": tiny_inputs(length=9)["input_ids"], "max_new_tokens": 5, "do_sample": False}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    expected = small.generate(**inputs, use_cache=False)
    for model in (small, copy.deepcopy(small)):
        got = model.generate(**inputs, cache_implementation="static", prefill_chunk_size=4)
        assert torch.equal(got, expected)
    with pytest.raises(UnsupportedModelError, match=r"continuous batching .* generates by generate\(\)"):
        small.init_continuous_batching()
