"""Where pairs may lie: names and shapes of the linear maps of an attention layer or an MLP.

A new architecture is, at most, a new name or a new fused layout here. What is proposed here is
only a guess; ``pathprune.discovery.proof`` decides.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from torch import nn

from pathprune.discovery.layouts.candidate import Candidate, Layout, Misfit, is_within, parameter_ids
from pathprune.model.linear import computes_linear, is_map
from pathprune.registry import LAYOUTS

SUBLAYER_CLASS = re.compile(r"attention|attn|mlp|ffn|feed_?forward|mixer", re.IGNORECASE)


def propose(
    model: nn.Module, order: Mapping[str, int], layouts: Sequence[Layout] = ()
) -> tuple[list[Candidate], dict[str, str]]:
    """Candidates in the order of the forward pass, and sublayers that look prunable but do not fit, with the reason.

    Args:
        order: map -> when it was first called in a forward pass, the first first.
        layouts: are asked first; then those that other packages registered, then ours.
    """
    found: list[Candidate] = []
    refused: dict[str, str] = {}
    claimed: set[str] = set()
    shared = _shared_parameters(model)
    modules = dict(model.named_modules())
    registered = [*LAYOUTS]
    known = [LAYOUTS[name] for name in (*registered[LAYOUTS.ours :], *registered[: LAYOUTS.ours])]
    for look in (*layouts, *known):
        for name, module in modules.items():
            try:
                candidate = look(model, name, module, order)
            except Misfit as misfit:
                refused[name] = str(misfit)
                continue
            if candidate is None or candidate.modules & claimed:
                continue
            if held := sorted(m for m in candidate.modules if m not in modules):
                refused[candidate.block] = f"{held[0]} is a map of another sublayer, too"
                continue
            if tied := sorted(m for m in candidate.modules if parameter_ids(modules[m]) & shared):
                refused[candidate.block] = f"{tied[0]} shares its weight with another module"
                continue
            if own := sorted(m for m in candidate.modules if is_map(modules[m]) and not computes_linear(modules[m])):
                kind = type(modules[own[0]]).__name__
                refused[candidate.block] = f"{own[0]} is a {kind} with a forward of its own, which slicing would lose"
                continue
            claimed |= candidate.modules
            refused.pop(candidate.block, None)
            found.append(candidate)
    for name, module in modules.items():
        if isinstance(module, nn.MultiheadAttention):
            refused[name] = "torch.nn.MultiheadAttention keeps its maps inside one function"
        elif SUBLAYER_CLASS.search(type(module).__name__) and not any(is_within(name, other) for other in refused):
            maps = [m for m in order if is_within(m, name)]
            weights = maps or [f"{name}.{own}" for own, p in module.named_parameters(recurse=False) if p.dim() > 1]
            if len(weights) > 1 and not claimed.intersection((name, *maps)):
                children = ", ".join(weight[len(name) + 1 :] for weight in weights[:6])
                refused[name] = f"in no known layout: {children}{', ...' if len(weights) > 6 else ''}"
    found.sort(key=lambda candidate: min(order.get(module, len(order)) for module in candidate.modules))
    return found, refused


def _shared_parameters(model: nn.Module) -> set[int]:
    owners: dict[int, int] = {}
    for module in model.modules():
        for key in parameter_ids(module):
            owners[key] = owners.get(key, 0) + 1
    return {key for key, count in owners.items() if count > 1}
