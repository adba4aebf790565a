"""Where pairs may lie: names and shapes of the linear maps of an attention layer or an MLP.

A new architecture is, at most, a new name or a new fused layout here. What is proposed here is
only a guess; ``pathprune.proof`` decides.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from pathprune.pairs import Layout, Pair, Slot
from pathprune.shapes import HEADS, KEY_HEADS, computes_linear, features, head_width, is_map, linear_map

# Children of an attention module: query, key, value.
SEPARATE = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q", "k", "v"),
    ("q_lin", "k_lin", "v_lin"),
    ("query_proj", "key_proj", "value_proj"),
    ("linear_q", "linear_k", "linear_v"),
    ("Wq", "Wk", "Wv"),
    ("wq", "wk", "wv"),
    ("to_q", "to_k", "to_v"),
    ("q_linear", "k_linear", "v_linear"),
    ("q_head", "k_head", "v_head"),
    ("project_q", "project_k", "project_v"),
    ("projection_query", "projection_key", "projection_value"),
    ("query_layer", "key_layer", "value_layer"),
    ("q_proj.linear", "k_proj.linear", "v_proj.linear"),
)
# Query, and key and value in one.
HALF_FUSED = (("q", "kv"), ("q_proj", "kv_proj"), ("to_q", "to_kv"), ("q_attn", "c_attn"))
# Query, key and value in one.
FUSED = ("qkv", "qkv_proj", "c_attn", "query_key_value", "Wqkv", "in_proj", "att_proj", "qkv_linear", "attn_proj")
OUTPUT = (
    "o_proj", "out_proj", "proj", "dense", "projection", "c_proj", "o", "out_lin", "output_proj", "output",
    "linear_out", "to_out", "to_out.0", "Wo", "wo", "out", "post_proj", "projection_layer", "attention_out", "final",
    "o_proj.linear",
)  # fmt: skip
OUTPUT_BESIDE = ("output.dense", "dense", "output", "out_proj", "o_proj", "proj")

# Children of an MLP: up, gate (or none), down. An up map twice as wide as down reads is gate and up in one.
MLPS = (
    ("up_proj", "gate_proj", "down_proj"),
    ("gate_up_proj", "", "down_proj"),
    ("fc1", "", "fc2"),
    ("intermediate.dense", "", "output.dense"),
    ("w1", "w3", "w2"),
    ("wi_0", "wi_1", "wo"),
    ("wi", "", "wo"),
    ("lin1", "", "lin2"),
    ("linear1", "", "linear2"),
    ("linear_1", "", "linear_2"),
    ("linear_fc1", "", "linear_fc2"),
    ("c_fc", "", "c_proj"),
    ("fc_in", "", "fc_out"),
    ("dense_h_to_4h", "", "dense_4h_to_h"),
    ("intermediate_dense", "", "output_dense"),
    ("dense1", "", "dense2"),
    ("Wi", "", "Wo"),
    ("input_linear", "", "output_linear"),
    ("weights_in", "", "weights_out"),
    ("ffn", "", "ffn_output"),
    ("proj_in", "", "proj_out"),
    ("in_proj", "", "out_proj"),
    ("layer_1", "", "layer_2"),
    ("intermediate", "", "output"),
    ("pwconv1", "", "pwconv2"),
    ("ffw_layer_1", "", "ffw_layer_2"),
    ("up_proj.linear", "gate_proj.linear", "down_proj.linear"),
)
SUBLAYER_CLASS = re.compile(r"attention|attn|mlp|ffn|feed_?forward|mixer", re.IGNORECASE)
MLP_CLASS = re.compile(r"mlp|ffn|feed_?forward", re.IGNORECASE)

# Stacked parameters of experts, likewise; each is (experts, out, in), or (experts, in, out).
STACKS = (("gate_up_proj", "", "down_proj"), ("up_proj", "gate_proj", "down_proj"), ("up_proj", "", "down_proj"),
          ("w1", "v1", "w2"), ("w1", "w3", "w2"))  # fmt: skip
STACK_MODULES = (("input_linear", "output_linear"),)


@dataclass(frozen=True)
class Candidate:
    """A sublayer that may hold pairs.

    Args:
        block: the module to prove it on, which holds all maps.
        choices: the pairs under each layout that the maps may have, likeliest first.
    """

    block: str
    choices: tuple[tuple[Pair, ...], ...]

    @property
    def modules(self) -> set[str]:
        return {slot.module for pair in self.choices[0] for slot in pair.slots}


def propose(model: nn.Module, order: Mapping[str, int]) -> tuple[list[Candidate], dict[str, str]]:
    """Candidates in the order of the forward pass, and sublayers that look prunable but do not fit, with the reason.

    Args:
        order: map -> when it was first called in a forward pass, the first first.
    """
    found: list[Candidate] = []
    refused: dict[str, str] = {}
    claimed: set[str] = set()
    shared = _shared_parameters(model)
    modules = dict(model.named_modules())
    for look in (_latent_attention, _attention, _mlp, _stack):
        for name, module in modules.items():
            try:
                candidate = look(model, name, module, order)
            except _Misfit as misfit:
                refused[name] = str(misfit)
                continue
            if candidate is None or candidate.modules & claimed:
                continue
            if held := sorted(m for m in candidate.modules if m not in modules):
                refused[candidate.block] = f"{held[0]} is a map of another sublayer, too"
                continue
            if tied := sorted(m for m in candidate.modules if _parameters(modules[m]) & shared):
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
        elif SUBLAYER_CLASS.search(type(module).__name__) and not any(_within(name, other) for other in refused):
            maps = [m for m in order if _within(m, name)]
            weights = maps or [f"{name}.{own}" for own, p in module.named_parameters(recurse=False) if p.dim() > 1]
            if len(weights) > 1 and not claimed.intersection((name, *maps)):
                children = ", ".join(weight[len(name) + 1 :] for weight in weights[:6])
                refused[name] = f"in no known layout: {children}{', ...' if len(weights) > 6 else ''}"
    found.sort(key=lambda candidate: min(order.get(module, len(order)) for module in candidate.modules))
    return found, refused


def _within(name: str, other: str) -> bool:
    """Whether a module is another or inside it."""
    return name == other or name.startswith(f"{other}.")


class _Misfit(Exception):
    """Maps with the right names do not fit together; says why."""


def _attention(model: nn.Module, name: str, module: nn.Module, order: Mapping[str, int]) -> Candidate | None:
    maps, kinds = _inputs(model, name)
    if not maps:
        return None
    heads, keys = _head_counts(module, model)
    first = features(linear_map(model, maps[0]))[1]
    last = [features(linear_map(model, m))[1] for m in maps]
    width = head_width(module)
    if kinds == "separate":
        whole = last[2] * last[0] // max(last[1], 1)
        wanted = {whole, whole // 2}  # or half of it, where each head's query is followed by a gate
    elif kinds == "half":
        wanted = {first}
    else:
        wanted = (
            {heads * width}
            if heads and isinstance(width, int)
            else {first // 3, *([heads * w for w in _widths(first, heads, keys)])}
        )
    output = _output(model, name, maps, wanted, order)
    if output is None:
        raise _Misfit(f"no linear map reads the attention's {' or '.join(map(str, sorted(wanted)))} features")
    out_in = features(linear_map(model, output))[0]
    if not isinstance(width, int) or width < 1 or (kinds == "separate" and (last[0] % width or last[1] % width)):
        if not heads:
            raise _Misfit("no head width and no number of heads is known")
        width = (last[0] if kinds != "fused" else out_in) // heads
    block = _common([*maps, output])
    if kinds == "separate":
        q, k, v = last
        gated = 2 * out_in == whole
        parts = 2 if gated else 1
        groups, repeat = k // width, q // max(k, 1) // parts
        if (
            k % width
            or q != repeat * k * parts
            or not groups
            or v % groups
            or out_in != repeat * v
            or (gated and v != k)
        ):
            raise _Misfit(f"widths do not meet: query {q}, key {k}, value {v}, output {out_in}, head {width}")
        slots = [_slot(model, maps[0], repeat), _slot(model, maps[1]), _slot(model, maps[2])]
        if gated:  # the gate's units are the values'
            slots[0] = replace(slots[0], layout="turns", total=2 * repeat)
            slots.append(replace(slots[0], start=1))
        return Candidate(block, (_two(block, groups, width, v // groups, slots, _slot(model, output, repeat, "in")),))
    total = last[-1] // width
    if kinds == "half":
        groups, repeat = total // 2, first // max(last[-1] // 2, 1)
        fits = last[-1] == 2 * groups * width and first == out_in == repeat * groups * width
    else:
        many = out_in // width
        groups = (total - many) // 2
        repeat = many // max(groups, 1)
        fits = last[-1] == (2 * groups + many) * width and many == repeat * groups
    if not fits:
        raise _Misfit(f"widths do not meet: {' + '.join(map(str, last))}, output {out_in}, head {width}")
    choices = []
    layouts: tuple[Layout, ...] = ("blocks", "heads") if groups * repeat > 1 else ("blocks",)
    for layout in layouts:
        if kinds == "half":
            slots = [_slot(model, maps[0], repeat)]
            slots += [replace(_slot(model, maps[1]), start=i, total=2, layout=layout) for i in (0, 1)]
        else:
            one = _slot(model, maps[0])
            starts = ((0, repeat), (repeat, 1), (repeat + 1, 1))
            slots = [replace(one, start=s, repeat=r, total=repeat + 2, layout=layout) for s, r in starts]
        choices.append(_two(block, groups, width, width, slots, _slot(model, output, repeat, "in")))
    return Candidate(block, tuple(choices))


def _latent_attention(model: nn.Module, name: str, module: nn.Module, order: Mapping[str, int]) -> Candidate | None:
    """Keys and values from a common low-rank latent (DeepSeek-V2): each head of ``kv_b_proj`` is a key part without
    rotary embedding, then a value; each head of the query such a part, then one with it.
    """
    query, both = _child(model, name, "q_b_proj") or _child(model, name, "q_proj"), _child(model, name, "kv_b_proj")
    output = _child(model, name, "o_proj")
    plain, value = getattr(module, "qk_nope_head_dim", None), getattr(module, "v_head_dim", None)
    heads = _head_counts(module, model)[0]
    if not (query and both and output and heads and isinstance(plain, int) and isinstance(value, int)):
        return None
    whole = features(linear_map(model, query))[1] // heads
    if (
        features(linear_map(model, both))[1] != heads * (plain + value)
        or features(linear_map(model, output))[0] != heads * value
    ):
        raise _Misfit(f"widths do not meet: {heads} heads of {plain} and {value}")
    q = replace(_slot(model, query), layout="rows", total=whole)
    k = replace(_slot(model, both), layout="rows", total=plain + value)
    v = replace(k, start=plain)
    block = _common([query, both, output])
    return Candidate(block, (_two(block, heads, plain, value, [q, k, v], _slot(model, output, 1, "in")),))


def _inputs(model: nn.Module, name: str) -> tuple[list[str], str]:
    """Names of the maps that make queries, keys and values, and how they are fused."""
    for names in SEPARATE:
        maps = [_child(model, name, child) for child in names]
        if all(maps):
            return [m for m in maps if m], "separate"
    for halves in HALF_FUSED:
        maps = [_child(model, name, child) for child in halves]
        if all(maps):
            return [m for m in maps if m], "half"
    for child in FUSED:
        if (fused := _child(model, name, child)) and features(linear_map(model, fused))[1] > features(
            linear_map(model, fused)
        )[0]:
            return [fused], "fused"
    return [], ""


def _two(block: str, groups: int, qk: int, vo: int, slots: list[Slot], output: Slot) -> tuple[Pair, ...]:
    return (
        Pair(f"{block}.qk".lstrip("."), "qk", block, groups, qk, (slots[0], slots[1])),
        Pair(f"{block}.vo".lstrip("."), "vo", block, groups, vo, (*slots[2:], output)),
    )


def _head_counts(module: nn.Module, model: nn.Module) -> tuple[int, int]:
    """Numbers of query heads and of key heads, from the module or its configuration; zero where unknown."""
    for source in (module, getattr(module, "config", None), getattr(model, "config", None)):
        if many := _entry(source, HEADS):
            return many, _entry(source, KEY_HEADS) or many
    return 0, 0


def _entry(source: Any, names: tuple[str, ...]) -> int:
    """The first of these sizes that a module or configuration has; zero if none."""
    for name in names:
        try:
            value = getattr(source, name, None)
        except Exception:  # configurations that differ from layer to layer have no answer, and errors of their own
            continue
        if isinstance(value, int) and value > 0:
            return value
    return 0


def _widths(fused: int, heads: int, keys: int) -> list[int]:
    """Head widths that a fused map's output may be made of."""
    return [fused // (heads + 2 * groups) for groups in {heads, keys, 1} if heads and fused % (heads + 2 * groups) == 0]


def _output(model: nn.Module, name: str, maps: list[str], wanted: set[int], order: Mapping[str, int]) -> str | None:
    """The map that reads what the attention gives: by name, or the first one called after its inputs."""
    beside = name.rpartition(".")[0]
    named = [_child(model, name, child) for child in OUTPUT] + [_child(model, beside, child) for child in OUTPUT_BESIDE]
    after = max(order.get(m, -1) for m in maps)
    scope = f"{beside}." if beside else ""
    called = [m for m in order if order[m] > after and m.startswith(scope)]
    for candidate in (*named, *called):
        if candidate and candidate not in maps and features(linear_map(model, candidate))[0] in wanted:
            return candidate
    return None


def _mlp(model: nn.Module, name: str, module: nn.Module, order: Mapping[str, int]) -> Candidate | None:
    for up, gate, down in MLPS:
        names = [_child(model, name, child) for child in (up, gate, down) if child]
        maps = [m for m in names if m]
        if not names[0] or not names[-1] or len(maps) < 2:
            continue
        if _meet(model, maps):
            return _neurons(model, maps)
        if up in ("up_proj", "gate_up_proj", "fc1", "intermediate.dense", "dense_h_to_4h"):
            widths = [features(linear_map(model, m)) for m in maps]
            raise _Misfit(f"widths do not meet: up {[w[1] for w in widths[:-1]]}, down {widths[-1][0]}")
    if MLP_CLASS.search(type(module).__name__) or MLP_CLASS.search(name.rpartition(".")[2]):
        maps = [m for m in order if m.startswith(f"{name}.")]
        if len(maps) in (2, 3) and _meet(model, maps):
            return _neurons(model, maps)
    return None


def _meet(model: nn.Module, maps: list[str]) -> bool:
    *ups, down = (features(linear_map(model, m)) for m in maps)
    wide = {up[1] for up in ups}
    return wide == {down[0]} or (len(ups) == 1 and wide == {2 * down[0]})


def _neurons(model: nn.Module, maps: list[str]) -> Candidate:
    ups = [_slot(model, m) for m in maps[:-1]]
    width = features(linear_map(model, maps[-1]))[0]
    down = _slot(model, maps[-1], side="in")
    block = _common(maps)
    label = block if block.endswith("mlp") else f"{block}.mlp".lstrip(".")
    if features(linear_map(model, maps[0]))[1] == width:
        return Candidate(block, ((Pair(label, "mlp", block, 1, width, (*ups, down)),),))
    layouts: tuple[Layout, ...] = ("blocks", "dims")
    halves = [[replace(ups[0], start=i, total=2, layout=layout) for i in (0, 1)] for layout in layouts]
    return Candidate(block, tuple((Pair(label, "mlp", block, 1, width, (*half, down)),) for half in halves))


def _stack(model: nn.Module, name: str, module: nn.Module, order: Mapping[str, int]) -> Candidate | None:
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
        raise _Misfit(f"stacked shapes do not meet: {[tuple(w.shape) for *_, w in stacked]}")
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


def _slot(model: nn.Module, name: str, repeat: int = 1, side: Any = "out") -> Slot:
    module = linear_map(model, name)
    size = features(module)[0 if side == "out" else 1]
    return Slot(name, side, size, repeat, module.bias is not None)


def _child(model: nn.Module, name: str, child: str) -> str | None:
    """Full name of a child that is a linear map."""
    full = f"{name}.{child}" if name else child
    try:
        return full if is_map(model.get_submodule(full)) else None
    except AttributeError:
        return None


def _common(names: list[str]) -> str:
    """Deepest module that holds all of ``names``."""
    parts: list[str] = []
    for step in zip(*(name.split(".")[:-1] for name in names), strict=False):
        if len(set(step)) > 1:
            break
        parts.append(step[0])
    return ".".join(parts)


def _parameters(module: nn.Module) -> set[int]:
    return {id(parameter) for parameter in module.parameters(recurse=False)}


def _shared_parameters(model: nn.Module) -> set[int]:
    owners: dict[int, int] = {}
    for module in model.modules():
        for key in _parameters(module):
            owners[key] = owners.get(key, 0) + 1
    return {key for key, count in owners.items() if count > 1}
