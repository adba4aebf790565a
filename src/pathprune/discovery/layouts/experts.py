"""Experts whose maps are stacked in one parameter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from pathprune.discovery.layouts.candidate import Candidate, Misfit
from pathprune.family.pairs import Layout, Pair, Slot

# Stacked parameters of experts, likewise; each is (experts, out, in), or (experts, in, out).
STACKS = (("gate_up_proj", "", "down_proj"), ("up_proj", "gate_proj", "down_proj"), ("up_proj", "", "down_proj"),
          ("w1", "v1", "w2"), ("w1", "w3", "w2"))  # fmt: skip


STACK_MODULES = (("input_linear", "output_linear"),)


def find_experts(model: nn.Module, name: str, module: nn.Module, order: Mapping[str, int]) -> Candidate | None:
    """Experts whose maps are stacked in one parameter each."""
    for names in STACKS:
        stacked = [(name, child, getattr(module, child, None)) for child in names if child]
        if all(isinstance(weight, Tensor) and weight.dim() == 3 for *_, weight in stacked):
            return _experts(name, module, stacked)
    for up, down in STACK_MODULES:
        parts = [(f"{name}.{child}".lstrip("."), getattr(module, child, None)) for child in (up, down)]
        stacked = [(child, "weight", getattr(part, "weight", None)) for child, part in parts]
        if all(isinstance(weight, Tensor) and weight.dim() == 3 for *_, weight in stacked):
            return _experts(name, module, stacked)
    return None


def _experts(name: str, module: nn.Module, stacked: list[tuple[str, str, Any]]) -> Candidate:
    *ups, (down_module, down_name, down) = stacked
    experts = len(down)
    for transposed in (False, True):
        width, outer = (down.shape[1], down.shape[2]) if transposed else (down.shape[2], down.shape[1])
        total = ups[0][2].shape[2 if transposed else 1] // width
        side = 1 if transposed else 2
        if total in (1, 2) and all(
            up.shape[3 - side] == total * width and up.shape[side] == outer and len(up) == experts for *_, up in ups
        ):
            break
    else:
        raise Misfit(f"stacked shapes do not meet: {[tuple(w.shape) for *_, w in stacked]}")
    layouts: tuple[Layout, ...] = ("blocks", "dims") if total == 2 else ("blocks",)

    def slot(owner: str, parameter: str, side: Any, size: int, **place: Any) -> Slot:
        biased = side == "out" and isinstance(getattr(module, f"{parameter}_bias", None), Tensor)
        return Slot(owner, side, size, 1, biased, parameter=parameter, transposed=transposed, **place)

    choices = []
    for layout in layouts:
        slots = [
            slot(owner, parameter, "out", outer, start=i, total=total, layout=layout)
            for owner, parameter, _ in ups
            for i in range(total)
        ]
        down_slot = slot(down_module, down_name, "in", outer)
        choices.append((Pair(f"{name}.mlp".lstrip("."), "mlp", name, experts, width, (*slots, down_slot)),))
    return Candidate(name, tuple(choices))
