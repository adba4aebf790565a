"""Tiny random models of the table's rows, built and searched for pairs once, and how their outputs are compared."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from conftest import randomise
from pathprune.discovery.discover import find_pairs
from pathprune.discovery.proof import Float64
from pathprune.family.pair_list import PairList
from subjects import ROWS, SPECIAL_TOKENS, Inputs, Row, padding

NEW_TOKENS = 6

# Whisper's own generate() wants the special tokens of its tokenizer.
GENERATE = {"BlipForConditionalGeneration": transformers.BlipForConditionalGeneration.generate}


@dataclass(frozen=True)
class Subject:
    """A row's model in float64, in eval mode; tests leave it as it is."""

    row: Row
    model: Any = field(repr=False)
    inputs: Inputs = field(repr=False)
    pairs: PairList = field(repr=False)


@cache
def build(name: str) -> tuple[Row, Any]:
    row = next(row for row in ROWS if row.name == name)
    model = getattr(transformers, row.model)._from_config(row.config(), dtype=torch.float64).eval()
    if row.experts:
        model.set_experts_implementation(row.experts)
    return row, randomise(model)


@cache
def subject_of(name: str) -> Subject:
    row, model = build(name)
    inputs = row.inputs()
    return Subject(row, model, inputs, pairs_of(model, inputs))


def pairs_of(model: nn.Module, inputs: Inputs) -> PairList:
    return find_pairs(model, inputs)


def tensors(output: Any, prefix: str = "") -> dict[str, Tensor]:
    """Every floating tensor of an output by name, but for caches, and for what goes by head or layer."""
    if isinstance(output, Tensor):
        return {prefix: output} if output.is_floating_point() else {}
    found = {}
    for name, value in output.items() if isinstance(output, Mapping) else ():
        if name not in ("past_key_values", "hidden_states", "attentions") and not name.endswith(
            ("_attentions", "_hidden_states")
        ):
            found.update(tensors(value, f"{prefix}.{name}" if prefix else name))
    return found


def outputs(model: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    """At real tokens only."""
    mask = inputs.get("attention_mask")
    found = tensors(model(**inputs))
    assert found
    return {
        name: tensor[mask.bool()] if mask is not None and tensor.shape[:2] == mask.shape else tensor
        for name, tensor in found.items()
    }


@torch.no_grad()
def run(model: nn.Module, inputs: Inputs, *, rounded: bool = True) -> dict[str, Tensor]:
    """Outputs, as the model is or, not ``rounded``, with whatever it computes in lower precision in float64."""
    with nullcontext() if rounded else Float64():
        return outputs(model, inputs)


def gap(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """Largest difference of any output, relative to that output's largest value."""
    assert one.keys() == other.keys()
    gaps = []
    for name, a in one.items():
        b = other[name]
        assert a.shape == b.shape, name
        assert torch.isfinite(a).all(), name
        assert torch.isfinite(b).all(), name
        if a.numel():
            gaps.append(float((a - b).abs().max() / b.abs().max().clamp_min(1e-300)))
    return max(gaps)


def loss(model: nn.Module, inputs: Inputs) -> Tensor:
    """Reads every output."""
    return torch.stack([tensor.square().mean() for tensor in outputs(model, inputs).values() if tensor.numel()]).sum()


def gradients(model: nn.Module, inputs: Inputs) -> dict[str, Tensor | None]:
    names, parameters = zip(*(item for item in model.named_parameters() if item[1].requires_grad), strict=True)
    return dict(zip(names, torch.autograd.grad(loss(model, inputs), parameters, allow_unused=True), strict=True))


def without_cache(model: Any, inputs: Inputs) -> dict[str, Any]:
    """What a decoder needs beside its inputs to return no cache."""
    uses = any(getattr(part, "use_cache", False) for part in (model.config, model.config.get_text_config()))
    return {**inputs, "use_cache": False} if uses else dict(inputs)


def prompt(row: Row, inputs: Inputs) -> Inputs:
    """For generation: padded on the left, where there is no image among the tokens."""
    given = {name: tensor for name, tensor in inputs.items() if name != "decoder_input_ids"}
    if "pixel_values" in given:
        given["attention_mask"] = torch.ones_like(given["attention_mask"])
    elif "decoder_input_ids" not in inputs:
        given["attention_mask"] = padding(given["input_ids"], left=True)
    return given


@torch.no_grad()
def generate(model: Any, inputs: Inputs, **settings: Any) -> tuple[Tensor, Tensor]:
    """Greedy tokens, and the logits that they were chosen by, (steps, batch, vocabulary)."""
    own: dict[str, Any] = {name: tensor.clone() for name, tensor in inputs.items()}  # BLIP writes into its prompt
    found: Any = GENERATE.get(type(model).__name__, transformers.GenerationMixin.generate)(
        model,
        **own,
        **settings,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        suppress_tokens=SPECIAL_TOKENS if "pixel_values" in inputs else None,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return found.sequences, torch.stack(found.logits)


def with_attention(model: Any, implementation: str) -> Any:
    other = copy.deepcopy(model)
    other.set_attn_implementation(implementation)
    return other
