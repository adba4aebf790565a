"""What other libraries put in the place of a sliced model's maps: adapters of PEFT, and torch's quantised maps."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import pathprune as pp
from conftest import COMMON, randomise, tiny_inputs
from pathprune.transform.modules import Padding
from strategies import selection_of

peft = pytest.importorskip("peft")

SUBJECTS: dict[str, tuple[str, dict[str, Any], str, list[str]]] = {
    "llama": (
        "Llama",
        {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 8},
        "CAUSAL_LM",
        ["q_proj", "v_proj"],
    ),
    "bert": ("Bert", {"num_attention_heads": 3, "max_position_embeddings": 32}, "CAUSAL_LM", ["query", "value"]),
    "gpt2": ("GPT2", {"n_embd": 24, "n_layer": 2, "n_head": 3}, "CAUSAL_LM", ["c_attn", "c_proj"]),
}
CASES = ["uneven", "no attention"]


def small_of(name: str, case: str) -> Any:
    family, own, *_ = SUBJECTS[name]
    settings = {**COMMON, **own, "is_decoder": True, "eos_token_id": None}
    config = getattr(transformers, f"{family}Config")(**settings)
    kind = "LMHeadModel" if family in ("GPT2", "Bert") else "ForCausalLM"
    dense: Any = randomise(getattr(transformers, f"{family}{kind}")(config).eval())
    small = pp.slice_model(dense, selection_of(pp.find_pairs(dense), case))
    hooks = [h for m in small.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    assert any(isinstance(hook, Padding) for hook in hooks)
    return small


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(**tiny_inputs()).logits


def trained(model: Any) -> None:
    """One step, on every adapter."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(2):  # the second step reaches A, as B is zero at first
        optimizer.zero_grad()
        ids = tiny_inputs()["input_ids"]
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("targets", ["by name", "all-linear"])
@pytest.mark.parametrize("name", SUBJECTS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_lora_on_a_sliced_model_trains_saves_and_merges(name: str, targets: str, case: str, tmp_path: Path) -> None:
    small = small_of(name, case)
    before = logits(small)
    modules = SUBJECTS[name][3] if targets == "by name" else targets
    config = peft.LoraConfig(r=2, target_modules=modules, task_type=SUBJECTS[name][2])
    small.save_pretrained(tmp_path / "small")
    wrapped = peft.get_peft_model(copy.deepcopy(small), config)
    assert torch.allclose(logits(wrapped), before, atol=1e-5)
    trained(wrapped)
    after = logits(wrapped)
    assert not torch.allclose(after, before, atol=1e-3)
    with wrapped.disable_adapter():
        assert torch.allclose(logits(wrapped), before, atol=1e-5)

    wrapped.save_pretrained(tmp_path / "adapter")
    again = type(small).from_pretrained(tmp_path / "small")
    again = peft.PeftModel.from_pretrained(again, tmp_path / "adapter").eval()
    assert torch.allclose(logits(again), after, atol=1e-4)

    merged = again.merge_and_unload()
    assert torch.allclose(logits(merged), after, atol=1e-4)
    pp.save_model(merged, tmp_path / "merged")
    loaded = type(small).from_pretrained(tmp_path / "merged").eval()
    assert torch.equal(logits(loaded), logits(merged))
    assert {n: p.shape for n, p in loaded.named_parameters()} == {n: p.shape for n, p in small.named_parameters()}


@pytest.mark.parametrize("steps", ["wrapped", "wrapped and merged", "wrapped, run and unloaded"])
def test_no_forward_pass_is_needed_between_wrapping_and_unwrapping(steps: str) -> None:
    small = small_of("llama", "uneven")
    before = logits(small)
    wrapped = peft.get_peft_model(copy.deepcopy(small), peft.LoraConfig(target_modules=["q_proj", "o_proj"]))
    if steps == "wrapped and merged":
        wrapped = wrapped.merge_and_unload()
    if steps == "wrapped, run and unloaded":
        logits(wrapped)
        wrapped = wrapped.unload()
    assert torch.allclose(logits(wrapped), before, atol=1e-5)
    assert torch.allclose(logits(copy.deepcopy(wrapped)), before, atol=1e-5)


@pytest.mark.slow
def test_lora_of_a_sliced_model_is_compiled() -> None:
    """With no pass before, in which the hooks would have found their new places."""
    wrapped = peft.get_peft_model(small_of("llama", "uneven"), peft.LoraConfig(target_modules=["q_proj", "o_proj"]))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    expected = logits(copy.deepcopy(wrapped))
    compiled: Any = torch.compile(wrapped, backend="eager")
    assert torch.allclose(logits(compiled), expected, atol=1e-5)
    torch._dynamo.reset()


@pytest.mark.parametrize("case", CASES)
def test_torch_quantises_every_map_of_a_sliced_model(case: str) -> None:
    small = small_of("llama", case)
    maps = sum(type(module) is nn.Linear for module in small.modules())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantised = torch.ao.quantization.quantize_dynamic(small, {nn.Linear}, dtype=torch.qint8)
    left = [module for module in quantised.modules() if isinstance(module, nn.Linear)]
    assert all(not module.weight.numel() for module in left)
    kinds = [m for m in quantised.modules() if isinstance(m, torch.ao.nn.quantized.dynamic.Linear)]
    assert len(kinds) == maps
    expected, got = logits(small), logits(quantised)
    assert (got - expected).norm() < 0.1 * expected.norm()
    assert torch.equal(logits(quantised), got)
