"""How much a family depends on the seed, and on the domain of the data that it was searched on. MiniLM.

    python benchmarks/stability.py --out benchmarks/results/stability.json

Seeds differ in their texts and probes. Two families' *overlap* at a size is the share of neurons that both keep of
those that either keeps (Jaccard); that of random rankings, under the same rules for shapes, stands beside it.
Dimensions of heads are left out: each search has rotated them into a basis of its own, strongest first, so that equal
numbers do not mean equal directions.
Searches on BBC News and on five of Austen's novels are each measured on unseen news and on the sixth novel.
"""

from __future__ import annotations

import itertools
import json
import random
import statistics
from typing import Any

import numpy as np

import pathprune as pp
from materials import austen
from models import MiniLM
from pathprune import demo
from pathprune.data.batches import Batch
from pathprune.data.text import tokenized
from pathprune.evaluation import fidelity
from recording import command, parser, search_settings, write_record


def overlap(one: pp.Selection, other: pp.Selection) -> float:
    """Share of the neurons that both keep of those that either keeps."""
    neurons = [pair.name for pair in one.pairs if pair.kind == "mlp"]
    both = sum(int((one.keep[name] & other.keep[name]).sum()) for name in neurons)
    either = sum(int((one.keep[name] | other.keep[name]).sum()) for name in neurons)
    return both / either


def overlaps(paths: list[pp.SolutionPath], keeps: tuple[float, ...]) -> dict[str, float]:
    """Mean over pairs of paths, by size."""
    means = {}
    for keep in keeps:
        chosen = [path.select(pp.Budget(keep=keep)) for path in paths]
        means[str(keep)] = statistics.mean(overlap(*two) for two in itertools.combinations(chosen, 2))
    return means


def batches_of(novels: list[list[str]], tokenizer: Any, count: int, seed: int) -> list[Batch]:
    """Paragraphs of at least eight words, shuffled, in batches of 16."""
    texts = [text for novel in novels for text in novel if len(text.split()) >= 8]
    random.Random(seed).shuffle(texts)
    return tokenized(texts[: 16 * count], tokenizer, batch_size=16, max_length=demo.SEARCH_TOKENS)


def main() -> None:
    args = parser(__doc__, steps=MiniLM.steps, seeds=3).parse_args()
    subject = MiniLM(args.split)
    dense, judge = subject.dense, subject.judge
    novels = austen()
    unseen = {"news": judge.unseen, "Austen": batches_of(novels[-1:], subject.tokenizer, 32, 0)}
    paths: dict[str, list[pp.SolutionPath]] = {"news": [], "Austen": []}
    rows: list[dict[str, Any]] = []
    for seed, domain in itertools.product(range(args.seeds), paths):
        data = subject.batches(seed, args.steps)
        if domain == "Austen":
            data = batches_of(novels[:-1], subject.tokenizer, len(data), seed)
        path = pp.search(dense, data, objective="embedding", steps=args.steps, seed=seed, **search_settings(args))
        paths[domain].append(path)
        small = {keep: pp.slice_model(dense, path.select(pp.Budget(keep=keep))) for keep in subject.keeps}
        for on, batches in unseen.items():
            cosine = {str(keep): fidelity(model, judge.dense, batches) for keep, model in small.items()}
            rows.append({"searched_on": domain, "measured_on": on, "seed": seed, "cosine": cosine})
            print(json.dumps(rows[-1]), flush=True)
    rng = np.random.default_rng(0)
    pairs = paths["news"][0].pairs
    drawn = [{pair.name: rng.random(pair.shape) for pair in pairs} for _ in range(3)]
    by_chance = [pp.SolutionPath.from_scores(pairs, scores, unit=path.unit, multiple=path.multiple) for scores in drawn]
    across = [overlaps([*two], subject.keeps) for two in zip(*paths.values(), strict=True)]
    means: dict[str, dict[str, dict[str, float]]] = {}
    for row in rows:
        same = [r["cosine"] for r in rows if all(r[k] == row[k] for k in ("searched_on", "measured_on"))]
        each = {keep: [cosine[keep] for cosine in same] for keep in row["cosine"]}
        means[f"searched on {row['searched_on']}, measured on {row['measured_on']}"] = {
            "mean": {keep: statistics.mean(values) for keep, values in each.items()},
            "std": {keep: statistics.stdev(values) if len(values) > 1 else 0.0 for keep, values in each.items()},
        }
    record = {
        "command": command(),
        "model": subject.label,
        "split": args.split,
        "steps": args.steps,
        "seeds": args.seeds,
        "cosine": means,
        "overlap of neurons": {
            "between seeds, news": overlaps(paths["news"], subject.keeps) if args.seeds > 1 else None,
            "between seeds, Austen": overlaps(paths["Austen"], subject.keeps) if args.seeds > 1 else None,
            "between news and Austen": {k: statistics.mean(one[k] for one in across) for k in across[0]},
            "between random rankings": overlaps(by_chance, subject.keeps),
        },
        "runs": rows,
    }
    write_record(args.out, record)
    print(json.dumps({"cosine": means, "overlap": record["overlap of neurons"]}, indent=1))


if __name__ == "__main__":
    main()
