"""Read a model's outputs: embeddings, hidden states, and which tokens are padding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pathprune.errors import DataError

Batch = Mapping[str, Tensor]

TOKENS = ("input_ids", "inputs_embeds")
TOWERS = ("image_embeds", "text_embeds", "audio_embeds", "video_embeds")


def towers(outputs: Any) -> list[Tensor]:
    """The embeddings that a model returns by name, (B, d) each."""
    found = (getattr(outputs, name, None) for name in TOWERS)
    return [tower for tower in found if isinstance(tower, Tensor)]


def last_hidden(outputs: Any) -> Tensor:
    """The last hidden state, (B, T, d).

    The places of a feature map (B, d, H, W) are its tokens; a plain (B, d) is one token.

    Raises:
        DataError: the model has none.
    """
    hidden = outputs if isinstance(outputs, Tensor) else getattr(outputs, "last_hidden_state", None)
    if hidden is None:
        raise DataError(
            f"this objective needs a last_hidden_state; {type(outputs).__name__} has none. "
            "Load the model with AutoModel, or use objective='auto'"
        )
    if hidden.dim() == 2:
        return hidden.unsqueeze(1)
    return hidden.flatten(2).mT if hidden.dim() == 4 else hidden


def real_tokens(outputs: Any, batch: Batch, length: int) -> Tensor:
    """Which of the outputs' ``length`` tokens are not padding, (B, length) bool.

    An encoder-decoder's outputs are its decoder's: there the decoder's mask counts, or labels other than -100.
    Audio comes with a mask over samples, of which every frame stands for an equal share; the last
    frame of a recording counts only if it is whole. No mask at all means no padding.
    """
    decodes = getattr(outputs, "encoder_last_hidden_state", None) is not None
    mask = _decoder_mask(batch) if decodes else batch.get("attention_mask")
    if mask is None or mask.dim() != 2 or mask.shape[1] < length:
        device = next(iter(batch.values())).device
        return torch.ones(samples(batch), length, dtype=torch.bool, device=device)
    if mask.shape[1] == length:
        return mask.bool()
    frames = (mask.sum(1, keepdim=True) * length).div(mask.shape[1], rounding_mode="floor").clamp_min(1)
    return torch.arange(length, device=mask.device) < frames


def module_mask(model: nn.Module, batch: Batch, module: str) -> Tensor | None:
    """The mask over the tokens that a module of the model sees: in the decoder of an encoder-decoder, the decoder's."""
    decodes = getattr(getattr(model, "config", None), "is_encoder_decoder", False) and "decoder" in module.split(".")
    return _decoder_mask(batch) if decodes else batch.get("attention_mask")


def _decoder_mask(batch: Batch) -> Tensor | None:
    labels = batch.get("labels")
    return batch.get("decoder_attention_mask", None if labels is None else labels != -100)


def pooled(hidden: Tensor, real: Tensor, pooling: str = "mean") -> Tensor:
    """One row for each sample of a hidden state (B, T, d), by its real tokens (B, T).

    Args:
        pooling: ``"mean"``, ``"class"`` (the first real token) or ``"last"``, (B, d), whichever side is padded; or
            ``"class and mean"``, [first token, mean of the others], (B, 2d).
    """
    if pooling == "class and mean":
        return torch.cat([hidden[:, 0], pooled(hidden[:, 1:], real[:, 1:])], dim=-1)
    if pooling == "mean":
        weight = real.unsqueeze(-1).to(hidden)
        return (hidden * weight).sum(1) / weight.sum(1).clamp_min(1)
    first, last = real.int().argmax(1), real.shape[1] - 1 - real.flip(1).int().argmax(1)
    return hidden[torch.arange(len(hidden), device=hidden.device), first if pooling == "class" else last]


def samples(batch: Batch) -> int:
    """Samples in a batch: by its tokens, where it has some, because one row of positions may serve all."""
    return next((batch[name] for name in TOKENS if name in batch), next(iter(batch.values()))).shape[0]


def relative_weights(norm: Tensor) -> Tensor:
    """Weights of tokens in a fit to relative errors, (tokens, 1), from their norms, (tokens, 1).

    A token of next to nothing (padding without a mask, whose embedding is zero) would own the fit, and has no part in
    it; where all are nothing, they count alike.
    """
    weight = torch.where(norm > 1e-3 * norm.median(), 1 / norm, 0)
    return weight if weight.any() else torch.ones_like(norm)
