"""DINOv2-S: quality of features before recovery, on Fashion-MNIST. Needs ``materials.py``'s packages.

    python benchmarks/dinov2.py --out benchmarks/results/dinov2.json

The search sees unlabelled training images. Features are [class token, mean patch]. Measured on test images that no
search and no choice of a setting ever saw: their mean cosine to the dense ones, and the accuracy of 10 nearest
neighbours and of a linear probe, both fitted to other training images as the same pruned model sees them.
"""

from __future__ import annotations

import json
import statistics
import time

import pathprune as pp
from models import DINOv2
from recording import command, parser, search_settings, write_record

TARGETS = {  # at least, at most
    "0.75": {"cosine": 0.97, "knn_accuracy_points_lost": 1},
    "0.5": {"cosine": 0.93, "knn_accuracy_points_lost": 1},
    "0.25": {"cosine": 0.88, "knn_accuracy_points_lost": 9},
}


def main() -> None:
    arguments = parser(__doc__, steps=DINOv2.steps, seeds=1)
    arguments.add_argument("--references", type=int, default=2000, help="labelled training images for 10-NN and probe")
    arguments.add_argument("--queries", type=int, default=1000, help="test images to measure on")
    args = arguments.parse_args()

    subject = DINOv2(args.split, args.references, args.queries)
    model = subject.dense
    base = subject.quality(model)
    print(json.dumps({"dense": base}), flush=True)
    runs = []
    for seed in range(args.seeds):
        data = subject.batches(seed, args.steps)
        start = time.perf_counter()
        path = pp.search(model, data, steps=args.steps, seed=seed, **search_settings(args))
        seconds = time.perf_counter() - start
        rows = []
        for keep in subject.keeps:
            selection = path.select(pp.Budget(keep=keep))
            quality = subject.quality(pp.slice_model(model, selection))
            lost = {
                f"{kind}_points_lost": 100 * (base[kind] - quality[kind]) for kind in ("knn_accuracy", "probe_accuracy")
            }
            rows.append({"keep": keep, "params": selection.to_dict()["params"], **quality, **lost})
            print(json.dumps(rows[-1]), flush=True)
        images = sum(len(batch["pixel_values"]) for batch in data)
        runs.append({"seed": seed, "search_seconds": seconds, "search_images": images, "rows": rows})
    kinds = [kind for kind in runs[0]["rows"][0] if kind not in ("keep", "params")]
    result = {
        "command": command(),
        "model": subject.label,
        "params": path.pairs.base.params,
        "prunable_params": path.pairs.prunable_params,
        "split": args.split,
        "references": args.references,
        "queries": args.queries,
        "config": path.config,
        "dense": base,
        "runs": runs,
        "mean": {
            str(keep): {kind: statistics.mean(run["rows"][i][kind] for run in runs) for kind in kinds}
            for i, keep in enumerate(subject.keeps)
        },
        "targets": TARGETS,
    }
    write_record(args.out, result)
    print(json.dumps(result["mean"], indent=1))


if __name__ == "__main__":
    main()
