"""MLPs: up, gate and down maps."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from pathprune.discovery.layouts.candidate import Candidate, Misfit, child_name, common_parent, linear_slot, shapes_meet
from pathprune.family.pairs import Layout, Pair
from pathprune.model.linear import features, linear_map

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


def find_mlp(model: nn.Module, name: str, module: nn.Module, order: Mapping[str, int]) -> Candidate | None:
    for up, gate, down in MLPS:
        names = [child_name(model, name, child) for child in (up, gate, down) if child]
        maps = [m for m in names if m]
        if not names[0] or not names[-1] or len(maps) < 2:
            continue
        if shapes_meet(model, maps):
            return _neurons(model, maps)
        if up in ("up_proj", "gate_up_proj", "fc1", "intermediate.dense", "dense_h_to_4h"):
            widths = [features(linear_map(model, m)) for m in maps]
            raise Misfit(f"widths do not meet: up {[w[1] for w in widths[:-1]]}, down {widths[-1][0]}")
    if MLP_CLASS.search(type(module).__name__) or MLP_CLASS.search(name.rpartition(".")[2]):
        maps = [m for m in order if m.startswith(f"{name}.")]
        if len(maps) in (2, 3) and shapes_meet(model, maps):
            return _neurons(model, maps)
    return None


def _neurons(model: nn.Module, maps: list[str]) -> Candidate:
    ups = [linear_slot(model, m) for m in maps[:-1]]
    width = features(linear_map(model, maps[-1]))[0]
    down = linear_slot(model, maps[-1], side="in")
    block = common_parent(maps)
    label = block if block.endswith("mlp") else f"{block}.mlp".lstrip(".")
    if features(linear_map(model, maps[0]))[1] == width:
        return Candidate(block, ((Pair(label, "mlp", block, 1, width, (*ups, down)),),))
    layouts: tuple[Layout, ...] = ("blocks", "dims")
    halves = [[replace(ups[0], start=i, total=2, layout=layout) for i in (0, 1)] for layout in layouts]
    return Candidate(block, tuple((Pair(label, "mlp", block, 1, width, (*half, down)),) for half in halves))


MLP_CLASS = re.compile(r"mlp|ffn|feed_?forward", re.IGNORECASE)
