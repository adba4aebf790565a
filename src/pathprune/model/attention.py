"""Where attention modules keep their sizes."""

from __future__ import annotations

from typing import Any

from torch import nn

from pathprune.family.pairs import Pair

# Names under which attention modules keep their sizes; each is set only where its value is the dense size.
WIDTHS = ("head_dim", "attention_head_size", "key_value_proj_dim", "head_size", "dim_per_head", "attention_head_dim",
          "hidden_size_per_attention_head", "d_head", "dim_head", "head_width")  # fmt: skip


KEY_HEADS = ("num_key_value_heads", "num_kv_heads", "kv_heads")


HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads", "nhead", "num_attn_heads")


TOTALS = ("all_head_size", "inner_dim", "embed_dim", "split_size", "hidden_size", "d_model", "dim", "embed_size",
          "attn_dim", "attention_dim", "projection_size", "dim_attention")  # fmt: skip


KEY_TOTALS = ("kv_dim",)


SCALES = ("scale", "scaling")  # of the attention, likewise: one over the root of the width


SIZE_ATTRIBUTES = frozenset((*WIDTHS, *KEY_HEADS, *HEADS, *TOTALS, *KEY_TOTALS))


KINDS: dict[str, tuple[str, ...]] = {
    "width": WIDTHS,
    "key heads": KEY_HEADS,
    "heads": HEADS,
    "total": TOTALS,
    "key total": KEY_TOTALS,
    "scale": SCALES,
}


def head_width(attention: nn.Module) -> Any:
    """Width of a head, by the attribute that the attention module keeps it in; None where it has none."""
    return next((getattr(attention, name) for name in WIDTHS if hasattr(attention, name)), None)


def attention_of(model: nn.Module, pair: Pair) -> str:
    """Name of the module that holds the sizes of the pair's attention: the nearest above the first map."""
    name = pair.slots[0].module
    while name and name != pair.block:
        name = name.rpartition(".")[0]
        module = model.get_submodule(name)
        if any(hasattr(module, size) for size in (*WIDTHS, *HEADS)):
            return name
    return pair.slots[0].module.rpartition(".")[0]
