"""One elastic run against a recovery of its own for every size, at equal total steps. MiniLM.

    python benchmarks/elastic.py --out benchmarks/results/elastic.json

Both imitate the dense model on the same batches, with the same path. ``--recover-steps`` go into each separate
recovery, and as many times that as there are sizes into the elastic run. The loss is 1 - cosine to the dense
embedding on unseen text; the excess is elastic's over that of the size's own recovery.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from typing import Any

from torch import nn

import pathprune as pp
from models import MiniLM
from pathprune import demo
from pathprune.evaluation import fidelity
from pathprune.objectives.embedding import HiddenObjective
from pathprune.objectives.targets import Targets
from recording import command, parser, search_settings, write_record

LIMIT = 0.1  # of the remaining loss


def main() -> None:
    arguments = parser(__doc__, steps=MiniLM.steps, seeds=3)
    arguments.add_argument("--recover-steps", type=int, default=350, help="of each size's own recovery")
    arguments.add_argument("--lr", type=float, default=3e-4, help="of the elastic run alone")
    arguments.add_argument("--lowest", type=float, default=0.2, help="smallest size that the elastic run visits")
    arguments.add_argument("--bf16", action="store_true", help="multiply matrices in bfloat16")
    args = arguments.parse_args()

    subject = MiniLM(args.split)
    dense, judge = subject.dense, subject.judge
    searched: dict[str, Any] = {"bf16": args.bf16, **search_settings(args)}

    def loss(model: nn.Module) -> float:
        return 1 - fidelity(model, judge.dense, judge.unseen)

    runs: list[dict[str, Any]] = []
    for seed in range(args.seeds):
        batches = subject.batches(seed, args.steps)
        path = pp.search(dense, batches, steps=args.steps, seed=seed, **searched)
        data = demo.calibration(subject.tokenizer, seed)
        teacher = Targets(dense, HiddenObjective())  # its outputs are known to both after their first round
        shared: dict[str, Any] = {"data": data, "teacher": teacher, "seed": seed, "bf16": args.bf16}
        rows = []
        for keep in subject.keeps:
            small = pp.slice_model(dense, path.select(pp.Budget(keep=keep)))
            start = time.perf_counter()
            own = pp.recover(small, steps=args.recover_steps, **shared)
            seconds = time.perf_counter() - start
            rows.append({"keep": keep, "before": loss(small), "own": loss(own), "own_seconds": seconds})
        start = time.perf_counter()
        total = args.recover_steps * len(subject.keeps)
        model, sorted_path = pp.elastic(dense, path, steps=total, lr=args.lr, lowest=args.lowest, **shared)
        seconds = time.perf_counter() - start
        with tempfile.TemporaryDirectory() as folder:
            pp.save_model(model, folder)
            sorted_path.save(folder)
            for row in rows:
                row["elastic"] = loss(pp.load_slice(folder, pp.Budget(keep=row["keep"])))
                row["excess"] = row["elastic"] / row["own"] - 1
        runs.append({"seed": seed, "rows": rows, "elastic_seconds": seconds, "elastic_dense_loss": loss(model)})
        print(json.dumps(runs[-1]), flush=True)
    record = {
        "command": command(),
        "model": subject.label,
        "split": args.split,
        "loss": subject.loss_label,
        "search": {"steps": args.steps, **searched},
        "recover_steps_each": args.recover_steps,
        "elastic_steps": total,
        "lr": args.lr,
        "bf16": args.bf16,
        "lowest": args.lowest,
        "runs": runs,
        "mean_excess": {
            str(keep): statistics.mean(run["rows"][i]["excess"] for run in runs) for i, keep in enumerate(subject.keeps)
        },
        "limit": LIMIT,
    }
    write_record(args.out, record)
    print(json.dumps(record["mean_excess"], indent=1))


if __name__ == "__main__":
    main()
