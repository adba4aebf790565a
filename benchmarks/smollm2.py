"""SmolLM2-135M: perplexity before recovery by share of prunable parameters kept. Needs ``materials.py``'s packages.

    python benchmarks/smollm2.py --out benchmarks/results/smollm2.json

The search reads unlabelled BBC articles in full windows and stays close to the dense model's output
distribution. Perplexity is measured in float32 on articles that no search and no choice of a setting ever saw.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

import pathprune as pp
from materials import smollm2
from pathprune import demo
from pathprune.artifact import write_text
from pathprune.data import Batch, packed
from pathprune.evaluation import machine, peak_memory
from pathprune.path import library_versions

KEEPS = (0.9, 0.8, 0.7, 0.5)
TARGETS = {"0.9": 1.10, "0.8": 1.25, "0.7": 1.60}  # times the dense perplexity
TOKENS = 200_000  # that the search may read
SEARCH_BATCH, SEARCH_WINDOW = 2, 256
STEP_TOKENS = SEARCH_BATCH * SEARCH_WINDOW
MEASURED_WINDOW = 512


def windows(tokenizer: Any, split: str, batch_size: int, length: int) -> list[Batch]:
    """Full windows of a split's articles, end to end."""
    return packed([text for _, text in demo.bbc_articles(split)], tokenizer, batch_size=batch_size, length=length)


@torch.inference_mode()
def perplexity(model: nn.Module, batches: list[Batch]) -> float:
    """Exp of the mean negative log-likelihood of every token but a window's first."""
    total, count = 0.0, 0
    for batch in batches:
        ids = batch["input_ids"]
        logits = model(**batch).logits[:, :-1].float()
        total += float(F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"))
        count += ids[:, 1:].numel()
    return math.exp(total / count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=TOKENS // STEP_TOKENS, help=f"of {STEP_TOKENS} tokens each")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"], help="of the search")
    parser.add_argument("--split", default="test", choices=["choice", "test"], help="settings are chosen on choice")
    parser.add_argument("--windows", type=int, default=64, help="to measure on")
    parser.add_argument("--runs", type=Path, help="folder that keeps the searches; one that is there is gone on with")
    parser.add_argument("--setting", action="append", default=[], metavar="NAME=VALUE", help="of SearchConfig")
    args = parser.parse_args()
    settings = {name: json.loads(value) for name, _, value in (item.partition("=") for item in args.setting)}

    source = smollm2()
    dense, tokenizer = AutoModelForCausalLM.from_pretrained(source).eval(), AutoTokenizer.from_pretrained(source)
    unseen = windows(tokenizer, args.split, 1, MEASURED_WINDOW)[: args.windows]
    base = perplexity(dense, unseen)
    print(f"dense {base:.2f}")
    known = windows(tokenizer, "search", SEARCH_BATCH, SEARCH_WINDOW)
    searched = copy.deepcopy(dense).to(getattr(torch, args.dtype))
    runs = []
    for seed in range(args.seeds):
        shift = seed * args.steps % len(known)  # other seeds read other articles
        data = (known[shift:] + known[:shift])[: args.steps]
        start = time.perf_counter()
        folder = args.runs and args.runs / f"seed-{seed}"
        path = pp.search(
            searched,
            data,
            objective="logits",
            steps=args.steps,
            seed=seed,
            out=folder,
            resume=bool(folder and folder.exists()),
            **settings,
        )
        seconds = time.perf_counter() - start
        rows = []
        for keep in KEEPS:
            selection = path.select(pp.Budget(keep=keep))
            small = perplexity(pp.slice_model(dense, selection), unseen)
            facts = selection.to_dict()
            rows.append({"keep": keep, "params": facts["params"], "perplexity": small, "ratio": small / base})
            print(json.dumps(rows[-1]), flush=True)
        runs.append({"seed": seed, "search_seconds": seconds, "search_tokens": args.steps * STEP_TOKENS, "rows": rows})
    result = {
        "command": "python benchmarks/smollm2.py",
        "model": "SmolLM2-135M-Instruct, Q4_1 weights in float32",
        "params": path.pairs.base.params,
        "prunable_params": path.pairs.prunable_params,
        "split": args.split,
        "measured_tokens": sum(batch["input_ids"].numel() for batch in unseen),
        "search_dtype": args.dtype,
        "config": path.config,
        "dense_perplexity": base,
        "runs": runs,
        "mean_ratio": {
            str(row["keep"]): statistics.mean(run["rows"][i]["ratio"] for run in runs)
            for i, row in enumerate(runs[0]["rows"])
        },
        "targets": TARGETS,
        "peak_memory_gib": round(peak_memory() / 2**30, 2),
        "machine": machine(),
        "versions": library_versions(),
    }
    write_text(args.out, json.dumps(result, indent=1))
    print(json.dumps(result["mean_ratio"], indent=1))


if __name__ == "__main__":
    main()
