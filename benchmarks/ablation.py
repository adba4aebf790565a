"""What each part of the search is worth on MiniLM, before recovery.

    python benchmarks/ablation.py --out benchmarks/results/ablation.json

Scored on the split that defaults may be chosen on, not on the one that results are quoted from.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from transformers import AutoModel, AutoTokenizer

import pathprune as pp
from pathprune import demo
from pathprune.artifact import write_text
from pathprune.data import tokenized
from pathprune.evaluation import fidelity, machine
from pathprune.path import library_versions

VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "fill not learned": {"fill_lr": 0.0},
    "no fill": {"fill": False},
    "no basis": {"basis": False},
    "no basis, no fill": {"basis": False, "fill": False},
    "widths in multiples of 1": {"multiple": 1},
    "whole heads only": {"unit": "head"},
    "dimensions shared by all heads": {"unit": "shared"},
    "dual four times as fast": {"lr": 0.02},
    "curvature ranks only": {"lr": 1e-12, "fill_lr": 0.0},
    "lbi": {"dynamics": "lbi"},
    "spp-released": {"dynamics": "spp-released"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="*", default=list(VARIANTS), choices=list(VARIANTS))
    args = parser.parse_args()
    source = demo.minilm()
    model, tokenizer = AutoModel.from_pretrained(source).eval(), AutoTokenizer.from_pretrained(source)
    data = demo.calibration(tokenizer)[: demo.SEARCH_BATCHES]
    held_out = demo.passages(demo.bbc_articles("choice"))[:512]
    unseen = tokenized(held_out, tokenizer, batch_size=32, max_length=demo.SEARCH_TOKENS)
    rows = []
    for name in args.only:
        path = pp.search(model, data, **VARIANTS[name])
        cosine = {
            str(keep): fidelity(pp.slice_model(model, path.select(pp.Budget(keep=keep))), model, unseen)
            for keep in demo.KEEPS
        }
        rows.append({"variant": name, "settings": VARIANTS[name], "cosine": cosine})
        print(json.dumps(rows[-1]), flush=True)
        result = {
            "command": "python benchmarks/ablation.py",
            "split": "choice",
            "rows": rows,
            "machine": machine(),
            "versions": library_versions(),
        }
        write_text(args.out, json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
