"""Recordings in every layout that models read, and one function for each."""

from __future__ import annotations

import math

from torch import nn

from pathprune.discovery.dummy_inputs.builder import FRAMES, SOUND, DoesNotApply, Inputs, Maker


def frequencies(maker: Maker) -> list[int]:
    """Frequencies of a spectrogram: what the configuration or the sound tower's first map says, or a usual number."""
    names = ("num_mel_bins", "feature_projection_input_dim", "input_feat_per_channel", "feature_size", "input_dim")
    found = [maker.entry(*names, near=SOUND)]
    if stacked := maker.entry("num_stacked_frames", near=SOUND):
        found.insert(0, found[0] * stacked)
    for name, module in maker.model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv1d) and any(word in name for word in SOUND.split()):
            found.append(module.in_features if isinstance(module, nn.Linear) else module.in_channels)
            break
    return list(dict.fromkeys([n for n in found if isinstance(n, int)] + [128, 80]))


def _sound_mask(maker: Maker, length: int) -> Inputs:
    if not maker.masked:
        return {}
    names = ("input_features_mask", "feature_attention_mask", "padding_mask")
    name = next((n for n in names if n in maker.parameters), None)
    if name is None and "input_ids" not in maker.parameters and "attention_mask" in maker.parameters:
        name = "attention_mask"
    return {} if name is None else {name: maker.full(1, maker.batch, length)}


def _spectrogram_of_whisper(maker: Maker) -> Inputs:
    """(batch, mel bins, frames), frames given by the positions of the encoder."""
    positions = maker.entry("max_source_positions", near=SOUND)
    if "input_features" not in maker.parameters or not isinstance(positions, int):
        raise DoesNotApply
    return {
        "input_features": maker.noise(maker.batch, maker.bins, 2 * positions),
        **_sound_mask(maker, 2 * positions),
    }


def _spectrogram(maker: Maker) -> Inputs:
    """(batch, frames, mel bins)."""
    name = "input_features" if "input_features" in maker.parameters else "input_values"
    frames = FRAMES
    if name == "input_values":
        length = maker.entry("max_length")
        if not (isinstance(length, int) and maker.entry("num_mel_bins")):
            raise DoesNotApply
        frames = length
    return {name: maker.noise(maker.batch, frames, maker.bins), **_sound_mask(maker, frames)}


def _spectrogram_turned(maker: Maker) -> Inputs:
    """(batch, mel bins, frames)."""
    if "input_features" not in maker.parameters:
        raise DoesNotApply
    frames = 2 * maker.entry("n_window", near=SOUND, default=FRAMES // 2)
    return {"input_features": maker.noise(maker.batch, maker.bins, frames), **_sound_mask(maker, frames)}


def _spectrogram_picture(maker: Maker) -> Inputs:
    """(batch, 1, frames, mel bins)."""
    if "input_features" not in maker.parameters:
        raise DoesNotApply
    return {"input_features": maker.noise(maker.batch, 1, FRAMES, maker.bins)}


def _samples(maker: Maker) -> int:
    strides = maker.entry("conv_stride", "upsampling_ratios", "downsampling_ratios", near=SOUND, default=(320,))
    return 16 * math.prod(strides)


def _waveform(maker: Maker) -> Inputs:
    """(batch, samples)."""
    if "input_values" not in maker.parameters:
        raise DoesNotApply
    return {"input_values": maker.noise(maker.batch, _samples(maker))}


def _waveform_channels(maker: Maker) -> Inputs:
    """(batch, channels, samples)."""
    if "input_values" not in maker.parameters:
        raise DoesNotApply
    channels = maker.entry("audio_channels", near=SOUND, default=1)
    return {"input_values": maker.noise(maker.batch, channels, _samples(maker))}


RECORDINGS = [
    _spectrogram_of_whisper,
    _spectrogram,
    _spectrogram_turned,
    _waveform,
    _waveform_channels,
    _spectrogram_picture,
]
