"""What a size becomes that gets all of the time: search, slice, recover. MiniLM.

    python benchmarks/recovery.py --keep 0.5 --recover-steps 2800 --bf16 --out benchmarks/results/recovery-50.json

Quality is that of the demo, before and after, on unseen text. Seconds are those of search, slicing and recovery.
"""

from __future__ import annotations

import json
import statistics
import time
from typing import Any

import pathprune as pp
from models import MiniLM
from pathprune import demo
from recording import command, parser, search_settings, write_record


def main() -> None:
    arguments = parser(__doc__, steps=100, seeds=1)
    arguments.add_argument("--keep", type=float, required=True, help="share of the prunable parameters to keep")
    arguments.add_argument("--recover-steps", type=int, required=True)
    arguments.add_argument("--lr", type=float, help="of the recovery; by default what its size asks for")
    arguments.add_argument("--lora-rank", type=int, help="of the update; by default all weights are trained")
    arguments.add_argument("--bf16", action="store_true", help="multiply matrices in bfloat16")
    args = arguments.parse_args()

    subject = MiniLM(args.split)
    settings = {"steps": args.recover_steps, "lr": args.lr, "lora_rank": args.lora_rank, "bf16": args.bf16}
    searched: dict[str, Any] = {"bf16": args.bf16, **search_settings(args)}
    runs: list[dict[str, Any]] = []
    for seed in range(args.seeds):
        start = time.perf_counter()
        batches = subject.batches(seed, args.steps)
        path = pp.search(subject.dense, batches, objective="embedding", steps=args.steps, seed=seed, **searched)
        before = pp.slice_model(subject.dense, path.select(pp.Budget(keep=args.keep)))
        data = demo.calibration(subject.tokenizer, seed)
        after = pp.recover(before, teacher=subject.dense, data=data, seed=seed, **settings)
        seconds = time.perf_counter() - start
        runs.append(
            {"seed": seed, "seconds": seconds, "before": subject.quality(before), "after": subject.quality(after)}
        )
        print(json.dumps(runs[-1]), flush=True)
    record = {
        "command": command(),
        "model": subject.label,
        "split": args.split,
        "keep": args.keep,
        "search": {"steps": args.steps, **searched},
        "recovery": settings,
        "dense": subject.quality(subject.dense),
        "mean": {name: statistics.mean(run["after"][name] for run in runs) for name in runs[0]["after"]},
        "runs": runs,
    }
    write_record(args.out, record)


if __name__ == "__main__":
    main()
