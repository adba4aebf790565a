"""SmolLM2-135M: perplexity before recovery by share of prunable parameters kept. Needs ``materials.py``'s packages.

    python benchmarks/smollm2.py --out benchmarks/results/smollm2.json

The search reads unlabelled BBC articles in full windows and stays close to the dense model's output
distribution. Perplexity is measured in float32 on articles that no search and no choice of a setting ever saw.
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path

import pathprune as pp
from models import SmolLM2
from recording import command, parser, search_settings, write_record

TARGETS = {"0.9": 1.10, "0.8": 1.25, "0.7": 1.60}  # times the dense perplexity


def main() -> None:
    arguments = parser(__doc__, steps=SmolLM2.steps, seeds=1)
    arguments.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"], help="of the search")
    arguments.add_argument("--windows", type=int, default=64, help="to measure on")
    arguments.add_argument(
        "--runs", type=Path, help="folder that keeps the searches; one that is there is gone on with"
    )
    args = arguments.parse_args()

    subject = SmolLM2(args.split, args.windows, args.dtype)
    print(f"dense {subject.dense_perplexity:.2f}")
    runs = []
    for seed in range(args.seeds):
        data = subject.batches(seed, args.steps)
        start = time.perf_counter()
        folder = args.runs and args.runs / f"seed-{seed}"
        resume = bool(folder and folder.exists())
        path = pp.search(
            subject.searched,
            data,
            objective=subject.objective,
            steps=args.steps,
            seed=seed,
            out=folder,
            resume=resume,
            **search_settings(args),
        )
        seconds = None if resume else time.perf_counter() - start  # of a whole search only
        rows = []
        for keep in subject.keeps:
            selection = path.select(pp.Budget(keep=keep))
            found = subject.quality(pp.slice_model(subject.dense, selection))
            rows.append({"keep": keep, "params": selection.to_dict()["params"], **found})
            print(json.dumps(rows[-1]), flush=True)
        tokens = sum(batch["input_ids"].numel() for batch in data)
        runs.append({"seed": seed, "search_seconds": seconds, "search_tokens": tokens, "rows": rows})
    result = {
        "command": command(),
        "model": subject.label,
        "params": path.pairs.base.params,
        "prunable_params": path.pairs.prunable_params,
        "split": args.split,
        "measured_tokens": sum(batch["input_ids"].numel() for batch in subject.unseen),
        "search_dtype": args.dtype,
        "config": path.config,
        "dense_perplexity": subject.dense_perplexity,
        "runs": runs,
        "mean_ratio": {
            str(keep): statistics.mean(run["rows"][i]["ratio"] for run in runs) for i, keep in enumerate(subject.keeps)
        },
        "targets": TARGETS,
    }
    write_record(args.out, result)
    print(json.dumps(result["mean_ratio"], indent=1))


if __name__ == "__main__":
    main()
