"""Where the maps of a pair lie on a fused axis, and what is proposed from names and shapes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from pathprune.discovery.layouts.propose import propose
from pathprune.family.pairs import Pair, Slot

small = st.integers(1, 4)


@given(st.sampled_from(["blocks", "heads"]), small, small, small)
def test_fused_queries_keys_and_values_share_the_axis_out(layout: Any, groups: int, repeat: int, width: int) -> None:
    parts = ((0, repeat), (repeat, 1), (repeat + 1, 1))
    slots = [Slot("qkv", "out", 5, r, start=start, total=repeat + 2, layout=layout) for start, r in parts]
    places = np.concatenate([slot.index(groups, width).ravel() for slot in slots])
    assert sorted(places) == list(range(groups * (repeat + 2) * width))
    assert all(slot.fused for slot in slots)
    if layout == "blocks":  # query, key and value one after the other
        np.testing.assert_array_equal(places, np.arange(len(places)))
    else:  # what belongs to the first group comes first
        assert set(np.concatenate([slot.index(groups, width)[0].ravel() for slot in slots])) == set(
            range((repeat + 2) * width)
        )


@given(st.sampled_from(["blocks", "dims"]), st.integers(1, 6))
def test_fused_gate_and_up_share_the_axis_out(layout: Any, width: int) -> None:
    gate, up = (Slot("gate_up", "out", 5, start=i, total=2, layout=layout).index(1, width).ravel() for i in (0, 1))
    whole = np.arange(2 * width)
    halves = (whole[:width], whole[width:]) if layout == "blocks" else (whole[::2], whole[1::2])
    np.testing.assert_array_equal(gate, halves[0])
    np.testing.assert_array_equal(up, halves[1])


@given(small, small, small)
def test_queries_and_gates_in_turns_share_the_axis_out(groups: int, repeat: int, width: int) -> None:
    query, gate = (
        Slot("q", "out", 5, repeat, start=i, total=2 * repeat, layout="turns").index(groups, width) for i in (0, 1)
    )
    heads = np.arange(2 * groups * repeat * width).reshape(groups, repeat, 2, width)
    np.testing.assert_array_equal(query, heads[:, :, 0])
    np.testing.assert_array_equal(gate, heads[:, :, 1])


@given(small, small, small)
def test_unequal_parts_of_heads_share_the_axis_out(groups: int, key: int, value: int) -> None:
    k, v = (Slot("kv_b", "out", 5, start=s, total=key + value, layout="rows") for s in (0, key))
    places = np.concatenate([k.index(groups, key).ravel(), v.index(groups, value).ravel()])
    assert sorted(places) == list(range(groups * (key + value)))


@given(small, small, st.integers(1, 5), st.data())
def test_positions_are_those_of_the_kept_units(groups: int, repeat: int, units: int, data: st.DataObject) -> None:
    rotary: Any = data.draw(st.sampled_from(["", "halves", "neighbours"]))
    width = units * (2 if rotary else 1)
    slots = (Slot("q", "out", 5, repeat), Slot("k", "out", 5))
    pair = Pair("p", "qk", "p", groups, width, slots, rotary)
    keep = np.array(data.draw(st.lists(st.booleans(), min_size=groups * units, max_size=groups * units)))
    keep = keep.reshape(groups, units)
    kept = pair.positions(slots[0], keep)
    assert len(kept) == keep.sum() * pair.dims_per_unit * repeat
    for place in kept:
        group, dim = place // (repeat * width), place % width
        unit = {"": dim, "halves": dim % max(units, 1), "neighbours": dim // 2}[rotary]
        assert keep[group, unit]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"side": "up"}, "make no slot"),
        ({"layout": "columns"}, "make no slot"),
        ({"repeat": 0}, "make no slot"),
        ({"start": 2, "total": 2}, "make no slot"),
        ({"start": -1, "total": 2}, "make no slot"),
    ],
)
def test_slots_that_cannot_be_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Slot(**{"module": "m", "side": "out", "size": 3, **settings})


class Block(nn.Module):
    """Linear maps by name."""

    def __init__(self, heads: int = 0, **maps: tuple[int, int]) -> None:
        super().__init__()
        if heads:
            self.num_heads = heads
        for name, (inputs, outputs) in maps.items():
            self.add_module(name, nn.Linear(inputs, outputs))


def refusal(block: nn.Module) -> str:
    found, refused = propose(nn.ModuleDict({"block": block}), {})
    assert not found
    return refused["block"]


def test_maps_that_do_not_meet_are_refused_with_their_widths() -> None:
    square = (8, 8)
    assert "no linear map reads" in refusal(Block(2, q_proj=square, k_proj=square, v_proj=square))
    assert "no number of heads" in refusal(Block(q_proj=square, k_proj=square, v_proj=square, o_proj=square))
    assert "key 6" in refusal(Block(2, q_proj=square, k_proj=(8, 6), v_proj=(8, 6), o_proj=square))
    assert "up [6], down 5" in refusal(Block(fc1=(8, 6), fc2=(5, 8)))


def test_torch_s_own_attention_is_refused_by_name() -> None:
    assert "MultiheadAttention" in refusal(nn.MultiheadAttention(8, 2))


class OddAttention(nn.Module):
    """Holds its weights in a way that no layout knows."""

    def __init__(self, *, maps: bool) -> None:
        super().__init__()
        for name in ("a", "b"):
            if maps:
                self.add_module(name, nn.Linear(4, 4))
            else:
                self.register_parameter(name, nn.Parameter(torch.zeros(4, 4)))


@pytest.mark.parametrize("maps", [True, False])
def test_attention_that_no_layout_knows_is_refused_with_what_it_has(maps: bool) -> None:
    order = {"block.a": 0, "block.b": 1} if maps else {}
    found, refused = propose(nn.ModuleDict({"block": OddAttention(maps=maps)}), order)
    assert not found
    assert refused == {"block": "in no known layout: a, b"}


def test_stacks_that_do_not_meet_are_refused() -> None:
    experts = nn.Module()
    experts.gate_up_proj = nn.Parameter(torch.zeros(3, 10, 8))
    experts.down_proj = nn.Parameter(torch.zeros(3, 8, 7))
    assert "stacked shapes do not meet" in refusal(experts)
