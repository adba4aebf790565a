"""States of a model that last for a context, and the precision that it runs in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout off; the training flags come back afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """What data and model draw comes from the seed; the caller's random state comes back afterwards."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def mixed(device: torch.device, bf16: bool) -> torch.autocast:
    """Matrix products in bfloat16, weights and all that is delicate in float32, if asked for."""
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16)


def fast_bf16(device: torch.device) -> bool:
    """Whether the hardware multiplies in bfloat16; where it does not, ``mixed`` is slower, not faster."""
    if device.type == "cpu":
        able = torch.cpu.get_capabilities()
        return any(able.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
