"""What models read that is neither text nor picture nor sound, and what some want beside these."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pathprune.discovery.dummy_inputs.builder import FRAMES, InputBuilder, Inputs, two


def _series(builder: InputBuilder) -> Inputs:
    """Values over time: (batch, steps) or, with channels, (batch, steps, channels)."""
    batch, patch = builder.batch, builder.entry("patch_length", default=1)
    steps = builder.entry("context_length", default=16)
    lags = builder.entry("lags_sequence")
    if lags is None and "past_values_padding" in builder.parameters:
        inputs = {
            "past_values": builder.noise(batch, 4 * patch),
            "past_values_padding": builder.full(0, batch, 4 * patch),
        }
        return inputs | ({"freq": builder.full(0, batch, 1)} if "freq" in builder.parameters else {})
    if lags is None:
        return {"past_values": builder.noise(batch, steps, builder.entry("num_input_channels", default=1))}
    steps, ahead = steps + max(lags), builder.entry("prediction_length", default=1)
    features = builder.entry("num_time_features", default=0)
    return {
        "past_values": builder.noise(batch, steps),
        "past_time_features": builder.noise(batch, steps, features),
        "past_observed_mask": torch.ones(batch, steps).to(builder.noise(1)),
        "future_values": builder.noise(batch, ahead),
        "future_time_features": builder.noise(batch, ahead, features),
    }


def _trajectory(builder: InputBuilder) -> Inputs:
    """States, actions and returns of an agent: (batch, steps, ...)."""
    batch, steps = builder.batch, 4
    return {
        "states": builder.noise(batch, steps, builder.entry("state_dim")),
        "actions": builder.noise(batch, steps, builder.entry("act_dim")),
        "rewards": builder.noise(batch, steps, 1),
        "returns_to_go": builder.noise(batch, steps, 1),
        "timesteps": torch.arange(steps, device=builder.device).expand(batch, -1),
        "attention_mask": builder.full(1, batch, steps),
    }


# What a model reads that is neither text nor picture nor sound, by the parameter that tells.
OTHERS: dict[str, Any] = {"past_values": _series, "states": _trajectory}


def _width(builder: InputBuilder, near: str = "") -> int:
    value = builder.entry("hidden_size", "d_model", "embed_dim", "n_embd", near=near, default=64)
    return value if isinstance(value, int) else 64


def embedded(builder: InputBuilder, inputs: Inputs) -> Tensor:
    return builder.noise(builder.batch, builder.words, _width(builder))


def remembered(builder: InputBuilder, inputs: Inputs) -> Tensor:
    width = builder.entry("encoder_hidden_size", "cross_attention_hidden_size") or _width(builder)
    return builder.noise(builder.batch, builder.words, width)


def _boxes(builder: InputBuilder, inputs: Inputs) -> Tensor:
    row = torch.tensor([1, 2, 5, 7], device=builder.device)
    return row.expand(*inputs["input_ids"].shape, 4).contiguous()


def _regions(builder: InputBuilder, name: str) -> Tensor:
    return builder.noise(builder.batch, 4, builder.entry(name))


def _high_resolution(builder: InputBuilder, inputs: Inputs) -> Tensor | None:
    size = builder.entry("image_size", near="high_res")
    return builder.noise(builder.batch, builder.channels(), *two(size)) if "pixel_values" in inputs else None


def _spectral_frames(builder: InputBuilder, inputs: Inputs) -> Tensor:
    bins = builder.entry("model_in_dim", "mel_dim", "num_mel_bins", default=80)
    return builder.noise(builder.batch, FRAMES, bins)


def _places_of_image(builder: InputBuilder, inputs: Inputs) -> Tensor | None:
    """Marks the tokens that a picture's features replace (Kosmos)."""
    count = builder.entry("latent_query_num")
    if not any(name in inputs for name in ("pixel_values", "flattened_patches")) or not isinstance(count, int):
        return None
    ids = builder.ids(count + builder.words, builder.vocabulary("text"))
    marks = torch.zeros_like(ids)
    marks[:, 1 : count + 1] = 1
    inputs["input_ids"], inputs["attention_mask"] = ids, torch.ones_like(ids)
    return marks


def _seen_images(builder: InputBuilder, inputs: Inputs) -> Tensor | None:
    if "pixel_values" not in inputs or builder.entry("cross_layer_interval") is None:
        return None
    return builder.full(1, *inputs["input_ids"].shape, 1)


# Made whenever the model has such a parameter.
ALWAYS: dict[str, Any] = {
    "image_embeds_position_mask": _places_of_image,
    "image_attention_mask": _seen_images,
    "bbox": _boxes,
    "visual_feats": lambda builder, inputs: _regions(builder, "visual_feat_dim"),
    "visual_pos": lambda builder, inputs: _regions(builder, "visual_pos_dim"),
    "decoder_input_values": _spectral_frames,
    "high_res_pixel_values": _high_resolution,
}

# Made where the model cannot do without.
NEEDED: dict[str, Any] = {
    "inputs_embeds": embedded,
    "hidden_states": embedded,
    "query_embeds": embedded,
    "inputs": embedded,
    "encoder_hidden_states": remembered,
    "context": embedded,
    "spectrogram": _spectral_frames,
    "attention_mask": lambda builder, inputs: builder.full(1, builder.batch, builder.words),
    "qformer_input_ids": lambda builder, inputs: builder.ids(builder.words, builder.vocabulary("qformer")),
    "task_inputs": lambda builder, inputs: builder.ids(builder.entry("task_seq_len"), builder.vocabulary()),
    "prompt_pixel_values": lambda builder, inputs: builder.noise(*inputs["pixel_values"].shape),
    "prompt_masks": lambda builder, inputs: builder.noise(*inputs["pixel_values"].shape),
    "state": lambda builder, inputs: builder.noise(builder.batch, builder.entry("max_state_dim")),
    "lang_ids": lambda builder, inputs: builder.full(0, builder.batch),
}
