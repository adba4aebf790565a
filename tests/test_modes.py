"""pathprune.model.contexts: mixed precision."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pathprune.errors import SettingError
from pathprune.model.contexts import mixed


@pytest.mark.parametrize("bf16", [False, True])
def test_on_a_cpu_attention_stays_in_float32(bf16: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 7, 8, generator=generator, requires_grad=True) for _ in range(3))
    bias = torch.randn(2, 1, 7, 7, generator=generator)
    weight = torch.randn(8, 8, generator=generator)
    with mixed(nn.Linear(1, 1), bf16):
        projected = q @ weight
        attended = F.scaled_dot_product_attention(projected, k, value=v, attn_mask=bias.to(projected.dtype))
    assert projected.dtype == (torch.bfloat16 if bf16 else torch.float32)  # all else goes by what was asked for
    expected = F.scaled_dot_product_attention(projected.float(), k, v, attn_mask=bias.to(projected.dtype).float())
    assert attended.dtype == torch.float32
    torch.testing.assert_close(attended, expected, rtol=0, atol=0)
    for ours, theirs in zip(
        torch.autograd.grad(attended.sum(), (q, k, v), retain_graph=True),
        torch.autograd.grad(expected.sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_bf16_is_refused_where_weights_cannot_follow(dtype: torch.dtype) -> None:
    refused = pytest.raises(
        SettingError, match=f"bf16=True does not go with {dtype} weights; load the model in float32"
    )
    with refused, mixed(nn.Linear(1, 1, dtype=dtype), True):
        pass
    with mixed(nn.Linear(1, 1, dtype=dtype), False):
        pass
