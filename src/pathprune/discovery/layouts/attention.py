"""Attention: query, key, value and output maps, apart or fused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from pathprune.discovery.layouts.candidate import Candidate, Misfit, child_name, common_parent, linear_slot
from pathprune.family.pairs import Layout, Pair, Slot
from pathprune.model.attention import HEADS, KEY_HEADS, head_width
from pathprune.model.linear import features, linear_map

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


def find_attention(model: nn.Module, name: str, module: nn.Module, order: Mapping[str, int]) -> Candidate | None:
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
        raise Misfit(f"no linear map reads the attention's {' or '.join(map(str, sorted(wanted)))} features")
    out_in = features(linear_map(model, output))[0]
    if not isinstance(width, int) or width < 1 or (kinds == "separate" and (last[0] % width or last[1] % width)):
        if not heads:
            raise Misfit("no head width and no number of heads is known")
        width = (last[0] if kinds != "fused" else out_in) // heads
    block = common_parent([*maps, output])
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
            raise Misfit(f"widths do not meet: query {q}, key {k}, value {v}, output {out_in}, head {width}")
        slots = [linear_slot(model, maps[0], repeat), linear_slot(model, maps[1]), linear_slot(model, maps[2])]
        if gated:  # the gate's units are the values'
            slots[0] = replace(slots[0], layout="turns", total=2 * repeat)
            slots.append(replace(slots[0], start=1))
        return Candidate(
            block, (_two(block, groups, width, v // groups, slots, linear_slot(model, output, repeat, "in")),)
        )
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
        raise Misfit(f"widths do not meet: {' + '.join(map(str, last))}, output {out_in}, head {width}")
    choices = []
    layouts: tuple[Layout, ...] = ("blocks", "heads") if groups * repeat > 1 else ("blocks",)
    for layout in layouts:
        if kinds == "half":
            slots = [linear_slot(model, maps[0], repeat)]
            slots += [replace(linear_slot(model, maps[1]), start=i, total=2, layout=layout) for i in (0, 1)]
        else:
            one = linear_slot(model, maps[0])
            starts = ((0, repeat), (repeat, 1), (repeat + 1, 1))
            slots = [replace(one, start=s, repeat=r, total=repeat + 2, layout=layout) for s, r in starts]
        choices.append(_two(block, groups, width, width, slots, linear_slot(model, output, repeat, "in")))
    return Candidate(block, tuple(choices))


def find_latent_attention(model: nn.Module, name: str, module: nn.Module, order: Mapping[str, int]) -> Candidate | None:
    """Keys and values from a common low-rank latent (DeepSeek-V2): each head of ``kv_b_proj`` is a key part without
    rotary embedding, then a value; each head of the query such a part, then one with it.
    """
    query, both = (
        child_name(model, name, "q_b_proj") or child_name(model, name, "q_proj"),
        child_name(model, name, "kv_b_proj"),
    )
    output = child_name(model, name, "o_proj")
    plain, value = getattr(module, "qk_nope_head_dim", None), getattr(module, "v_head_dim", None)
    heads = _head_counts(module, model)[0]
    if not (query and both and output and heads and isinstance(plain, int) and isinstance(value, int)):
        return None
    whole = features(linear_map(model, query))[1] // heads
    if (
        features(linear_map(model, both))[1] != heads * (plain + value)
        or features(linear_map(model, output))[0] != heads * value
    ):
        raise Misfit(f"widths do not meet: {heads} heads of {plain} and {value}")
    q = replace(linear_slot(model, query), layout="rows", total=whole)
    k = replace(linear_slot(model, both), layout="rows", total=plain + value)
    v = replace(k, start=plain)
    block = common_parent([query, both, output])
    return Candidate(block, (_two(block, heads, plain, value, [q, k, v], linear_slot(model, output, 1, "in")),))


def _inputs(model: nn.Module, name: str) -> tuple[list[str], str]:
    """Names of the maps that make queries, keys and values, and how they are fused."""
    for names in SEPARATE:
        maps = [child_name(model, name, child) for child in names]
        if all(maps):
            return [m for m in maps if m], "separate"
    for halves in HALF_FUSED:
        maps = [child_name(model, name, child) for child in halves]
        if all(maps):
            return [m for m in maps if m], "half"
    for child in FUSED:
        if (fused := child_name(model, name, child)) and features(linear_map(model, fused))[1] > features(
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
    named = [child_name(model, name, child) for child in OUTPUT] + [
        child_name(model, beside, child) for child in OUTPUT_BESIDE
    ]
    after = max(order.get(m, -1) for m in maps)
    scope = f"{beside}." if beside else ""
    called = [m for m in order if order[m] > after and m.startswith(scope)]
    for candidate in (*named, *called):
        if candidate and candidate not in maps and features(linear_map(model, candidate))[0] in wanted:
            return candidate
    return None
