"""Distillation against the dense model, and bad input."""

from __future__ import annotations

import copy
import random
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import pathprune as pp
from helpers import VOCAB, tiny_batches, tiny_bert
from pathprune.data.batches import Batches
from pathprune.evaluation import fidelity
from pathprune.family.budget import Budget
from pathprune.family.path import SolutionPath
from pathprune.recovery import holdout
from pathprune.recovery.holdout import HeldOut


def half(model: torch.nn.Module) -> torch.nn.Module:
    """Half of the units, at random: heads unequal in query-key and value width."""
    pairs = pp.find_pairs(model)
    rng = np.random.default_rng(0)
    path = SolutionPath.from_scores(pairs, {pair.name: rng.random(pair.shape) for pair in pairs})
    return pp.slice_model(model, path.select(Budget(keep=0.5)))


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_transposed_maps_and_maps_without_biases_recover(kind: str) -> None:
    """GPT-2 keeps its weights transposed; a sliced Llama has been given biases that the dense model lacks."""
    torch.manual_seed(0)
    shape: dict[str, Any]
    if kind == "gpt2":
        shape = {"n_embd": 24, "n_layer": 2, "n_head": 3, "n_positions": 16}
        teacher = GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, initializer_range=0.3, **shape)).eval()
    else:
        shape = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 20}
        teacher = LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, initializer_range=0.3, **shape)).eval()
    data = tiny_batches(count=12)
    path = pp.search(teacher, data, steps=10, multiple=1, progress=False)
    small = pp.slice_model(teacher, path.select(Budget(keep=0.3)))
    recovered = pp.recover(small, teacher=teacher, data=data, steps=60, lr=3e-3, progress=False)
    before, after = (1 - fidelity(model, teacher, tiny_batches(seed=1)) for model in (small, recovered))
    assert after < 0.9 * before


def test_recovery_helps_and_touches_nothing_else() -> None:
    teacher = tiny_bert()
    small = half(teacher)
    data = tiny_batches(count=40)
    before = {name: tensor.clone() for name, tensor in small.state_dict().items()}
    dense = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    recovered = pp.recover(small, teacher=teacher, data=data, steps=60, lr=3e-3, progress=False)
    assert recovered is not small
    assert all(torch.equal(tensor, before[name]) for name, tensor in small.state_dict().items())
    assert all(torch.equal(tensor, dense[name]) for name, tensor in teacher.state_dict().items())
    assert [tuple(p.shape) for p in recovered.parameters()] == [tuple(p.shape) for p in small.parameters()]
    assert all(p.grad is None and p.requires_grad for p in recovered.parameters())
    unseen = tiny_batches(seed=1)
    assert 1 - fidelity(recovered, teacher, unseen) < 0.8 * (1 - fidelity(small, teacher, unseen))


def test_recovered_model_saves_and_loads(tmp_path: Path) -> None:
    from transformers import AutoModel

    teacher = tiny_bert()
    recovered: Any = pp.recover(half(teacher), teacher=teacher, data=tiny_batches(), steps=3, progress=False)
    recovered.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    batch = tiny_batches()[0]
    with torch.no_grad():
        assert torch.equal(again(**batch).last_hidden_state, recovered(**batch).last_hidden_state)


@pytest.mark.parametrize("steps", [1, 8, 9, 10, 19])
def test_any_number_of_steps_has_a_schedule(steps: int) -> None:
    teacher = tiny_bert()
    small = half(teacher)
    recovered = pp.recover(small, teacher=teacher, data=tiny_batches(), steps=steps, progress=False)
    trained = zip(recovered.parameters(), small.parameters(), strict=True)
    assert not all(torch.equal(after, before) for after, before in trained)


@pytest.mark.parametrize("lora_rank", [None, 2])
def test_same_seed_same_weights_whatever_the_state_of_randomness_which_stays(lora_rank: int | None) -> None:
    teacher = tiny_bert()
    small = half(teacher)
    settings: dict[str, Any] = {"data": tiny_batches(), "steps": 5, "lora_rank": lora_rank, "progress": False}
    one = pp.recover(small, teacher=teacher, **settings)
    torch.rand(3)
    before = torch.get_rng_state()
    two = pp.recover(small, teacher=teacher, **settings)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


@pytest.mark.parametrize("recover", [pp.recover, None], ids=["recover", "elastic"])
def test_mixed_precision_trains_as_well(recover: Any) -> None:
    """Not the same weights, which are float32 all the same, but the same quality."""
    teacher, data = tiny_bert(), tiny_batches(count=40)
    pairs = pp.find_pairs(teacher)
    rng = np.random.default_rng(0)
    path = pp.SolutionPath.from_scores(pairs, {pair.name: rng.random(pair.shape) for pair in pairs})
    path = pp.compensate(teacher, path, data, progress=False)
    small = pp.slice_model(teacher, path.select(Budget(keep=0.5)))
    trained = []
    for bf16 in (False, True):
        steps, lr = (60, 3e-3) if recover else (300, 3e-3)
        settings: dict[str, Any] = {"data": data, "steps": steps, "lr": lr, "bf16": bf16, "progress": False}
        if recover:
            trained.append(recover(small, teacher=teacher, **settings))
        else:
            shared, sizes = pp.elastic(teacher, path, **settings)
            trained.append(pp.slice_model(shared, sizes.select(Budget(keep=0.5))))
    assert {p.dtype for p in trained[1].parameters()} == {torch.float32}
    assert not all(torch.equal(a, b) for a, b in zip(*(m.parameters() for m in trained), strict=True))
    before, exact, rough = (1 - fidelity(model, teacher, tiny_batches(seed=1)) for model in (small, *trained))
    assert max(exact, rough) < 0.9 * before
    assert rough < 1.2 * exact


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_16_bits_train_as_well(dtype: torch.dtype) -> None:
    """Steps too small for such weights add up all the same."""
    teacher: Any = tiny_bert()
    data = tiny_batches(count=40)
    small: Any = half(teacher)
    settings: dict[str, Any] = {"data": data, "steps": 100, "lr": 1e-4, "progress": False}
    exact = pp.recover(small, teacher=teacher, **settings)
    rough = pp.recover(copy.deepcopy(small).to(dtype), teacher=copy.deepcopy(teacher).to(dtype), **settings)
    assert {p.dtype for p in rough.parameters()} == {dtype}
    rough.float()
    before, exactly, roughly = (1 - fidelity(m, teacher, tiny_batches(seed=1)) for m in (small, exact, rough))
    assert before - roughly > 0.9 * (before - exactly) > 0.1 * before


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_lora_changes_every_map_by_a_low_rank_and_helps(kind: str) -> None:
    torch.manual_seed(0)
    shape: dict[str, Any] = {"n_embd": 24, "n_layer": 2, "n_head": 3, "n_positions": 16}
    config = GPT2Config(vocab_size=VOCAB, initializer_range=0.3, **shape)
    teacher = tiny_bert() if kind == "bert" else GPT2LMHeadModel(config).eval()
    small, data = half(teacher), tiny_batches(count=40)
    recovered = pp.recover(small, teacher=teacher, data=data, steps=60, lr=1e-2, lora_rank=3, progress=False)
    tables = {id(m.weight) for m in recovered.modules() if isinstance(m, torch.nn.Embedding)}
    assert recovered.state_dict().keys() == small.state_dict().keys()
    start = dict(small.named_parameters())
    for name, now in recovered.named_parameters():
        assert now.requires_grad, name
        assert now.grad is None, name
        if id(now) in tables or not now.numel() or name.startswith("pooler"):
            continue  # nothing reads the pooler
        rank = torch.linalg.matrix_rank((now - start[name]).detach().double(), rtol=1e-4) if now.dim() == 2 else 1
        assert 0 < rank <= 3, name
    before, after = (1 - fidelity(model, teacher, tiny_batches(seed=1)) for model in (small, recovered))
    assert after < 0.9 * before
    with pytest.raises(pp.SettingError, match="lora_rank=0 must be positive"):
        pp.recover(small, teacher=teacher, data=data, lora_rank=0)


def held_out(data: Any, **options: Any) -> HeldOut:
    return HeldOut(Batches(tiny_bert(), data), 100, **options)


def rows(batches: Any) -> list[tuple[int, ...]]:
    """The texts of batches, without padding."""
    return [
        tuple(row[mask.bool()].tolist())
        for batch in batches
        for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]


@given(st.integers(1, 6), st.integers(0, 2**31), st.integers(1, 5), st.integers(0, 9))
def test_no_sample_is_trained_on_that_is_measured_on(count: int, seed: int, size: int, padding: int) -> None:
    """However the data is shuffled, batched and padded anew."""
    data = tiny_batches(count, seed) + tiny_batches(1, seed)  # a batch that comes twice
    held = held_out(data)
    measured, everything = set(rows(held.batches)), set(rows(data))
    assert measured
    assert measured < everything
    assert held.samples == len(rows(held.batches))
    assert len(measured) >= min(len(everything) // 4, 16)
    shuffled = rows(data)
    random.Random(seed).shuffle(shuffled)
    again = []
    for start in range(0, len(shuffled), size):
        part = shuffled[start : start + size]
        width = max(map(len, part)) + padding
        ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in part])
        again.append({"input_ids": ids, "attention_mask": (ids > 0).long()})
    held.source = again  # type: ignore[assignment]
    assert set(rows(held.training())) == everything - measured


def test_batches_whose_samples_cannot_be_told_apart_are_held_back_whole() -> None:
    batches = [{"input_ids": torch.arange(6).view(2, 3) + i, "grid": torch.arange(5)} for i in range(8)]
    held = HeldOut.__new__(HeldOut)
    held.limit = sorted(holdout._digests(batch)[0] for batch in batches)[3]
    parts = [held._part(batch, held=True) for batch in batches]
    assert sum(part is not None for part in parts) == 3
    assert all(part is None or part is batch for part, batch in zip(parts, batches, strict=True))


def test_validation_of_ones_own_is_all_that_is_measured_on() -> None:
    data = tiny_batches()
    held = held_out(data, validation=Batches(tiny_bert(), tiny_batches(2, seed=5)))
    assert sorted(rows(held.batches)) == sorted(rows(tiny_batches(2, seed=5)))
    held.source = data  # type: ignore[assignment]
    assert sorted(rows(held.training())) == sorted(rows(data))


@pytest.mark.parametrize("steps", [1, 2, 7, 40])
@pytest.mark.parametrize("lr", [1e-5, 1e-3, 0.3, 10.0])
def test_recovery_never_ends_worse_on_what_it_holds_back(steps: int, lr: float) -> None:
    teacher = tiny_bert()
    small, data = half(teacher), tiny_batches(count=12)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        after: Any = pp.recover(small, teacher=teacher, data=data, steps=steps, lr=lr, progress=False)
    outcome = after.recovery
    held = HeldOut(Batches(teacher, data), max(steps // 2, 16)).batches
    for model, said in ((small, outcome.before), (after, outcome.after)):
        assert 1 - fidelity(model, teacher, held) == pytest.approx(said[0], rel=1e-4)
    assert outcome.after <= outcome.before
    assert (outcome.after == outcome.before) == (outcome.kept == 0) == bool(caught)
    if not outcome.kept:
        assert "training gained nothing on the" in str(caught[0].message)
        assert all(torch.equal(a, b) for a, b in zip(small.parameters(), after.parameters(), strict=True))


def test_a_learning_rate_that_does_harm_is_lowered_and_gains_all_the_same() -> None:
    """A model that has lost little is harmed by steps that help one that has lost much."""
    teacher, data = tiny_bert(), tiny_batches(count=40)
    small = pp.recover(half(teacher), teacher=teacher, data=data, steps=60, lr=3e-3, progress=False)
    after: Any = pp.recover(small, teacher=teacher, data=data, steps=240, lr=3e-2, progress=False)
    outcome = after.recovery
    assert outcome.lr < 3e-2
    assert outcome.kept > 0
    assert outcome.after < outcome.before
    small = pp.recover(small, teacher=teacher, data=data, steps=120, lr=3e-3, progress=False)
    for lr in (1.0, 1e6):  # the loss of the latter is soon no number
        with pytest.warns(
            UserWarning, match=r"training gained nothing on the \d+ samples .*: what comes back is what was"
        ):
            hopeless: Any = pp.recover(small, teacher=teacher, data=data, steps=120, lr=lr, progress=False)
        assert hopeless.recovery.steps < 120, "it stops where nothing is gained"


def test_bad_input_is_refused() -> None:
    teacher = tiny_bert()
    small = half(teacher)
    with pytest.raises(pp.DataError, match="data is empty"):
        pp.recover(small, teacher=teacher, data=[])
    for wrong in ({"steps": 0}, {"lr": float("nan")}, {"lr": float("inf")}, {"lr": 0.0}):
        with pytest.raises(pp.SettingError, match=r"steps=\d+ and lr=.* must be positive, and finite"):
            pp.recover(small, teacher=teacher, data=tiny_batches(), **wrong)
    with pytest.raises(pp.SettingError, match="seed=10"):
        pp.recover(small, teacher=teacher, data=tiny_batches(), seed=10**30, lora_rank=1)
    with pytest.raises(pp.UnsupportedModelError, match=r"DataParallel holds a model .* pass model\.module"):
        pp.recover(torch.nn.DataParallel(small), teacher=teacher, data=tiny_batches())
    one = {"input_ids": torch.arange(5, 12)[None]}
    with pytest.raises(pp.DataError, match="the data is one sample, of which none can be held back"):
        pp.recover(small, teacher=teacher, data=[one, one])
    broken = tiny_bert()
    broken.embeddings.word_embeddings.weight.data[:] = float("nan")
    with pytest.raises(pp.DataError, match="loss is nan on the samples held back"):
        pp.recover(small, teacher=broken, data=tiny_batches(), steps=2, progress=False)
    with pytest.raises(pp.MismatchError, match="no smaller than its teacher: there is nothing to recover"):
        pp.recover(small, teacher=small, data=tiny_batches())
    with pytest.raises(pp.MismatchError, match="not sliced from"):
        pp.recover(teacher, teacher=small, data=tiny_batches())
