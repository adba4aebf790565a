"""Recordings in every layout that models read, and one function for each."""

from __future__ import annotations

import math

from torch import nn

from pathprune.discovery.dummy_inputs.builder import FRAMES, SOUND, DoesNotApply, InputBuilder, Inputs


def frequencies(builder: InputBuilder) -> list[int]:
    """Frequencies of a spectrogram: what the configuration or the sound tower's first map says, or a usual number."""
    names = ("num_mel_bins", "feature_projection_input_dim", "input_feat_per_channel", "feature_size", "input_dim")
    found = [builder.entry(*names, near=SOUND)]
    if stacked := builder.entry("num_stacked_frames", near=SOUND):
        found.insert(0, found[0] * stacked)
    for name, module in builder.model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv1d) and any(word in name for word in SOUND.split()):
            found.append(module.in_features if isinstance(module, nn.Linear) else module.in_channels)
            break
    return list(dict.fromkeys([n for n in found if isinstance(n, int)] + [128, 80]))


def _sound_mask(builder: InputBuilder, length: int) -> Inputs:
    if not builder.masked:
        return {}
    names = ("input_features_mask", "feature_attention_mask", "padding_mask")
    name = next((n for n in names if n in builder.parameters), None)
    if name is None and "input_ids" not in builder.parameters and "attention_mask" in builder.parameters:
        name = "attention_mask"
    return {} if name is None else {name: builder.full(1, builder.batch, length)}


def _spectrogram_of_whisper(builder: InputBuilder) -> Inputs:
    """(batch, mel bins, frames), frames given by the positions of the encoder."""
    positions = builder.entry("max_source_positions", near=SOUND)
    if "input_features" not in builder.parameters or not isinstance(positions, int):
        raise DoesNotApply
    return {
        "input_features": builder.noise(builder.batch, builder.bins, 2 * positions),
        **_sound_mask(builder, 2 * positions),
    }


def _spectrogram(builder: InputBuilder) -> Inputs:
    """(batch, frames, mel bins)."""
    name = "input_features" if "input_features" in builder.parameters else "input_values"
    frames = FRAMES
    if name == "input_values":
        length = builder.entry("max_length")
        if not (isinstance(length, int) and builder.entry("num_mel_bins")):
            raise DoesNotApply
        frames = length
    return {name: builder.noise(builder.batch, frames, builder.bins), **_sound_mask(builder, frames)}


def _spectrogram_turned(builder: InputBuilder) -> Inputs:
    """(batch, mel bins, frames)."""
    if "input_features" not in builder.parameters:
        raise DoesNotApply
    frames = 2 * builder.entry("n_window", near=SOUND, default=FRAMES // 2)
    return {"input_features": builder.noise(builder.batch, builder.bins, frames), **_sound_mask(builder, frames)}


def _spectrogram_picture(builder: InputBuilder) -> Inputs:
    """(batch, 1, frames, mel bins)."""
    if "input_features" not in builder.parameters:
        raise DoesNotApply
    return {"input_features": builder.noise(builder.batch, 1, FRAMES, builder.bins)}


def _samples(builder: InputBuilder) -> int:
    strides = builder.entry("conv_stride", "upsampling_ratios", "downsampling_ratios", near=SOUND, default=(320,))
    return 16 * math.prod(strides)


def _waveform(builder: InputBuilder) -> Inputs:
    """(batch, samples)."""
    if "input_values" not in builder.parameters:
        raise DoesNotApply
    return {"input_values": builder.noise(builder.batch, _samples(builder))}


def _waveform_channels(builder: InputBuilder) -> Inputs:
    """(batch, channels, samples)."""
    if "input_values" not in builder.parameters:
        raise DoesNotApply
    channels = builder.entry("audio_channels", near=SOUND, default=1)
    return {"input_values": builder.noise(builder.batch, channels, _samples(builder))}


RECORDINGS = [
    _spectrogram_of_whisper,
    _spectrogram,
    _spectrogram_turned,
    _waveform,
    _waveform_channels,
    _spectrogram_picture,
]
