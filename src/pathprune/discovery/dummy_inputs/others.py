"""What models read that is neither text nor picture nor sound, and what some want beside these."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pathprune.discovery.dummy_inputs.builder import FRAMES, Inputs, Maker, two


def _series(maker: Maker) -> Inputs:
    """Values over time: (batch, steps) or, with channels, (batch, steps, channels)."""
    batch, patch = maker.batch, maker.entry("patch_length", default=1)
    steps = maker.entry("context_length", default=16)
    lags = maker.entry("lags_sequence")
    if lags is None and "past_values_padding" in maker.parameters:
        inputs = {"past_values": maker.noise(batch, 4 * patch), "past_values_padding": maker.full(0, batch, 4 * patch)}
        return inputs | ({"freq": maker.full(0, batch, 1)} if "freq" in maker.parameters else {})
    if lags is None:
        return {"past_values": maker.noise(batch, steps, maker.entry("num_input_channels", default=1))}
    steps, ahead = steps + max(lags), maker.entry("prediction_length", default=1)
    features = maker.entry("num_time_features", default=0)
    return {
        "past_values": maker.noise(batch, steps),
        "past_time_features": maker.noise(batch, steps, features),
        "past_observed_mask": torch.ones(batch, steps).to(maker.noise(1)),
        "future_values": maker.noise(batch, ahead),
        "future_time_features": maker.noise(batch, ahead, features),
    }


def _trajectory(maker: Maker) -> Inputs:
    """States, actions and returns of an agent: (batch, steps, ...)."""
    batch, steps = maker.batch, 4
    return {
        "states": maker.noise(batch, steps, maker.entry("state_dim")),
        "actions": maker.noise(batch, steps, maker.entry("act_dim")),
        "rewards": maker.noise(batch, steps, 1),
        "returns_to_go": maker.noise(batch, steps, 1),
        "timesteps": torch.arange(steps, device=maker.device).expand(batch, -1),
        "attention_mask": maker.full(1, batch, steps),
    }


# What a model reads that is neither text nor picture nor sound, by the parameter that tells.
OTHERS: dict[str, Any] = {"past_values": _series, "states": _trajectory}


def _width(maker: Maker, near: str = "") -> int:
    value = maker.entry("hidden_size", "d_model", "embed_dim", "n_embd", near=near, default=64)
    return value if isinstance(value, int) else 64


def embedded(maker: Maker, inputs: Inputs) -> Tensor:
    return maker.noise(maker.batch, maker.words, _width(maker))


def remembered(maker: Maker, inputs: Inputs) -> Tensor:
    width = maker.entry("encoder_hidden_size", "cross_attention_hidden_size") or _width(maker)
    return maker.noise(maker.batch, maker.words, width)


def _boxes(maker: Maker, inputs: Inputs) -> Tensor:
    row = torch.tensor([1, 2, 5, 7], device=maker.device)
    return row.expand(*inputs["input_ids"].shape, 4).contiguous()


def _regions(maker: Maker, name: str) -> Tensor:
    return maker.noise(maker.batch, 4, maker.entry(name))


def _high_resolution(maker: Maker, inputs: Inputs) -> Tensor | None:
    size = maker.entry("image_size", near="high_res")
    return maker.noise(maker.batch, maker.channels(), *two(size)) if "pixel_values" in inputs else None


def _spectral_frames(maker: Maker, inputs: Inputs) -> Tensor:
    bins = maker.entry("model_in_dim", "mel_dim", "num_mel_bins", default=80)
    return maker.noise(maker.batch, FRAMES, bins)


def _places_of_image(maker: Maker, inputs: Inputs) -> Tensor | None:
    """Marks the tokens that a picture's features replace (Kosmos)."""
    count = maker.entry("latent_query_num")
    if not any(name in inputs for name in ("pixel_values", "flattened_patches")) or not isinstance(count, int):
        return None
    ids = maker.ids(count + maker.words, maker.vocabulary("text"))
    marks = torch.zeros_like(ids)
    marks[:, 1 : count + 1] = 1
    inputs["input_ids"], inputs["attention_mask"] = ids, torch.ones_like(ids)
    return marks


def _seen_images(maker: Maker, inputs: Inputs) -> Tensor | None:
    if "pixel_values" not in inputs or maker.entry("cross_layer_interval") is None:
        return None
    return maker.full(1, *inputs["input_ids"].shape, 1)


# Made whenever the model has such a parameter.
ALWAYS: dict[str, Any] = {
    "image_embeds_position_mask": _places_of_image,
    "image_attention_mask": _seen_images,
    "bbox": _boxes,
    "visual_feats": lambda maker, inputs: _regions(maker, "visual_feat_dim"),
    "visual_pos": lambda maker, inputs: _regions(maker, "visual_pos_dim"),
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
    "attention_mask": lambda maker, inputs: maker.full(1, maker.batch, maker.words),
    "qformer_input_ids": lambda maker, inputs: maker.ids(maker.words, maker.vocabulary("qformer")),
    "task_inputs": lambda maker, inputs: maker.ids(maker.entry("task_seq_len"), maker.vocabulary()),
    "prompt_pixel_values": lambda maker, inputs: maker.noise(*inputs["pixel_values"].shape),
    "prompt_masks": lambda maker, inputs: maker.noise(*inputs["pixel_values"].shape),
    "state": lambda maker, inputs: maker.noise(maker.batch, maker.entry("max_state_dim")),
    "lang_ids": lambda maker, inputs: maker.full(0, maker.batch),
}
