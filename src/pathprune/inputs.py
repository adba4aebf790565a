"""A tiny valid input for any model, from its configuration and the signature of its ``forward``.

What a model reads is told by the names of its parameters: ``input_ids``, ``pixel_values``, ``input_features``
and so on. Where the names leave the layout open (is a picture four- or five-dimensional?), the likely layouts
are tried one after the other, those that exercise most of the model first.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from pathprune.errors import UnsupportedModelError
from pathprune.modes import evaluating

WORDS = 8  # tokens of a text
SIDE = 64  # pixels of a picture whose size the configuration leaves open
GRID = 4  # patches along a side of a picture that comes as patches
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

Inputs = dict[str, Any]


def example_inputs(model: nn.Module, *, batch: int = 2) -> Inputs:
    """A tiny input on which the model runs.

    Args:
        batch: number of texts, pictures or recordings. The second text of a text-only model ends in padding.

    Returns:
        Keyword arguments of ``model.forward``: tensors on the model's device, floating ones in its precision,
        and ``use_cache=False`` where the model has a cache.

    Raises:
        UnsupportedModelError: no input of a known kind runs; the message has the model's error.
    """
    first: Exception | None = None
    with evaluating(model):
        tried = set()
        maker = _Maker(model, batch)
        for inputs in maker.candidates():
            shapes = tuple(
                (name, value.shape if isinstance(value, Tensor) else value) for name, value in inputs.items()
            )
            if shapes in tried:
                continue
            tried.add(shapes)
            try:
                with torch.no_grad(), torch.random.fork_rng(devices=[]):
                    model(**inputs)
            except Exception as error:
                first = first or error
                maker.heed(error)
                continue
            return inputs
    names = ", ".join(_parameters(model))
    reason = f"{type(first).__name__}: {first}" if first else "no parameter of a known kind"
    raise UnsupportedModelError(
        f"{type(model).__name__} does not run on a tiny input made from its configuration ({reason}); "
        f"pass inputs=..., keyword arguments of its forward({names})"
    ) from first


def _parameters(module: nn.Module) -> dict[str, inspect.Parameter]:
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


class _Maker:
    """Makes the tensors of one model's inputs."""

    def __init__(self, model: nn.Module, batch: int) -> None:
        self.model, self.batch = model, batch
        self.config: Any = getattr(model, "config", None)
        self.parameters = _parameters(model)
        self.required = [name for name, p in self.parameters.items() if p.default is inspect.Parameter.empty]
        self.towers = _towers(self.config) if self.config is not None else []
        tensor = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))
        self.device, self.dtype = tensor.device, tensor.dtype
        self.generator = torch.Generator().manual_seed(0)
        self.side, self.words, self.masked, self.bins, self.with_text = SIDE, WORDS, True, 80, True
        self.told: dict[str, int] = {}
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

    def candidates(self) -> Iterator[Inputs]:
        """Inputs to try, the fullest first."""
        if self.config is None or not hasattr(self.config, "to_dict"):
            yield from self.plain_vision(self.model)
            return
        if isinstance(wrapped := getattr(self.model, "timm_model", None), nn.Module):  # its configuration has no sizes
            yield from self.plain_vision(wrapped)
            return
        pictures: list[Any] = PICTURES if self.picture_name() else []
        recordings: list[Any] = RECORDINGS if {"input_features", "input_values"} & self.parameters.keys() else []
        # Everything that the model can read; then without one kind of it; then text alone.
        stages: list[list[tuple[Any, Any]]] = [list(product(pictures or [None], recordings or [None]))]
        if pictures and recordings:
            stages.append([(picture, None) for picture in pictures] + [(None, recording) for recording in recordings])
        if (pictures or recordings) and "input_ids" in self.parameters:
            stages.append([(None, None)])
        main = getattr(self.model, "main_input_name", "input_ids")
        texts = (True, False) if main != "input_ids" and "input_ids" not in self.required else (True,)
        masks, bins = ((True, False), _bins(self)) if recordings else ((True,), [0])
        words = [None] + (["last", "batch"] if self.books() else [])
        extra = [None, *(name for name in ("encoder_hidden_states", "inputs_embeds") if name in self.parameters)]
        for stage, self.with_text, self.extra, self.codebooks in product(stages, texts, extra, words):
            for (self.side, self.words), self.masked, self.bins in product(((SIDE, WORDS), (224, 64)), masks, bins):
                for picture, recording in stage:
                    try:
                        inputs = self.make(picture, recording)
                    except _DoesNotApply:
                        continue
                    yield inputs
                    if self.told:
                        yield self.make(picture, recording)
                        self.told = {}

    def plain_vision(self, model: nn.Module) -> Iterator[Inputs]:
        """Pictures for a model without a configuration of ``transformers``."""
        cfg = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
        shape = dict(cfg).get("input_size", (3, 224, 224))
        embed = getattr(model, "patch_embed", None)
        size = getattr(embed, "img_size", None)
        name = next(iter(self.parameters))
        if size is not None:
            yield {name: self.noise(self.batch, shape[0], *_two(size))}
        for side in (shape[-1], SIDE):
            yield {name: self.noise(self.batch, shape[0], side, side)}

    def make(self, picture: Any, recording: Any) -> Inputs:
        names = self.parameters
        inputs: Inputs = {}
        if picture is not None:
            inputs |= picture(self)
        if recording is not None:
            inputs |= recording(self)
        for name, maker in OTHERS.items():
            if name in names:
                inputs |= {key: value for key, value in maker(self).items() if key in names}
        if "input_ids" in names and (self.with_text or not inputs):
            inputs |= self.text(inputs)
        if "decoder_input_ids" in names:
            near = "decoder text generator"
            inputs["decoder_input_ids"] = self.ids(self.words, self.vocabulary(near), self.codebooks)
        for name in self.parameters:
            needed = name in self.required or (name == "lang_ids" and self.entry("languages"))
            make = ALWAYS.get(name) or (NEEDED.get(name) if needed else None)
            if make is not None and name not in inputs:
                value = make(self, inputs)
                inputs |= {} if value is None else {name: value}
        if self.extra == "encoder_hidden_states" and self.extra not in inputs:
            inputs[self.extra] = _remembered(self, inputs)
        if self.extra == "inputs_embeds" and inputs.pop("input_ids", None) is not None:
            inputs[self.extra] = _embedded(self, inputs)
        if "use_cache" in names or hasattr(self.config, "use_cache"):
            inputs["use_cache"] = False
        return inputs

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
        if kind in self.told:
            return self.told[kind]
        methods = [getattr(module, f"get_{kind}_features", None) for module in self.model.modules()]
        for method in filter(None, methods):
            accepted = inspect.signature(method).parameters
            try:
                with torch.no_grad():
                    found = method(**{name: value for name, value in inputs.items() if name in accepted})
            except Exception:
                continue
            if count := _rows(found):
                return count // self.batch
        known = self.entry("mm_tokens_per_image", "image_seq_length", "num_image_tokens", "num_query_tokens")
        return known if isinstance(known, int) else 1

    def heed(self, error: Exception) -> None:
        """Models of transformers say how many placeholders they want."""
        if found := re.match(r"(image|video|audio) features and .* do not match.*features:? (\d+)", str(error), re.I):
            self.told[found[1].lower()] = int(found[2]) // self.batch

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
        height, width = _two(size if isinstance(size, int | list | tuple) else self.side)
        least = min(self.entry("scaled_images_ratios", default=[1]))  # the smallest copy must still hold a patch
        return int(height / least), int(width / least)

    def patch(self) -> int:
        size = self.entry("patch_size", "spatial_patch_size", near=VISION, default=16)
        return max(_two(size))

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
        return max(_two(value)) if isinstance(value, int | list | tuple) else 1


class _DoesNotApply(Exception):
    """The layout is not this model's."""


VISION = "vision image visual vit encoder backbone"
SOUND = "audio speech encoder input"


def _two(value: Any) -> tuple[int, int]:
    if isinstance(value, Mapping):
        value = (value["height"], value["width"])
    return (value, value) if isinstance(value, int) else (value[-2], value[-1]) if len(value) > 1 else (value[0],) * 2


def _rows(features: Any) -> int:
    """Rows of a model's features, whatever they are wrapped in."""
    pooled = getattr(features, "pooler_output", None)
    if pooled is not None:
        features = pooled
    elif getattr(features, "last_hidden_state", None) is not None:
        features = features.last_hidden_state
    if isinstance(features, Tensor):
        return math.prod(features.shape[:-1])
    if isinstance(features, list | tuple):
        return sum(_rows(one) for one in features if isinstance(one, Tensor | list | tuple))
    return 0


def _sizes(maker: _Maker) -> Tensor:
    return torch.tensor([list(maker.size())] * maker.batch, device=maker.device)


def _grid_picture(maker: _Maker) -> Inputs:
    """Pictures as one long row of flattened patches, with the grid of each: Qwen-VL and its kin."""
    grid_name = next((n for n in ("image_grid_thw", "grid_thw", "image_grid_hw") if n in maker.parameters), None)
    if grid_name is None:
        raise _DoesNotApply
    side = maker.merge() * 2
    patch, time = maker.patch(), maker.entry("temporal_patch_size", "patch_temporal", near=VISION, default=1)
    flat = maker.channels() * patch * patch * time
    grid = torch.tensor([[1, side, side]] * maker.batch, device=maker.device)
    name = maker.picture_name() or "pixel_values"
    inputs = {name: maker.noise(maker.batch * side * side, flat), grid_name: grid}
    if name == "hidden_states" and "embed_dim" in maker.required:
        raise _DoesNotApply
    for merges in ("merge_sizes", "image_merge_sizes"):
        if merges in maker.parameters:
            inputs[merges] = maker.full(maker.merge(), maker.batch)
    return inputs


def _grid_picture_each(maker: _Maker) -> Inputs:
    """The same, picture by picture: (batch, patches, channels x height x width)."""
    inputs = _grid_picture(maker)
    name = maker.picture_name() or "pixel_values"
    return {**inputs, name: inputs[name].unflatten(0, (maker.batch, -1))}


def _grid_patches(maker: _Maker) -> Inputs:
    """The same with patches left as small pictures: (patches, channels, height, width)."""
    inputs = _grid_picture(maker)
    name = maker.picture_name() or "pixel_values"
    rows, patch = inputs[name].shape[0], maker.patch()
    return {**inputs, name: maker.noise(rows, maker.channels(), patch, patch)}


def _patch_row(maker: _Maker) -> Inputs:
    """Pictures as rows of flattened patches: (batch, patches, channels x height x width), with shapes or positions."""
    name = maker.picture_name()
    side, patch = maker.merge() * 2, maker.patch()
    size = maker.entry("image_size", near=VISION)
    if size and "spatial_shapes" not in maker.parameters:
        side = _two(size)[0] // patch
    count = side * side
    flat = maker.channels() * patch * patch
    inputs: Inputs = {}
    if name == "flattened_patches":  # Pix2Struct: row and column, counted from 1, before the pixels
        rows = torch.cartesian_prod(torch.arange(1.0, side + 1), torch.arange(1.0, side + 1)).to(maker.noise(1))
        return {name: torch.cat([rows.expand(maker.batch, -1, -1), maker.noise(maker.batch, count, flat)], dim=-1)}
    if "spatial_shapes" in maker.parameters:
        inputs["spatial_shapes"] = torch.tensor([[side, side]] * maker.batch, device=maker.device)
        if "pixel_attention_mask" in maker.parameters:
            inputs["pixel_attention_mask"] = maker.full(1, maker.batch, count)
    for positions in ("pixel_position_ids", "image_position_ids"):
        if positions in maker.parameters:
            places = torch.cartesian_prod(torch.arange(side), torch.arange(side)).to(maker.device)
            inputs[positions] = places.expand(maker.batch, -1, -1).contiguous()
    return {name or "pixel_values": maker.noise(maker.batch, count, flat), **inputs}


def _tiles(maker: _Maker) -> Inputs:
    """Several pictures, or tiles of one, each: (batch, number, channels, height, width)."""
    inputs: Inputs = {}
    number = 1
    if "image_sizes" in maker.parameters:
        inputs["image_sizes"] = _sizes(maker)
        # A picture is cut into tiles of the least grid that it fits, and comes once more as a whole.
        grids = [rows * columns for rows, columns in maker.entry("image_grid_pinpoints", default=[])]
        area = inputs["image_sizes"][0].prod().item()
        number = min((grid for grid in grids if grid > area), default=area) // area + 1 if grids else 1
    shape = (maker.channels(), *maker.size())
    name = maker.picture_name() or "pixel_values"
    if "aspect_ratio_ids" in maker.parameters:
        tiles = maker.entry("max_num_tiles", near=VISION, default=1)
        inputs["aspect_ratio_ids"] = maker.full(1, maker.batch, 1)
        inputs["aspect_ratio_mask"] = maker.full(1, maker.batch, 1, tiles)
        if "cross_attention_mask" in maker.parameters:
            inputs["cross_attention_mask"] = maker.full(1, maker.batch, maker.words, 1, tiles)
        return {name: maker.noise(maker.batch, 1, tiles, *shape), **inputs}
    return {name: maker.noise(maker.batch, number, *shape), **inputs}


def _masked_tiles(maker: _Maker) -> Inputs:
    """The same, with a mask over the pictures of a sequence."""
    if "pixel_attention_mask" not in maker.parameters:
        raise _DoesNotApply
    inputs = _tiles(maker)
    return {
        **inputs,
        "pixel_attention_mask": maker.full(1, *inputs[maker.picture_name() or "pixel_values"].shape[:2]).bool(),
    }


def _strip(maker: _Maker) -> Inputs:
    """Patches of all pictures in one strip: (1, channels, patch, patches x patch), with the grids."""
    if "target_sizes" not in maker.parameters:
        raise _DoesNotApply
    patch = maker.patch()
    name = maker.picture_name() or "pixel_values"
    grids = torch.full((maker.batch, 2), GRID, device=maker.device)
    return {name: maker.noise(1, maker.channels(), patch, maker.batch * GRID**2 * patch), "target_sizes": grids}


def _pairs_of_pictures(maker: _Maker) -> Inputs:
    """Two pictures to match: (batch, 2, channels, height, width)."""
    return {maker.picture_name() or "pixel_values": maker.noise(maker.batch, 2, maker.channels(), *maker.size())}


def _picture(maker: _Maker) -> Inputs:
    """One picture: (batch, channels, height, width)."""
    height, width = maker.size()
    if "prompt_pixel_values" in maker.parameters:
        height //= 2  # the other half is the prompt's
    return {maker.picture_name() or "pixel_values": maker.noise(maker.batch, maker.channels(), height, width)}


def _picture_with_size(maker: _Maker) -> Inputs:
    """The same, and its height and width."""
    if "image_sizes" not in maker.parameters:
        raise _DoesNotApply
    return {**_picture(maker), "image_sizes": _sizes(maker)}


def _clip(maker: _Maker) -> Inputs:
    """A video as the model's main input: (batch, frames, channels, height, width)."""
    name = maker.picture_name() or "pixel_values"
    frames = maker.entry("num_frames", "frames_per_clip", near=VISION, default=4 if "video" in name else None)
    if not isinstance(frames, int):
        raise _DoesNotApply
    return {name: maker.noise(maker.batch, frames, maker.channels(), *maker.size())}


def _loose_frames(maker: _Maker) -> Inputs:
    """The frames of videos one below the other: (batch x frames, channels, height, width)."""
    frames = maker.entry("num_frames", near=VISION)
    if not isinstance(frames, int):
        raise _DoesNotApply
    return {maker.picture_name() or "pixel_values": maker.noise(maker.batch * frames, maker.channels(), *maker.size())}


def _grid_patches_in_a_batch(maker: _Maker) -> Inputs:
    """Patches as small pictures of one long sequence: (1, patches, channels, height, width)."""
    inputs = _grid_patches(maker)
    name = maker.picture_name() or "pixel_values"
    return {**inputs, name: inputs[name][None]}


PICTURES = [
    _grid_picture,
    _grid_picture_each,
    _grid_patches_in_a_batch,
    _grid_patches,
    _clip,
    _picture,
    _picture_with_size,
    _tiles,
    _masked_tiles,
    _strip,
    _pairs_of_pictures,
    _patch_row,
    _loose_frames,
]


def _bins(maker: _Maker) -> list[int]:
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


def _sound_mask(maker: _Maker, length: int) -> Inputs:
    if not maker.masked:
        return {}
    names = ("input_features_mask", "feature_attention_mask", "padding_mask")
    name = next((n for n in names if n in maker.parameters), None)
    if name is None and "input_ids" not in maker.parameters and "attention_mask" in maker.parameters:
        name = "attention_mask"
    return {} if name is None else {name: maker.full(1, maker.batch, length)}


def _spectrogram_of_whisper(maker: _Maker) -> Inputs:
    """(batch, mel bins, frames), frames given by the positions of the encoder."""
    positions = maker.entry("max_source_positions", near=SOUND)
    if "input_features" not in maker.parameters or not isinstance(positions, int):
        raise _DoesNotApply
    return {
        "input_features": maker.noise(maker.batch, maker.bins, 2 * positions),
        **_sound_mask(maker, 2 * positions),
    }


def _spectrogram(maker: _Maker) -> Inputs:
    """(batch, frames, mel bins)."""
    name = "input_features" if "input_features" in maker.parameters else "input_values"
    frames = FRAMES
    if name == "input_values":
        length = maker.entry("max_length")
        if not (isinstance(length, int) and maker.entry("num_mel_bins")):
            raise _DoesNotApply
        frames = length
    return {name: maker.noise(maker.batch, frames, maker.bins), **_sound_mask(maker, frames)}


def _spectrogram_turned(maker: _Maker) -> Inputs:
    """(batch, mel bins, frames)."""
    if "input_features" not in maker.parameters:
        raise _DoesNotApply
    frames = 2 * maker.entry("n_window", near=SOUND, default=FRAMES // 2)
    return {"input_features": maker.noise(maker.batch, maker.bins, frames), **_sound_mask(maker, frames)}


def _spectrogram_picture(maker: _Maker) -> Inputs:
    """(batch, 1, frames, mel bins)."""
    if "input_features" not in maker.parameters:
        raise _DoesNotApply
    return {"input_features": maker.noise(maker.batch, 1, FRAMES, maker.bins)}


def _samples(maker: _Maker) -> int:
    strides = maker.entry("conv_stride", "upsampling_ratios", "downsampling_ratios", near=SOUND, default=(320,))
    return 16 * math.prod(strides)


def _waveform(maker: _Maker) -> Inputs:
    """(batch, samples)."""
    if "input_values" not in maker.parameters:
        raise _DoesNotApply
    return {"input_values": maker.noise(maker.batch, _samples(maker))}


def _waveform_channels(maker: _Maker) -> Inputs:
    """(batch, channels, samples)."""
    if "input_values" not in maker.parameters:
        raise _DoesNotApply
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


def _series(maker: _Maker) -> Inputs:
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


def _trajectory(maker: _Maker) -> Inputs:
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


def _width(maker: _Maker, near: str = "") -> int:
    value = maker.entry("hidden_size", "d_model", "embed_dim", "n_embd", near=near, default=64)
    return value if isinstance(value, int) else 64


def _embedded(maker: _Maker, inputs: Inputs) -> Tensor:
    return maker.noise(maker.batch, maker.words, _width(maker))


def _remembered(maker: _Maker, inputs: Inputs) -> Tensor:
    width = maker.entry("encoder_hidden_size", "cross_attention_hidden_size") or _width(maker)
    return maker.noise(maker.batch, maker.words, width)


def _boxes(maker: _Maker, inputs: Inputs) -> Tensor:
    row = torch.tensor([1, 2, 5, 7], device=maker.device)
    return row.expand(*inputs["input_ids"].shape, 4).contiguous()


def _regions(maker: _Maker, name: str) -> Tensor:
    return maker.noise(maker.batch, 4, maker.entry(name))


def _high_resolution(maker: _Maker, inputs: Inputs) -> Tensor | None:
    size = maker.entry("image_size", near="high_res")
    return maker.noise(maker.batch, maker.channels(), *_two(size)) if "pixel_values" in inputs else None


def _spectral_frames(maker: _Maker, inputs: Inputs) -> Tensor:
    bins = maker.entry("model_in_dim", "mel_dim", "num_mel_bins", default=80)
    return maker.noise(maker.batch, FRAMES, bins)


def _places_of_image(maker: _Maker, inputs: Inputs) -> Tensor | None:
    """Marks the tokens that a picture's features replace (Kosmos)."""
    count = maker.entry("latent_query_num")
    if not any(name in inputs for name in ("pixel_values", "flattened_patches")) or not isinstance(count, int):
        return None
    ids = maker.ids(count + maker.words, maker.vocabulary("text"))
    marks = torch.zeros_like(ids)
    marks[:, 1 : count + 1] = 1
    inputs["input_ids"], inputs["attention_mask"] = ids, torch.ones_like(ids)
    return marks


def _seen_images(maker: _Maker, inputs: Inputs) -> Tensor | None:
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
    "inputs_embeds": _embedded,
    "hidden_states": _embedded,
    "query_embeds": _embedded,
    "inputs": _embedded,
    "encoder_hidden_states": _remembered,
    "context": _embedded,
    "spectrogram": _spectral_frames,
    "attention_mask": lambda maker, inputs: maker.full(1, maker.batch, maker.words),
    "qformer_input_ids": lambda maker, inputs: maker.ids(maker.words, maker.vocabulary("qformer")),
    "task_inputs": lambda maker, inputs: maker.ids(maker.entry("task_seq_len"), maker.vocabulary()),
    "prompt_pixel_values": lambda maker, inputs: maker.noise(*inputs["pixel_values"].shape),
    "prompt_masks": lambda maker, inputs: maker.noise(*inputs["pixel_values"].shape),
    "state": lambda maker, inputs: maker.noise(maker.batch, maker.entry("max_state_dim")),
    "lang_ids": lambda maker, inputs: maker.full(0, maker.batch),
}
