"""What the builders of inputs share: a model's parameters, its configuration, and texts."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

WORDS = 8  # tokens of a text
SIDE = 64  # pixels of a picture whose size the configuration leaves open
FRAMES = 64  # frames of a spectrogram whose length the configuration leaves open

TOKEN_SUFFIXES = ("token_id", "token_ids", "token_index", "_patch_id", "_tokens")
PLACEHOLDERS = {
    "image": ("image_token_id", "image_token_index", "image_patch_id", "im_patch_id", "media_placeholder_token_id"),
    "video": ("video_token_id", "video_token_index"),
    "audio": ("audio_token_id", "audio_token_index", "audio_token"),
}
OPENERS = {
    "image": ("vision_start_token_id", "image_start_token_id", "boi_token_id", "boi_token_index", "image_bos_token_id"),
    "video": ("vision_start_token_id", "video_start_token_id"),
    "audio": ("audio_bos_token_id", "audio_start_token_id", "boa_token_id"),
}
MODALITY_TYPES = {"image": 1, "video": 2, "audio": 3}


VISION = "vision image visual vit encoder backbone"

SOUND = "audio speech encoder input"


Inputs = dict[str, Any]


def parameters(module: nn.Module) -> dict[str, inspect.Parameter]:
    kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return {name: p for name, p in inspect.signature(module.forward).parameters.items() if p.kind not in kinds}


def _towers(config: Any) -> list[tuple[str, Any]]:
    """A configuration and all inside it, outermost first, by the dotted names that lead there."""
    found, queue = [], [("", config)]
    while queue:
        name, one = queue.pop(0)
        found.append((name, one))
        entries = vars(one).items() if hasattr(one, "__dict__") else ()
        queue += [(f"{name}.{key}", value) for key, value in entries if hasattr(value, "to_dict")]
    return found


class InputBuilder:
    """Makes the tensors of one model's inputs."""

    def __init__(self, model: nn.Module, batch: int) -> None:
        self.model, self.batch = model, batch
        self.config: Any = getattr(model, "config", None)
        self.parameters = parameters(model)
        self.required = [name for name, p in self.parameters.items() if p.default is inspect.Parameter.empty]
        self.towers = _towers(self.config) if self.config is not None else []
        tensor = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))
        self.device, self.dtype = tensor.device, tensor.dtype
        self.generator = torch.Generator().manual_seed(0)
        self.side, self.words, self.masked, self.bins, self.with_text = SIDE, WORDS, True, 80, True
        self.stated: dict[str, int] = {}
        self.codebooks: str | None = None
        self.extra: str | None = None

    def entry(self, *names: str, near: str = "", default: Any = None) -> Any:
        """The first of these configuration entries that has a value; towers whose name holds ``near`` come first."""
        close = [t for name, t in self.towers if near and any(n in name for n in near.split())]
        for tower in close + [t for _, t in self.towers]:
            for name in names:
                value = getattr(tower, name, None)
                if value is not None:
                    return value
        return default

    def noise(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.device, self.dtype)

    def full(self, value: int, *shape: int) -> Tensor:
        return torch.full(shape, value, dtype=torch.long, device=self.device)

    # Text.

    def books(self) -> int:
        """Codebooks of a model that reads several tokens at a time; 0 for others."""
        number = self.entry("num_codebooks", near="decoder")
        if number is None and not self.picture_name():
            number = self.entry("num_channels", near="decoder")
        return number if isinstance(number, int) else 0

    def vocabulary(self, near: str = "") -> int:
        size = self.entry("vocab_size", near=near)
        if not isinstance(size, int):
            tables = (m.num_embeddings for m in self.model.modules() if isinstance(m, nn.Embedding))
            size = next(tables, 32)
        return size

    def ids(self, length: int, vocabulary: int, codebooks: str | None = None) -> Tensor:
        """Seven ordinary words in turn: from the middle of the vocabulary, no special tokens.

        Returns:
            (batch, length); with codebooks, (batch, length, books) or (batch x books, length).
        """
        special = set()
        for _, tower in self.towers:
            for key, value in vars(tower).items():
                if key.endswith(TOKEN_SUFFIXES):
                    special |= set(value) if isinstance(value, list | tuple) else {value}
        middle = [i % vocabulary for i in range(vocabulary // 2, vocabulary // 2 + vocabulary)]
        words = [i for i in middle if i not in special][:7] or [0]
        shape: tuple[int, ...] = (self.batch, length)
        if codebooks:
            shape = (*shape, self.books()) if codebooks == "last" else (self.batch * self.books(), length)
        rows = torch.arange(math.prod(shape), device=self.device).reshape(shape)
        return torch.tensor(words, device=self.device)[rows % len(words)]

    def text(self, others: Inputs) -> Inputs:
        if self.codebooks and "decoder_input_ids" not in self.parameters:
            return {"input_ids": self.ids(self.words, self.vocabulary("text decoder"), self.codebooks)}
        ids = self.ids(self.words, self.vocabulary("text decoder"))
        mask = torch.ones_like(ids)
        types = torch.zeros_like(ids)
        if not others:
            mask[1:, self.words - 2 :] = 0
        for kind in ("image", "video", "audio"):
            token = self.entry(*PLACEHOLDERS[kind])
            count = self.placeholders(kind, others) if isinstance(token, int) else 0
            if count:
                opener = self.entry(*OPENERS[kind])
                start = [opener] if isinstance(opener, int) else []
                run = torch.tensor([*start, *[token] * count], device=self.device).expand(self.batch, -1)
                ids = torch.cat([ids[:, :1], run, ids[:, 1:]], dim=1)
                marks = torch.full_like(run, MODALITY_TYPES[kind])
                marks[:, : len(start)] = 0
                types = torch.cat([types[:, :1], marks, types[:, 1:]], dim=1)
        mask = mask if mask.shape == ids.shape else torch.ones_like(ids)
        inputs = {"input_ids": ids, "attention_mask": mask, "mm_token_type_ids": types}
        return {name: tensor for name, tensor in inputs.items() if name in self.parameters}

    def placeholders(self, kind: str, inputs: Inputs) -> int:
        """How many tokens of a text stand for one picture or recording: as many as the model makes features of it."""
        keys = {"image": "pixel_values", "video": "pixel_values_videos", "audio": "input_features input_values"}
        if not any(key in inputs for key in keys[kind].split()):
            return 0
        if kind in self.stated:
            return self.stated[kind]
        methods = [getattr(module, f"get_{kind}_features", None) for module in self.model.modules()]
        for method in filter(None, methods):
            accepted = inspect.signature(method).parameters
            try:
                with torch.no_grad():
                    found = method(**{name: value for name, value in inputs.items() if name in accepted})
            except Exception:
                continue
            if count := rows(found):
                return count // self.batch
        known = self.entry("mm_tokens_per_image", "image_seq_length", "num_image_tokens", "num_query_tokens")
        return known if isinstance(known, int) else 1

    def learn_from(self, error: Exception) -> None:
        """Models of transformers say how many placeholders they want."""
        if found := re.match(r"(image|video|audio) features and .* do not match.*features:? (\d+)", str(error), re.I):
            self.stated[found[1].lower()] = int(found[2]) // self.batch

    # Pictures.

    def picture_name(self) -> str | None:
        """The parameter that takes pictures; a tower that gets its patches from outside calls them hidden states."""
        names = ["pixel_values", "pixel_values_videos", "image", "flattened_patches"]
        names += ["hidden_states"] if "grid_thw" in self.parameters else []
        return next((name for name in names if name in self.parameters), None)

    def channels(self) -> int:
        value = self.entry("num_channels", "in_channels", "in_chans", "num_input_channels", near=VISION, default=3)
        return value if isinstance(value, int) else 3

    def size(self) -> tuple[int, int]:
        size = self.entry("image_size", "img_size", "spec_size", "input_size", "max_img_size", near=VISION)
        if isinstance(size, int) and not size:
            size = None
        height, width = two(size if isinstance(size, int | list | tuple) else self.side)
        least = min(self.entry("scaled_images_ratios", default=[1]))  # the smallest copy must still hold a patch
        return int(height / least), int(width / least)

    def patch(self) -> int:
        size = self.entry("patch_size", "spatial_patch_size", near=VISION, default=16)
        return max(two(size))

    def merge(self) -> int:
        """Patches along a side that become one token."""
        value = self.entry(
            "spatial_merge_size",
            "merge_size",
            "downsample_factor",
            "scale_factor",
            "merge_kernel_size",
            "pooling_kernel_size",
            near=VISION,
        )
        return max(two(value)) if isinstance(value, int | list | tuple) else 1


class DoesNotApply(Exception):
    """The layout is not this model's."""


def two(value: Any) -> tuple[int, int]:
    if isinstance(value, Mapping):
        value = (value["height"], value["width"])
    return (value, value) if isinstance(value, int) else (value[-2], value[-1]) if len(value) > 1 else (value[0],) * 2


def rows(features: Any) -> int:
    """Rows of a model's features, whatever they are wrapped in."""
    pooled = getattr(features, "pooler_output", None)
    if pooled is not None:
        features = pooled
    elif getattr(features, "last_hidden_state", None) is not None:
        features = features.last_hidden_state
    if isinstance(features, Tensor):
        return math.prod(features.shape[:-1])
    if isinstance(features, list | tuple):
        return sum(rows(one) for one in features if isinstance(one, Tensor | list | tuple))
    return 0
