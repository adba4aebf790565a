"""What stands between the maps of a pair is followed exactly, or the pair is refused by name.

Each mechanism is altered in the dense model. The alteration must show in the masked model, on units and heads
that are not the first ones (where a slice that forgot which ones it kept would still be right), and the sliced
model must be exact before and after it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import nn

from building import Subject, build, gap, pairs_of, run, subject_of
from conftest import randomise
from pathprune.errors import MismatchError
from pathprune.family.pair_list import PairList
from pathprune.family.selection import Selection
from pathprune.transform.masks import masked
from pathprune.transform.slicing import slice_model
from subjects import BERT, SEQ2SEQ, ids, padding

EXACT = 1e-9
VISIBLE = 1e-3


def others(pairs: PairList) -> Selection:
    """All heads but the first, and not their first units: every second one, or the last half."""
    keep = {}
    for pair in pairs:
        mask = np.zeros(pair.shape, dtype=bool)
        heads = slice(int(pair.groups > 1 and not pair.stacked), None)  # no expert leaves alone
        mask[heads, slice(1, None, 2) if pair.kind == "qk" else slice(pair.units // 2, None)] = True
        keep[pair.name] = mask
    return Selection(pairs, keep)


def every(model: nn.Module, suffix: str) -> list[Any]:
    """Modules and parameters whose names end so."""
    named = [*model.named_modules(), *model.named_parameters(), *model.named_buffers()]
    found = [part for name, part in named if name == suffix or name.endswith(f".{suffix}")]
    assert found, suffix
    return found


def flip(suffix: str, axis: int = 0) -> Callable[[Any], None]:
    def alter(model: Any) -> None:
        for tensor in every(model, suffix):
            tensor.data = tensor.data.flip(axis)

    return alter


def negate(suffix: str) -> Callable[[Any], None]:
    def alter(model: Any) -> None:
        for tensor in every(model, suffix):
            tensor.data = -tensor.data

    return alter


def assign(suffix: str, **attributes: Any) -> Callable[[Any], None]:
    def alter(model: Any) -> None:
        for module in every(model, suffix):
            for name, value in attributes.items():
                assert hasattr(module, name)
                setattr(module, name, value)

    return alter


def configure(**settings: Any) -> Callable[[Any], None]:
    def alter(model: Any) -> None:
        for name, value in settings.items():
            assert getattr(model.config, name) != value
            setattr(model.config, name, value)

    return alter


def reversed_slopes(model: Any) -> None:
    """ALiBi's biases, head by head, in reverse."""
    build_alibi = model.transformer.build_alibi_tensor

    def flipped(attention_mask: Any, heads: int, *args: Any, **kwargs: Any) -> Any:
        alibi = build_alibi(attention_mask, heads, *args, **kwargs)
        return alibi.unflatten(0, (-1, heads)).flip(1).flatten(0, 1)

    model.transformer.build_alibi_tensor = flipped


MECHANISMS: dict[str, tuple[str, Callable[[Any], None]]] = {
    "rotary embedding": ("llama", flip("inv_freq")),
    "rotary embedding of a part of the head": ("phi", flip("inv_freq")),
    "rotary embedding of neighbours": ("cohere", flip("inv_freq")),
    "rotary embedding, interleaved maps": ("gpt-neox", flip("inv_freq")),
    "rotary embedding of patches": ("dinov3", flip("inv_freq")),
    "rotary embedding of images and text": ("qwen2-vl", flip("inv_freq")),
    "grouped queries": ("llama", flip("k_proj.weight")),
    "QK-norm": ("qwen3", flip("k_norm.weight")),
    "QK-norm over all heads": ("olmo2", flip("q_norm.weight")),
    "ALiBi": ("bloom", reversed_slopes),
    "relative position bias": ("t5", flip("relative_attention_bias.weight", 1)),
    "relative position bias in windows": ("swin", flip("relative_position_bias_table", 1)),
    "relative position bias of patches": ("beit", flip("relative_position_bias_table", 1)),
    "continuous position bias": ("swinv2", negate("continuous_position_bias_mlp.2.weight")),
    "disentangled positions": ("deberta-v2", flip("rel_embeddings.weight")),
    "windows": ("mistral", configure(sliding_window=7)),
    "windows on both sides": ("modernbert", configure(sliding_window=6)),
    "cross attention": ("bart", negate("encoder_attn.k_proj.weight")),
    "cross attention with images": ("blip caption", negate("crossattention.self.key.weight")),
    "LayerScale": ("dinov2", negate("layer_scale1.lambda1")),
    "parallel blocks": ("gpt-neox", assign("layers.1", use_parallel_residual=False)),
    "soft-capping": ("gemma2", assign("self_attn", attn_logit_softcapping=0.5)),
    "a scale of its own": ("gemma2", assign("self_attn", scaling=2.0)),
    "attention sinks": ("gpt-oss", flip("sinks")),
    "temperature by head": ("swinv2", flip("logit_scale")),
    "shared layers": ("albert", negate("attention.key.weight")),
    "experts": ("mixtral", flip("mlp.gate.weight")),
}


@pytest.mark.parametrize("name", MECHANISMS)
def test_a_sliced_model_follows(name: str) -> None:
    row, alter = MECHANISMS[name]
    subject = subject_of(row)
    other = copy.deepcopy(subject.model)
    alter(other)
    altered = replace(subject, model=other, pairs=pairs_of(other, subject.inputs))
    assert list(altered.pairs) == list(subject.pairs)
    found = []
    for case in (subject, altered):
        selection = others(case.pairs)
        with masked(case.model, selection):
            found.append(run(case.model, case.inputs, rounded=False))
        assert gap(run(slice_model(case.model, selection), case.inputs, rounded=False), found[-1]) < EXACT
    assert gap(found[1], found[0]) > VISIBLE


def tied(row: str, one: str, other: str) -> tuple[Subject, Any]:
    subject = subject_of(row)
    model = copy.deepcopy(subject.model)
    model.get_submodule(one).weight = model.get_submodule(other).weight
    return subject, model


@pytest.mark.parametrize(
    ("row", "one", "other"),
    [
        ("bert", "bert.encoder.layer.0.attention.self.query", "bert.encoder.layer.0.attention.self.key"),
        ("bert", "bert.encoder.layer.0.intermediate.dense", "bert.encoder.layer.1.intermediate.dense"),
        ("llama", "model.layers.0.mlp.up_proj", "model.layers.0.mlp.gate_proj"),
        ("llama", "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"),
        ("llama", "model.layers.1.self_attn.o_proj", "model.layers.0.self_attn.o_proj"),
        ("gpt2", "transformer.h.0.attn.c_attn", "transformer.h.1.attn.c_attn"),
        ("opt", "model.decoder.layers.0.fc2", "model.decoder.layers.1.fc2"),
    ],
)
def test_maps_tied_to_other_modules_are_refused_by_name(row: str, one: str, other: str) -> None:
    subject, model = tied(row, one, other)
    pairs = pairs_of(model, subject.inputs)
    offered = {slot.module for pair in pairs for slot in pair.slots}
    assert not {one, other} & offered
    assert any(
        map_ in reason and "shares its weight" in reason for map_ in (one, other) for reason in pairs.refused.values()
    )
    tied_blocks = {pair.block for pair in subject.pairs if {one, other} & {slot.module for slot in pair.slots}}
    assert {pair.name for pair in subject.pairs if pair.block not in tied_blocks} <= {pair.name for pair in pairs}


@pytest.mark.parametrize("row", ["bert", "opt", "t5", "gemma3", "bloom"])
def test_tied_embeddings_stay_tied(row: str) -> None:
    subject = subject_of(row)
    small = slice_model(subject.model, others(subject.pairs))
    for model in (subject.model, small, copy.deepcopy(small)):
        assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


def test_layers_that_share_their_weights_are_pruned_together() -> None:
    subject = subject_of("albert")
    calls = build("albert")[1].config.num_hidden_layers
    assert len({pair.block for pair in subject.pairs}) < 2 * calls
    small = slice_model(subject.model, others(subject.pairs))
    for pair in subject.pairs:
        for slot in pair.slots:
            assert (
                small.get_submodule(slot.module).weight.numel()
                < subject.model.get_submodule(slot.module).weight.numel()
            )


def test_dropout_acts_in_a_sliced_model_in_training_only() -> None:
    subject = subject_of("bert")
    small = slice_model(subject.model, others(subject.pairs))
    assert gap(run(small, subject.inputs), run(small, subject.inputs)) == 0
    small.train()
    seeds = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        seeds.append(run(small, subject.inputs))
    assert gap(seeds[0], seeds[1]) == 0
    assert gap(seeds[0], seeds[2]) > VISIBLE


@pytest.mark.parametrize("row", ["llama", "opt", "mistral", "gemma2", "bloom"])
def test_pairs_do_not_depend_on_padding(row: str) -> None:
    """Padding on the left, as decoders have it: tokens that attend to nothing, or to one another, prove nothing."""
    subject = subject_of(row)
    padded = {**subject.inputs, "attention_mask": padding(subject.inputs["input_ids"], left=True)}
    pairs = pairs_of(subject.model, padded)
    assert list(pairs) == list(subject.pairs)
    assert pairs.refused == subject.pairs.refused


# For more than 14 tokens.
BLOCKS: dict[str, Any] = {"attention_type": "block_sparse", "block_size": 2, "num_random_blocks": 1}


@pytest.mark.parametrize(
    "config",
    [
        transformers.BigBirdConfig(**BERT, **BLOCKS),
        transformers.BigBirdPegasusConfig(**{**SEQ2SEQ, "max_position_embeddings": 64}, **BLOCKS),
    ],
    ids=lambda config: config.model_type,
)
@pytest.mark.parametrize("found", ["short", "long"])
def test_attention_whose_code_is_replaced_at_run_time(config: Any, found: str, tmp_path: Path) -> None:
    """Short inputs replace BigBird's block-sparse attention for good, with modules in the dense sizes."""
    torch.manual_seed(0)
    dense = randomise(transformers.AutoModel.from_config(config, dtype=torch.float64).eval())
    inputs = {"short": {"input_ids": ids(length=9)}, "long": {"input_ids": ids(length=24)}}
    pairs = pairs_of(copy.deepcopy(dense), inputs[found])
    encoders = [pair for pair in pairs if pair.kind != "mlp" and "decoder" not in pair.name]
    assert len(encoders) == 4
    selection = others(pairs)
    small = slice_model(dense, selection)
    small.save_pretrained(tmp_path)
    loaded = transformers.AutoModel.from_pretrained(tmp_path, dtype=torch.float64).eval()
    for case in ("long", "short", "long"):  # the last with full attention
        with masked(dense, selection):
            expected = run(dense, inputs[case], rounded=False)
        assert gap(expected, run(dense, inputs[case], rounded=False)) > VISIBLE
        for sliced in (small, loaded):
            assert gap(run(sliced, inputs[case], rounded=False), expected) < EXACT


@pytest.mark.parametrize(
    ("row", "tower", "model", "folders"),
    [
        ("clip", "vision_model", "CLIPVisionModel", ("whole", "again", "alone")),
        ("clip", "vision_model", "CLIPVisionModelWithProjection", ("whole", "again")),
        ("clip", "text_model", "CLIPTextModel", ("whole", "again", "alone")),
        ("siglip", "vision_model", "SiglipVisionModel", ("whole", "again", "alone")),
    ],
)
def test_a_tower_loads_alone(row: str, tower: str, model: str, folders: tuple[str, ...], tmp_path: Path) -> None:
    """From the folder of the whole model, where transformers loads it from the dense one's; and from its own."""
    subject = subject_of(row)
    small = slice_model(subject.model, others(subject.pairs))
    part = small.get_submodule(tower)
    small.save_pretrained(tmp_path / "whole")
    transformers.AutoModel.from_pretrained(tmp_path / "whole", dtype=torch.float64).save_pretrained(tmp_path / "again")
    part.save_pretrained(tmp_path / "alone")
    name = "pixel_values" if tower == "vision_model" else "input_ids"
    inputs = {name: subject.inputs[name]}
    settings = {"projection_dim": 17} if model.endswith("Projection") else {}  # the whole model's own
    for folder in folders:
        loaded = getattr(transformers, model).from_pretrained(tmp_path / folder, dtype=torch.float64, **settings)
        assert gap(run(getattr(loaded, "vision_model", loaded).eval(), inputs), run(part, inputs)) < EXACT


@pytest.mark.parametrize("row", ["mixtral", "gpt-oss"])
def test_experts_that_their_kernel_cannot_read_are_refused_by_name(row: str, tmp_path: Path) -> None:
    """transformers' default, grouped_mm, wants rows of 16 bytes: four numbers in float32, eight in bfloat16."""
    subject = subject_of(row)
    dense = subject.row.config()
    dense.intermediate_size, dense.hidden_size = 20, 32
    model = getattr(transformers, subject.row.model)._from_config(dense, dtype=torch.float32).eval()
    pairs = pairs_of(model, subject.inputs)

    def experts(width: int) -> Selection:
        keep = {pair.name: np.ones(pair.shape, dtype=bool) for pair in pairs}
        for pair in pairs:
            keep[pair.name][:, width if pair.stacked else None :] = False
        return Selection(pairs, keep)

    with pytest.raises(MismatchError, match=r"experts\.\w+ would be \d+ wide; .* multiples of 4 in torch.float32"):
        slice_model(model, experts(13))
    small = slice_model(model, experts(12))
    run(small, subject.inputs)
    small.save_pretrained(tmp_path)
    load = getattr(transformers, subject.row.model).from_pretrained
    with pytest.raises(MismatchError, match=r"multiples of 8 in torch.bfloat16. .* experts_implementation"):
        load(tmp_path, dtype=torch.bfloat16)
    run(load(tmp_path, dtype=torch.bfloat16, experts_implementation="eager"), subject.inputs)
    model.set_experts_implementation("eager")
    run(slice_model(model, experts(13)), subject.inputs)
