"""Recovery: the closed form against a reference, distillation against the dense model, and bad input."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import pathprune as pp
from helpers import VOCAB, tiny_batches, tiny_bert
from pathprune.budget import Budget
from pathprune.data import Batches
from pathprune.evaluation import fidelity
from pathprune.path import SolutionPath
from pathprune.recovery.closed_form import consumers, least_squares


def half(model: torch.nn.Module) -> torch.nn.Module:
    """Half of the units, at random: heads unequal in query-key and value width."""
    pairs = pp.find_pairs(model)
    rng = np.random.default_rng(0)
    path = SolutionPath.from_scores(pairs, {pair.name: rng.random(pair.shape) for pair in pairs})
    return pp.slice_model(model, path.select(Budget(keep=0.5)))


def test_closed_form_solves_the_weighted_regression() -> None:
    teacher = tiny_bert().double()
    small = half(teacher)
    first = consumers(small, teacher)[0]
    data = tiny_batches()
    fitted = pp.recover(small, teacher=teacher, data=data, method="closed-form", count=6, ridge=1e-9, progress=False)

    inputs, targets = [], []
    for batch in data:
        seen: list[tuple[torch.Tensor, torch.Tensor]] = []
        for model in (small, teacher):
            handle = model.get_submodule(first).register_forward_hook(
                lambda module, args, output, seen=seen: seen.append((args[0], output))
            )
            with torch.no_grad():
                model(**batch)
            handle.remove()
        (x, _), (_, y) = seen
        module = small.get_submodule(first)
        x = module.crop(x) if hasattr(module, "crop") else x
        real = batch["attention_mask"].bool()
        inputs.append(torch.cat([x[real], torch.ones(int(real.sum()), 1)], 1))
        targets.append(y[real])
    x, y = torch.cat(inputs), torch.cat(targets)
    weight = 1 / y.norm(dim=1, keepdim=True)
    reference = torch.linalg.lstsq(x * weight, y * weight).solution  # (in + 1, out)

    def residual(solution: torch.Tensor) -> float:
        return float(((x @ solution - y) * weight).square().sum().detach())

    def parameters(model: torch.nn.Module) -> torch.Tensor:
        module = model.get_submodule(first)
        return torch.cat([module.weight.T, module.bias[None]])

    best = residual(reference)
    assert residual(parameters(fitted)) <= best * (1 + 1e-6)
    assert residual(parameters(small)) > 1.05 * best


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("method", ["closed-form", "distill"])
def test_transposed_maps_and_maps_without_biases_recover(kind: str, method: str) -> None:
    """GPT-2 keeps its weights transposed; a sliced Llama has been given biases that the dense model lacks."""
    torch.manual_seed(0)
    if kind == "gpt2":
        shape = {"n_embd": 24, "n_layer": 2, "n_head": 3, "n_positions": 16}
        teacher = GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, initializer_range=0.3, **shape)).eval()
    else:
        shape = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 20}
        teacher = LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, initializer_range=0.3, **shape)).eval()
    data = tiny_batches(count=12)
    path = pp.search(teacher, data, steps=10, multiple=1, progress=False)
    small = pp.slice_model(teacher, path.select(Budget(keep=0.5)))
    settings = {"steps": 60, "lr": 3e-3} if method == "distill" else {}
    recovered = pp.recover(small, teacher=teacher, data=data, method=method, progress=False, **settings)
    before, after = (1 - fidelity(model, teacher, tiny_batches(seed=1)) for model in (small, recovered))
    assert after < 0.9 * before


@pytest.mark.parametrize("method", ["closed-form", "distill"])
def test_recovery_helps_and_touches_nothing_else(method: str) -> None:
    teacher = tiny_bert()
    small = half(teacher)
    data = tiny_batches(count=40)
    before = {name: tensor.clone() for name, tensor in small.state_dict().items()}
    dense = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    settings = {"steps": 60, "lr": 3e-3} if method == "distill" else {}
    recovered = pp.recover(small, teacher=teacher, data=data, method=method, progress=False, **settings)
    assert recovered is not small
    assert all(torch.equal(tensor, before[name]) for name, tensor in small.state_dict().items())
    assert all(torch.equal(tensor, dense[name]) for name, tensor in teacher.state_dict().items())
    assert [tuple(p.shape) for p in recovered.parameters()] == [tuple(p.shape) for p in small.parameters()]
    assert all(p.grad is None and p.requires_grad for p in recovered.parameters())
    unseen = tiny_batches(seed=1)
    assert 1 - fidelity(recovered, teacher, unseen) < 0.8 * (1 - fidelity(small, teacher, unseen))


def test_recovered_model_saves_and_loads(tmp_path: object) -> None:
    from transformers import AutoModel

    teacher = tiny_bert()
    recovered = pp.recover(half(teacher), teacher=teacher, data=tiny_batches(), steps=3, progress=False)
    recovered.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    batch = tiny_batches()[0]
    with torch.no_grad():
        assert torch.equal(again(**batch).last_hidden_state, recovered(**batch).last_hidden_state)


def test_same_seed_same_weights() -> None:
    teacher = tiny_bert()
    small = half(teacher)
    one, two = (pp.recover(small, teacher=teacher, data=tiny_batches(), steps=5, progress=False) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_bad_input_is_refused() -> None:
    teacher = tiny_bert()
    small = half(teacher)
    with pytest.raises(pp.DataError, match="method='magic' is not one of closed-form, distill"):
        pp.recover(small, teacher=teacher, data=tiny_batches(), method="magic")  # type: ignore[arg-type]
    with pytest.raises(pp.DataError, match="data is empty"):
        pp.recover(small, teacher=teacher, data=[])
    with pytest.raises(pp.DataError, match="steps=0"):
        pp.recover(small, teacher=teacher, data=tiny_batches(), steps=0)
    with pytest.raises(pp.DataError, match="unknown setting"):
        pp.recover(small, teacher=teacher, data=tiny_batches(), epochs=3)
    with pytest.raises(pp.DataError, match="no linear map of the BertModel reads fewer features"):
        least_squares(teacher, teacher, Batches(teacher, tiny_batches()), hidden=True)
    broken = tiny_bert()
    broken.embeddings.word_embeddings.weight.data[:] = float("nan")
    with pytest.raises(pp.DataError, match="loss is nan at distillation step 0"):
        pp.recover(small, teacher=broken, data=tiny_batches(), steps=2, progress=False)
    with pytest.raises(pp.MismatchError, match="not sliced from"):
        pp.recover(small, teacher=small, data=tiny_batches(), method="closed-form")
