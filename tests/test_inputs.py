"""Inputs that models run on, whatever they read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from conftest import snapshot, tiny_model
from pathprune.discovery.dummy_inputs import example_inputs
from pathprune.errors import UnsupportedModelError

TEXT = {"vocab_size": 60, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
WHISPER = {
    "vocab_size": 60,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_source_positions": 10,
    "pad_token_id": 0,
    "decoder_start_token_id": 1,
}
QWEN_VISION = {"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "patch_size": 4}

# class, configuration, and the shape of each input: what it reads is a model's to say, so shapes are spelled out.
CASES: dict[str, tuple[str, Any, dict[str, tuple[int, ...]]]] = {
    "text": ("BertModel", {**TEXT}, {"input_ids": (2, 8), "attention_mask": (2, 8)}),
    "encoder and decoder": (
        "T5Model",
        {"vocab_size": 60, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2},
        {"input_ids": (2, 8), "attention_mask": (2, 8), "decoder_input_ids": (2, 8)},
    ),
    "picture": ("ViTModel", VISION, {"pixel_values": (2, 3, 32, 32)}),
    "two towers": (
        "CLIPModel",
        {"text_config": TEXT, "vision_config": VISION, "projection_dim": 16},
        {"input_ids": (2, 8), "attention_mask": (2, 8), "pixel_values": (2, 3, 32, 32)},
    ),
    "placeholders": (  # 16 patches of one picture in each text
        "LlavaForConditionalGeneration",
        {
            "text_config": {"model_type": "llama", **TEXT},
            "vision_config": {"model_type": "clip_vision_model", **VISION},
            "image_token_index": 59,
        },
        {"input_ids": (2, 24), "attention_mask": (2, 24), "pixel_values": (2, 3, 32, 32)},
    ),
    "patches with a grid": (  # 4 by 4 patches, of which 2 by 2 make a token; one token opens the picture
        "Qwen2VLForConditionalGeneration",
        {
            "text_config": {
                **TEXT,
                "num_key_value_heads": 2,
                "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1]},
            },
            "vision_config": QWEN_VISION,
            "image_token_id": 57,
            "video_token_id": 56,
            "vision_start_token_id": 58,
        },
        {"input_ids": (2, 13), "attention_mask": (2, 13), "pixel_values": (32, 96), "image_grid_thw": (2, 3)},
    ),
    "spectrogram": (
        "WhisperModel",
        WHISPER,
        {"input_features": (2, 80, 20), "attention_mask": (2, 20), "decoder_input_ids": (2, 8)},
    ),
    "waveform": (
        "Wav2Vec2Model",
        {
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 24,
            "conv_dim": (8, 8),
            "conv_stride": (4, 4),
            "conv_kernel": (4, 4),
            "num_feat_extract_layers": 2,
            "num_conv_pos_embeddings": 8,
            "num_conv_pos_embedding_groups": 2,
        },
        {"input_values": (2, 256)},
    ),
    "video": (
        "VideoMAEModel",
        {**VISION, "num_frames": 4, "tubelet_size": 2},
        {"pixel_values": (2, 4, 3, 32, 32)},
    ),
    "series": (
        "PatchTSTModel",
        {
            "d_model": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "ffn_dim": 24,
            "num_input_channels": 3,
            "context_length": 32,
            "patch_length": 4,
            "patch_stride": 4,
        },
        {"past_values": (2, 32, 3)},
    ),
}


@pytest.fixture(params=list(CASES))
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, dict[str, tuple[int, ...]]]:
    name, entries, shapes = CASES[request.param]
    cls = getattr(transformers, name)
    return cls(cls.config_class(**entries)), shapes


def test_each_kind_of_model_gets_what_it_reads(case: tuple[nn.Module, dict[str, tuple[int, ...]]]) -> None:
    model, shapes = case
    inputs = example_inputs(model.double())
    tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
    assert {name: tuple(value.shape) for name, value in tensors.items() if name in shapes} == shapes
    assert {value.dtype for value in tensors.values() if value.is_floating_point()} <= {torch.float64}
    model.eval()(**inputs)


def test_the_second_text_ends_in_padding() -> None:
    mask = example_inputs(tiny_model("bert"))["attention_mask"]
    assert mask[0].all()
    assert mask[1].tolist() == [1] * 6 + [0] * 2


def test_words_are_no_special_tokens() -> None:
    special: dict[str, Any] = {"bos_token_id": 20, "eos_token_id": 22, "pad_token_id": 24}
    ids = example_inputs(tiny_model("llama", **special))["input_ids"]
    assert not set(ids.unique().tolist()) & set(special.values())


def test_the_model_is_left_as_it_was() -> None:
    model = tiny_model("bert").train()
    before = snapshot(model)
    example_inputs(model)
    assert snapshot(model) == before
    assert model.training


def test_a_batch_of_any_size() -> None:
    assert example_inputs(tiny_model("bert"), batch=5)["input_ids"].shape[0] == 5


def test_a_module_of_any_other_library_gets_pictures() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x)

    inputs = example_inputs(Net())
    assert inputs["x"].shape == (2, 3, 224, 224)


def test_no_input_fits() -> None:
    class Odd(nn.Module):
        def forward(self, one: Tensor, other: Tensor) -> Tensor:
            return one + other

    with pytest.raises(
        UnsupportedModelError, match=r"pass inputs=\.\.\., keyword arguments of its forward\(one, other\)"
    ):
        example_inputs(Odd())
