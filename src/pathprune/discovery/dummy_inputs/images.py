"""Pictures in every layout that models read, and one function for each."""

from __future__ import annotations

import torch
from torch import Tensor

from pathprune.discovery.dummy_inputs.builder import VISION, DoesNotApply, Inputs, Maker, two

GRID = 4  # patches along a side of a picture that comes as patches


def _sizes(maker: Maker) -> Tensor:
    return torch.tensor([list(maker.size())] * maker.batch, device=maker.device)


def _grid_picture(maker: Maker) -> Inputs:
    """Pictures as one long row of flattened patches, with the grid of each: Qwen-VL and its kin."""
    grid_name = next((n for n in ("image_grid_thw", "grid_thw", "image_grid_hw") if n in maker.parameters), None)
    if grid_name is None:
        raise DoesNotApply
    side = maker.merge() * 2
    patch, time = maker.patch(), maker.entry("temporal_patch_size", "patch_temporal", near=VISION, default=1)
    flat = maker.channels() * patch * patch * time
    grid = torch.tensor([[1, side, side]] * maker.batch, device=maker.device)
    name = maker.picture_name() or "pixel_values"
    inputs = {name: maker.noise(maker.batch * side * side, flat), grid_name: grid}
    if name == "hidden_states" and "embed_dim" in maker.required:
        raise DoesNotApply
    for merges in ("merge_sizes", "image_merge_sizes"):
        if merges in maker.parameters:
            inputs[merges] = maker.full(maker.merge(), maker.batch)
    return inputs


def _grid_picture_each(maker: Maker) -> Inputs:
    """The same, picture by picture: (batch, patches, channels x height x width)."""
    inputs = _grid_picture(maker)
    name = maker.picture_name() or "pixel_values"
    return {**inputs, name: inputs[name].unflatten(0, (maker.batch, -1))}


def _grid_patches(maker: Maker) -> Inputs:
    """The same with patches left as small pictures: (patches, channels, height, width)."""
    inputs = _grid_picture(maker)
    name = maker.picture_name() or "pixel_values"
    rows, patch = inputs[name].shape[0], maker.patch()
    return {**inputs, name: maker.noise(rows, maker.channels(), patch, patch)}


def _patch_row(maker: Maker) -> Inputs:
    """Pictures as rows of flattened patches: (batch, patches, channels x height x width), with shapes or positions."""
    name = maker.picture_name()
    side, patch = maker.merge() * 2, maker.patch()
    size = maker.entry("image_size", near=VISION)
    if size and "spatial_shapes" not in maker.parameters:
        side = two(size)[0] // patch
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


def _tiles(maker: Maker) -> Inputs:
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


def _masked_tiles(maker: Maker) -> Inputs:
    """The same, with a mask over the pictures of a sequence."""
    if "pixel_attention_mask" not in maker.parameters:
        raise DoesNotApply
    inputs = _tiles(maker)
    return {
        **inputs,
        "pixel_attention_mask": maker.full(1, *inputs[maker.picture_name() or "pixel_values"].shape[:2]).bool(),
    }


def _strip(maker: Maker) -> Inputs:
    """Patches of all pictures in one strip: (1, channels, patch, patches x patch), with the grids."""
    if "target_sizes" not in maker.parameters:
        raise DoesNotApply
    patch = maker.patch()
    name = maker.picture_name() or "pixel_values"
    grids = torch.full((maker.batch, 2), GRID, device=maker.device)
    return {name: maker.noise(1, maker.channels(), patch, maker.batch * GRID**2 * patch), "target_sizes": grids}


def _pairs_of_pictures(maker: Maker) -> Inputs:
    """Two pictures to match: (batch, 2, channels, height, width)."""
    return {maker.picture_name() or "pixel_values": maker.noise(maker.batch, 2, maker.channels(), *maker.size())}


def _picture(maker: Maker) -> Inputs:
    """One picture: (batch, channels, height, width)."""
    height, width = maker.size()
    if "prompt_pixel_values" in maker.parameters:
        height //= 2  # the other half is the prompt's
    return {maker.picture_name() or "pixel_values": maker.noise(maker.batch, maker.channels(), height, width)}


def _picture_with_size(maker: Maker) -> Inputs:
    """The same, and its height and width."""
    if "image_sizes" not in maker.parameters:
        raise DoesNotApply
    return {**_picture(maker), "image_sizes": _sizes(maker)}


def _clip(maker: Maker) -> Inputs:
    """A video as the model's main input: (batch, frames, channels, height, width)."""
    name = maker.picture_name() or "pixel_values"
    frames = maker.entry("num_frames", "frames_per_clip", near=VISION, default=4 if "video" in name else None)
    if not isinstance(frames, int):
        raise DoesNotApply
    return {name: maker.noise(maker.batch, frames, maker.channels(), *maker.size())}


def _loose_frames(maker: Maker) -> Inputs:
    """The frames of videos one below the other: (batch x frames, channels, height, width)."""
    frames = maker.entry("num_frames", near=VISION)
    if not isinstance(frames, int):
        raise DoesNotApply
    return {maker.picture_name() or "pixel_values": maker.noise(maker.batch * frames, maker.channels(), *maker.size())}


def _grid_patches_in_a_batch(maker: Maker) -> Inputs:
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
