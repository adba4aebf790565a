"""What a search step, slicing, running and starting cost. MiniLM; its quality is measured by ``frontier.py``.

python benchmarks/costs.py --out benchmarks/results/costs.json
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

import pathprune as pp
from models import MiniLM
from pathprune import demo
from pathprune.data.batches import Batch, Batches
from pathprune.evaluation import latency
from pathprune.objectives.embedding import EmbeddingObjective
from pathprune.ranking.config import SearchConfig
from pathprune.ranking.covariance import gather
from recording import command, parser, search_settings, write_record


def step_cost(model: Any, batches: list[Batch], rounds: int) -> dict[str, float]:
    """A search step over one forward plus one activation-only backward pass of the dense model, same batch."""
    objective = EmbeddingObjective()
    fresh: list[float] = []
    known: list[float] = []
    dense: list[float] = []
    # The second visit to a batch finds the dense model's output remembered.
    twice = [batch for batch in batches[:rounds] for _ in range(2)]
    config = SearchConfig(steps=12 * rounds)  # 2 of 12 measure curvature, which is all of ``twice``, once
    with pp.Search(model, twice, config, objective=objective) as search:
        search.start()
        for batch in batches[:rounds]:
            embedded = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
            rest = {key: value for key, value in batch.items() if key != "input_ids"}
            start = time.perf_counter()
            loss = objective.target(model(inputs_embeds=embedded, **rest), batch).sum()
            torch.autograd.grad(loss, embedded)
            dense.append(time.perf_counter() - start)
        search.problem.targets.known.clear()  # what gathering statistics has seen
        for _ in range(rounds):
            for taken in (fresh, known):
                start = time.perf_counter()
                search.step()
                taken.append(time.perf_counter() - start)
    return {
        "dense_forward_backward_seconds": median(dense),
        "step_ratio_batch_seen_before": median(b / a for a, b in zip(dense, known, strict=True)),
        "step_ratio_batch_new": median(b / a for a, b in zip(dense, fresh, strict=True)),
    }


def main() -> None:
    args = parser(__doc__, steps=100, seeds=1).parse_args()
    subject = MiniLM(args.split)
    model, data = subject.dense, subject.batches(0, args.steps)
    start = time.perf_counter()
    path = pp.search(model, data, steps=args.steps, **search_settings(args))
    seconds = time.perf_counter() - start
    start = time.perf_counter()
    gather(model, path.pairs, Batches(model, data), path.basis, count=len(data), progress=None)
    gather_seconds = time.perf_counter() - start
    selection = path.select(pp.Budget(keep=0.5))
    start = time.perf_counter()
    pp.slice_model(model, replace(selection, centre={}, covariance={}))
    slice_seconds = time.perf_counter() - start
    start = time.perf_counter()
    small = pp.slice_model(model, selection)
    compensated_seconds = time.perf_counter() - start
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
        "model": subject.label,
        "search": {"steps": args.steps, "batches": len(data), "seconds": seconds},
        "gather_seconds": gather_seconds,
        "step_cost": step_cost(model, data, 20),
        "slice_seconds": {"plain": slice_seconds, "compensated": compensated_seconds},
        "help_seconds": median(starts),
        "latency_batch_32": {"dense_ms": dense_ms, "keep_50_ms": small_ms, "ratio": small_ms / dense_ms},
    }
    write_record(args.out, result)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
