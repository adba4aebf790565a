"""Tiny random models in float64, found once; every test leaves them as they are."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
import transformers
from hypothesis import HealthCheck, settings
from torch import Tensor, nn

import pathprune
from pathprune.discovery.discover import find_pairs
from pathprune.discovery.proof import Float64
from pathprune.family.pair_list import PairList

M = TypeVar("M", bound=nn.Module)

torch.set_num_threads(1)
QUIET = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("pathprune", QUIET, max_examples=50, derandomize=True)
settings.register_profile("attack", QUIET, max_examples=1500)  # pytest --hypothesis-profile=attack
settings.load_profile("pathprune")

COMMON = {"vocab_size": 40, "hidden_size": 24, "num_hidden_layers": 2, "intermediate_size": 20}

# name -> (configuration class, model class, settings): an encoder with biases everywhere and tied embeddings,
# a decoder without any bias and with grouped queries, and one with biases in query, key and value only.
TINY: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("BertConfig", "BertForMaskedLM", {"num_attention_heads": 3, "max_position_embeddings": 32}),
    "llama": (
        "LlamaConfig",
        "LlamaForCausalLM",
        {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 8, "eos_token_id": None},
    ),
    "qwen2": ("Qwen2Config", "Qwen2Model", {"num_attention_heads": 4, "num_key_value_heads": 2}),
}


@dataclass(frozen=True)
class Subject:
    """A tiny model, its pairs, and inputs with padding."""

    family: str
    model: Any
    pairs: PairList
    inputs: dict[str, Tensor]

    def output(self, model: nn.Module | None = None) -> Tensor:
        return run_model(model or self.model, self.inputs)


def randomise(model: M, seed: int = 0) -> M:
    """Every parameter, biases and norms included, far from zero and from any symmetry."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        scale = "norm" in name.lower() and name.endswith("weight")
        parameter.data.copy_(1 + 0.1 * noise if scale else 0.3 * noise)
    return model


def tiny_model(family: str, model_class: str | None = None, *, seed: int = 0, **settings: Any) -> Any:
    config, default_class, own = TINY[family]
    config = getattr(transformers, config)(**{**COMMON, **own, **settings})
    return randomise(getattr(transformers, model_class or default_class)(config).double().eval(), seed)


def tiny_inputs(seed: int = 1, *, batch: int = 3, length: int = 7) -> dict[str, Tensor]:
    ids = torch.randint(3, COMMON["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[0, length - 3 :] = 0
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def run_model(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """First output, at real tokens only; in float64 throughout, if the model is."""
    with Float64() if next(model.parameters()).dtype == torch.float64 else nullcontext():
        output = model(**inputs)[0]
    real = inputs["attention_mask"].bool()
    return output[real] if output.shape[:2] == real.shape else output


def assert_same_model(one: nn.Module, other: nn.Module, inputs: dict[str, Tensor]) -> None:
    """The same parameters to the last bit; outputs but for rounding, which depends on where in memory weights lie."""
    parameters = dict(other.named_parameters())
    assert parameters.keys() == dict(one.named_parameters()).keys()
    for name, parameter in one.named_parameters():
        assert parameter.dtype == parameters[name].dtype
        assert torch.equal(parameter, parameters[name]), name
    rounding = 4 * torch.finfo(parameter.dtype).eps
    expected = run_model(one, inputs)
    assert (run_model(other, inputs) - expected).abs().max() <= max(rounding, 1e-12) * expected.abs().max()


def snapshot(model: Any) -> dict[str, Any]:
    """Everything that must be as before: values, flags, hooks, attributes, and the random state."""
    parts: dict[str, Any] = {name: tensor.numpy().tobytes() for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        parts[f"requires_grad of {name}"] = (parameter.requires_grad, parameter.grad)
    for name, module in model.named_modules():
        hooks = [value for key, value in vars(module).items() if "hook" in key]
        simple = {key: value for key, value in vars(module).items() if isinstance(value, int | float | str | None)}
        parts[f"module {name}"] = (type(module), [len(hook) for hook in hooks if hasattr(hook, "__len__")], simple)
    parts["config"] = model.config.to_json_string() if hasattr(model, "config") else None
    parts["random state"] = torch.get_rng_state().numpy().tobytes()
    return parts


@pytest.fixture(scope="session")
def subjects() -> dict[str, Subject]:
    models = {family: tiny_model(family) for family in TINY}
    return {family: Subject(family, model, find_pairs(model), tiny_inputs()) for family, model in models.items()}


@pytest.fixture(params=list(TINY))
def subject(request: pytest.FixtureRequest, subjects: dict[str, Subject]) -> Subject:
    return subjects[request.param]


Python = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def python() -> Python:
    """Run a script in a process of its own, with this checkout's pathprune."""
    source = str(Path(pathprune.__file__).parents[1])

    def run(script: str, *arguments: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", script, *map(str, arguments)],
            env={**os.environ, "PYTHONPATH": source},
            capture_output=True,
            text=True,
            timeout=300,
        )

    return run
