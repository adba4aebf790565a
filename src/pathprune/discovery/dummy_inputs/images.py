"""Pictures in every layout that models read, and one function for each."""

from __future__ import annotations

import torch
from torch import Tensor

from pathprune.discovery.dummy_inputs.builder import VISION, DoesNotApply, InputBuilder, Inputs, two

GRID = 4  # patches along a side of a picture that comes as patches


def _sizes(builder: InputBuilder) -> Tensor:
    return torch.tensor([list(builder.size())] * builder.batch, device=builder.device)


def _grid_picture(builder: InputBuilder) -> Inputs:
    """Pictures as one long row of flattened patches, with the grid of each: Qwen-VL and its kin."""
    grid_name = next((n for n in ("image_grid_thw", "grid_thw", "image_grid_hw") if n in builder.parameters), None)
    if grid_name is None:
        raise DoesNotApply
    side = builder.merge() * 2
    patch, time = builder.patch(), builder.entry("temporal_patch_size", "patch_temporal", near=VISION, default=1)
    flat = builder.channels() * patch * patch * time
    grid = torch.tensor([[1, side, side]] * builder.batch, device=builder.device)
    name = builder.picture_name() or "pixel_values"
    inputs = {name: builder.noise(builder.batch * side * side, flat), grid_name: grid}
    if name == "hidden_states" and "embed_dim" in builder.required:
        raise DoesNotApply
    for merges in ("merge_sizes", "image_merge_sizes"):
        if merges in builder.parameters:
            inputs[merges] = builder.full(builder.merge(), builder.batch)
    return inputs


def _grid_picture_each(builder: InputBuilder) -> Inputs:
    """The same, picture by picture: (batch, patches, channels x height x width)."""
    inputs = _grid_picture(builder)
    name = builder.picture_name() or "pixel_values"
    return {**inputs, name: inputs[name].unflatten(0, (builder.batch, -1))}


def _grid_patches(builder: InputBuilder) -> Inputs:
    """The same with patches left as small pictures: (patches, channels, height, width)."""
    inputs = _grid_picture(builder)
    name = builder.picture_name() or "pixel_values"
    rows, patch = inputs[name].shape[0], builder.patch()
    return {**inputs, name: builder.noise(rows, builder.channels(), patch, patch)}


def _patch_row(builder: InputBuilder) -> Inputs:
    """Pictures as rows of flattened patches: (batch, patches, channels x height x width), with shapes or positions."""
    name = builder.picture_name()
    side, patch = builder.merge() * 2, builder.patch()
    size = builder.entry("image_size", near=VISION)
    if size and "spatial_shapes" not in builder.parameters:
        side = two(size)[0] // patch
    count = side * side
    flat = builder.channels() * patch * patch
    inputs: Inputs = {}
    if name == "flattened_patches":  # Pix2Struct: row and column, counted from 1, before the pixels
        rows = torch.cartesian_prod(torch.arange(1.0, side + 1), torch.arange(1.0, side + 1)).to(builder.noise(1))
        return {
            name: torch.cat([rows.expand(builder.batch, -1, -1), builder.noise(builder.batch, count, flat)], dim=-1)
        }
    if "spatial_shapes" in builder.parameters:
        inputs["spatial_shapes"] = torch.tensor([[side, side]] * builder.batch, device=builder.device)
        if "pixel_attention_mask" in builder.parameters:
            inputs["pixel_attention_mask"] = builder.full(1, builder.batch, count)
    for positions in ("pixel_position_ids", "image_position_ids"):
        if positions in builder.parameters:
            places = torch.cartesian_prod(torch.arange(side), torch.arange(side)).to(builder.device)
            inputs[positions] = places.expand(builder.batch, -1, -1).contiguous()
    return {name or "pixel_values": builder.noise(builder.batch, count, flat), **inputs}


def _tiles(builder: InputBuilder) -> Inputs:
    """Several pictures, or tiles of one, each: (batch, number, channels, height, width)."""
    inputs: Inputs = {}
    number = 1
    if "image_sizes" in builder.parameters:
        inputs["image_sizes"] = _sizes(builder)
        # A picture is cut into tiles of the least grid that it fits, and comes once more as a whole.
        grids = [rows * columns for rows, columns in builder.entry("image_grid_pinpoints", default=[])]
        area = inputs["image_sizes"][0].prod().item()
        number = min((grid for grid in grids if grid > area), default=area) // area + 1 if grids else 1
    shape = (builder.channels(), *builder.size())
    name = builder.picture_name() or "pixel_values"
    if "aspect_ratio_ids" in builder.parameters:
        tiles = builder.entry("max_num_tiles", near=VISION, default=1)
        inputs["aspect_ratio_ids"] = builder.full(1, builder.batch, 1)
        inputs["aspect_ratio_mask"] = builder.full(1, builder.batch, 1, tiles)
        if "cross_attention_mask" in builder.parameters:
            inputs["cross_attention_mask"] = builder.full(1, builder.batch, builder.words, 1, tiles)
        return {name: builder.noise(builder.batch, 1, tiles, *shape), **inputs}
    return {name: builder.noise(builder.batch, number, *shape), **inputs}


def _masked_tiles(builder: InputBuilder) -> Inputs:
    """The same, with a mask over the pictures of a sequence."""
    if "pixel_attention_mask" not in builder.parameters:
        raise DoesNotApply
    inputs = _tiles(builder)
    return {
        **inputs,
        "pixel_attention_mask": builder.full(1, *inputs[builder.picture_name() or "pixel_values"].shape[:2]).bool(),
    }


def _strip(builder: InputBuilder) -> Inputs:
    """Patches of all pictures in one strip: (1, channels, patch, patches x patch), with the grids."""
    if "target_sizes" not in builder.parameters:
        raise DoesNotApply
    patch = builder.patch()
    name = builder.picture_name() or "pixel_values"
    grids = torch.full((builder.batch, 2), GRID, device=builder.device)
    return {name: builder.noise(1, builder.channels(), patch, builder.batch * GRID**2 * patch), "target_sizes": grids}


def _pairs_of_pictures(builder: InputBuilder) -> Inputs:
    """Two pictures to match: (batch, 2, channels, height, width)."""
    return {
        builder.picture_name() or "pixel_values": builder.noise(builder.batch, 2, builder.channels(), *builder.size())
    }


def _picture(builder: InputBuilder) -> Inputs:
    """One picture: (batch, channels, height, width)."""
    height, width = builder.size()
    if "prompt_pixel_values" in builder.parameters:
        height //= 2  # the other half is the prompt's
    return {builder.picture_name() or "pixel_values": builder.noise(builder.batch, builder.channels(), height, width)}


def _picture_with_size(builder: InputBuilder) -> Inputs:
    """The same, and its height and width."""
    if "image_sizes" not in builder.parameters:
        raise DoesNotApply
    return {**_picture(builder), "image_sizes": _sizes(builder)}


def _clip(builder: InputBuilder) -> Inputs:
    """A video as the model's main input: (batch, frames, channels, height, width)."""
    name = builder.picture_name() or "pixel_values"
    frames = builder.entry("num_frames", "frames_per_clip", near=VISION, default=4 if "video" in name else None)
    if not isinstance(frames, int):
        raise DoesNotApply
    return {name: builder.noise(builder.batch, frames, builder.channels(), *builder.size())}


def _loose_frames(builder: InputBuilder) -> Inputs:
    """The frames of videos one below the other: (batch x frames, channels, height, width)."""
    frames = builder.entry("num_frames", near=VISION)
    if not isinstance(frames, int):
        raise DoesNotApply
    return {
        builder.picture_name() or "pixel_values": builder.noise(
            builder.batch * frames, builder.channels(), *builder.size()
        )
    }


def _grid_patches_in_a_batch(builder: InputBuilder) -> Inputs:
    """Patches as small pictures of one long sequence: (1, patches, channels, height, width)."""
    inputs = _grid_patches(builder)
    name = builder.picture_name() or "pixel_values"
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
