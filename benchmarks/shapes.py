"""Which shapes are fast: MiniLM sliced to given widths, in turns with the dense model.

    python benchmarks/shapes.py --out benchmarks/results/shapes.json

Efficiency is the speed-up times the share of MACs kept: 1 means that time falls with arithmetic.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModel

import pathprune as pp
from pathprune import demo
from pathprune.evaluation import latency, machine
from pathprune.family.costs import dense_macs
from pathprune.family.files import write_text
from pathprune.versions import library_versions
from recording import command

# heads, query-key width, value width, neurons
SHAPES = [
    (12, 16, 16, 768),
    (6, 32, 32, 768),
    (12, 13, 19, 701),
    (12, 8, 24, 768),
    (12, 16, 24, 640),
    (10, 8, 24, 800),
    (12, 8, 8, 384),
    (3, 32, 32, 384),
]


def widths(pairs: pp.PairList, shape: tuple[int, int, int, int]) -> pp.Selection:
    heads, qk, vo, neurons = shape
    keep = {}
    for pair in pairs:
        mask = np.zeros(pair.shape, dtype=bool)
        if pair.kind == "mlp":
            mask[:, :neurons] = True
        else:
            mask[:heads, : qk if pair.kind == "qk" else vo] = True
        keep[pair.name] = mask
    return pp.Selection(pairs, keep, seq_len=demo.LATENCY_TOKENS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=4)
    args = parser.parse_args()
    model = AutoModel.from_pretrained(demo.minilm()).eval()
    pairs = pp.find_pairs(model)
    rows = []
    for size in (1, 32):
        ids = torch.randint(1000, 20000, (size, demo.LATENCY_TOKENS), generator=torch.Generator().manual_seed(0))
        for shape in SHAPES:
            selection = widths(pairs, shape)
            dense_ms, ms = latency([model, pp.slice_model(model, selection)], {"input_ids": ids}, seconds=args.seconds)
            macs = selection.macs / dense_macs(pairs, demo.LATENCY_TOKENS)
            rows.append({"batch": size, "widths": shape, "speed_up": dense_ms / ms, "efficiency": dense_ms / ms * macs})
            print(json.dumps(rows[-1]))
    result = {
        "command": command(),
        "rows": rows,
        "machine": machine(),
        "versions": library_versions(),
    }
    write_text(args.out, json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
