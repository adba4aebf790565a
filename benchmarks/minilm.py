"""The numbers of the MiniLM pipeline: quality before recovery over seeds, and what things cost.

    python benchmarks/minilm.py --out benchmarks/results/minilm.json

Quality is the mean cosine to the dense embedding on paragraphs of BBC articles that no search and
no choice of a default ever saw. Costs are ratios of runs taken in turns.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch

import pathprune as pp
from models import MiniLM
from pathprune import demo
from pathprune.data import Batch, Batches
from pathprune.evaluation import fidelity, latency
from pathprune.objectives import EmbeddingObjective
from pathprune.searching import SearchConfig, _frozen, _Run
from recording import command, parser, search_settings, write_record


def step_cost(model: Any, batches: list[Batch], rounds: int) -> dict[str, float]:
    """A search step over one forward plus one activation-only backward pass of the dense model, same batch."""
    objective = EmbeddingObjective()
    pairs = pp.find_pairs(model)
    fresh, known, dense = [], [], []
    with _frozen(model):
        run = _Run(model, pairs, Batches(model, batches), objective, SearchConfig(steps=10 * rounds), None, False)
        run.start()
        for batch in islice(iter(Batches(model, batches)), rounds):
            embedded = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
            rest = {key: value for key, value in batch.items() if key != "input_ids"}
            start = time.perf_counter()
            loss = objective.target(model(inputs_embeds=embedded, **rest), batch).sum()
            torch.autograd.grad(loss, embedded)
            dense.append(time.perf_counter() - start)
            with run.attached():
                for taken in (fresh, known):  # the second visit finds the dense model's output remembered
                    start = time.perf_counter()
                    run._step(batch)
                    taken.append(time.perf_counter() - start)
    again = median(b / a for a, b in zip(dense, known, strict=True))
    new = median(b / a for a, b in zip(dense, fresh, strict=True))
    share = len(batches) / SearchConfig().path_steps
    return {
        "dense_forward_backward_seconds": median(dense),
        "step_ratio_batch_seen_before": again,
        "step_ratio_batch_new": new,
        "share_of_new_batches": share,
        "step_ratio_mean": share * new + (1 - share) * again,
    }


def main() -> None:
    args = parser(__doc__, steps=MiniLM.steps, seeds=3).parse_args()
    subject = MiniLM(args.split)
    model, judge = subject.dense, subject.judge
    runs = []
    for seed in range(args.seeds):
        data = subject.batches(seed, args.steps)
        start = time.perf_counter()
        path = pp.search(model, data, steps=args.steps, seed=seed, **search_settings(args))
        seconds = time.perf_counter() - start
        cosine = {}
        for keep in subject.keeps:
            small = pp.slice_model(model, path.select(pp.Budget(keep=keep)))
            cosine[str(keep)] = fidelity(small, judge.dense, judge.unseen)
        runs.append({"seed": seed, "search_seconds": seconds, "cosine": cosine})
        print(json.dumps(runs[-1]))

    selection = path.select(pp.Budget(keep=0.5))
    start = time.perf_counter()
    small = pp.slice_model(model, selection)
    slice_seconds = time.perf_counter() - start
    ids = torch.randint(
        1000, subject.tokenizer.vocab_size, (32, demo.LATENCY_TOKENS), generator=torch.Generator().manual_seed(0)
    )
    dense_ms, small_ms = latency([model, small], {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, seconds=5)
    starts = []
    for _ in range(5):
        start = time.perf_counter()
        subprocess.run([str(Path(sys.executable).with_name("pathprune")), "--help"], check=True, capture_output=True)
        starts.append(time.perf_counter() - start)
    result = {
        "command": command(),
        "split": args.split,
        "steps": args.steps,
        "config": path.config,
        "runs": runs,
        "mean_cosine": {k: mean(run["cosine"][k] for run in runs) for k in runs[0]["cosine"]},
        "step_cost": step_cost(model, data, 20),
        "slice_seconds": slice_seconds,
        "help_seconds": median(starts),
        "latency_batch_32": {"dense_ms": dense_ms, "keep_50_ms": small_ms, "ratio": small_ms / dense_ms},
    }
    write_record(args.out, result)
    print(
        json.dumps(
            {
                key: result[key]
                for key in (
                    "mean_cosine",
                    "step_cost",
                    "slice_seconds",
                    "help_seconds",
                    "latency_batch_32",
                )
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
