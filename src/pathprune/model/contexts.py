"""States of a model that last for a context, and the precision that it runs in."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from pathprune.errors import SettingError

M = TypeVar("M", bound=nn.Module)  # what is made of a model has its class


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
def eager(model: nn.Module) -> Iterator[None]:
    """What was compiled of the model runs as it was written: compiled code passes over hooks that came after it."""
    compiled = any(map(_compiled, model.modules()))
    with torch.compiler.set_stance("force_eager") if compiled else nullcontext():
        yield


def copied(model: M, memo: dict[int, Any] | None = None) -> M:
    """A deep copy without what was compiled, which would still call the original."""
    other = copy.deepcopy(model, memo)
    for module in other.modules():
        for name in _compiled(module):
            delattr(module, name)
    return other


def _compiled(module: nn.Module) -> list[str]:
    """Attributes that are compiled calls: of ``Module.compile``, of ``torch.compile(model.forward)``, and that of
    transformers' ``generate``.
    """
    return [name for name, value in vars(module).items() if hasattr(value, "_torchdynamo_orig_callable")]


@contextmanager
def caching(model: nn.Module, wanted: bool) -> Iterator[None]:
    """Whether the model returns keys and values, where it can; its configuration comes back afterwards."""
    config: Any = getattr(model, "config", None)
    before = getattr(config, "use_cache", None)
    if before is not None:
        config.use_cache = wanted
    try:
        yield
    finally:
        if before is not None:
            config.use_cache = before


def check_seed(seed: int) -> None:
    """Refuse what torch takes for no seed.

    Raises:
        SettingError: it is none.
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or not -(2**63) <= seed < 2**64:
        raise SettingError(f"seed={seed!r} must be an integer from 0 to 2**64 - 1")


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """What data and model draw comes from the seed; the caller's random state comes back afterwards.

    Raises:
        SettingError: it is no seed.
    """
    check_seed(seed)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


@contextmanager
def mixed(model: nn.Module, bf16: bool) -> Iterator[None]:
    """Matrix products in bfloat16, weights and all that is delicate in float32, if asked for.

    Raises:
        SettingError: the weights are in a precision that does not go with it.
    """
    first = next(model.parameters())
    device = first.device
    if bf16 and first.dtype not in (torch.float32, torch.bfloat16):
        raise SettingError(
            f"bf16=True does not go with {first.dtype} weights; load the model in float32, or leave bf16 out"
        )
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        if bf16 and device.type == "cpu":
            with _WideAttention():
                yield
        else:
            yield


class _WideAttention(TorchFunctionMode):
    """Attention in float32: its backward pass in bfloat16 is up to seven times slower on a CPU for short sequences
    (torch 2.13), and little faster for long ones.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        with torch.autocast("cpu", enabled=False):
            return func(*map(_wide, args), **{name: _wide(value) for name, value in kwargs.items()})


def _wide(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def fast_bf16(device: torch.device) -> bool:
    """Whether the hardware multiplies in bfloat16; where it does not, ``mixed`` is slower, not faster."""
    if device.type == "cpu":
        able = torch.cpu.get_capabilities()
        return any(able.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
