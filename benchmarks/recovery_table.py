"""What recovery gives, by size, steps and samples, on four real models: quality on data that it never saw.

    python benchmarks/recovery_table.py --model minilm --out benchmarks/results/recovery-minilm.json

One search a model; every row is one recovery of one size. A run that was cut off goes on: rows that the record holds
are not run again (name a folder with ``--path``, so that they are of one search). Quality is that of ``models.py``, and
for the classifier (MiniLM with five classes, fitted here to 500 articles with their topics) one minus the divergence
from the dense model's distribution, on paragraphs of articles that neither the fit, the search nor the recovery saw.
"""

from __future__ import annotations

import json
import random
import time
import warnings
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import materials
import pathprune as pp
from models import DINOv2, MiniLM, SmolLM2, pictures, windows
from pathprune import demo
from pathprune.data import Batch, tokenized
from pathprune.evaluation import fidelity
from recording import command, parser, write_record

SEARCH_STEPS = 100


class Sentences(MiniLM):
    """MiniLM-L6 as a sentence encoder; a sample is a text of up to 48 tokens, 16 to a batch."""

    def samples(self, count: int) -> list[Batch]:
        return demo.calibration(self.tokenizer)[: count // 16]


class Topics:
    """A five-class classifier on MiniLM-L6; a sample is a text of up to 48 tokens, 8 to a batch."""

    label = "MiniLM-L6 with five classes"
    objective = "logits"

    def __init__(self, split: str) -> None:
        source = demo.minilm()
        self.tokenizer = AutoTokenizer.from_pretrained(source)
        known = demo.bbc_articles("search")
        names = sorted({topic for topic, _ in known})
        torch.manual_seed(0)
        self.dense = AutoModelForSequenceClassification.from_pretrained(source, num_labels=len(names))
        self.fit([(names.index(topic), text) for topic, text in known[:500]])
        self.searched = self.dense
        self.texts = [text for _, text in known[500:900]] + demo.passages(known[500:])
        self.unseen = tokenized(demo.passages(demo.bbc_articles(split))[:512], self.tokenizer, batch_size=32)
        held_out = demo.bbc_articles(split)
        self.topics = torch.tensor([names.index(topic) for topic, _ in held_out])
        self.articles = tokenized([text for _, text in held_out], self.tokenizer, batch_size=32, max_length=64)

    def fit(self, articles: list[tuple[int, str]]) -> None:
        """Four passes with AdamW."""
        optimizer = torch.optim.AdamW(self.dense.parameters(), lr=5e-5)
        self.dense.train()
        for epoch in range(4):
            random.Random(epoch).shuffle(articles)
            for start in range(0, len(articles), 16):
                part = articles[start : start + 16]
                (batch,) = tokenized([text for _, text in part], self.tokenizer, max_length=64)
                labels = torch.tensor([topic for topic, _ in part])
                loss = F.cross_entropy(self.dense(**batch).logits, labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        self.dense.eval()

    def batches(self, seed: int, steps: int) -> list[Batch]:
        return self.samples(400)

    def samples(self, count: int) -> list[Batch]:
        return tokenized(self.texts[:count], self.tokenizer, batch_size=8, max_length=48)

    @torch.inference_mode()
    def quality(self, model: nn.Module) -> dict[str, float]:
        guess = torch.cat([model(**batch).logits.argmax(1) for batch in self.articles])
        found = fidelity(model, self.dense, self.unseen)
        return {"loss": 1 - found, "fidelity": found, "accuracy": float((guess == self.topics).double().mean())}


class Pictures(DINOv2):
    """DINOv2-S; a sample is an image, 8 to a batch."""

    def samples(self, count: int) -> list[Batch]:
        return pictures(self.images[:count], 8, self.dense.device)


class Windows(SmolLM2):
    """SmolLM2-135M; a sample is a window of 128 tokens, one to a batch."""

    def __init__(self, split: str) -> None:
        super().__init__(split, measured=24)

    def samples(self, count: int) -> list[Batch]:
        return windows(AutoTokenizer.from_pretrained(materials.smollm2()), "search", 1, 128)[:count]


SUBJECTS: dict[str, Any] = {"minilm": Sentences, "classifier": Topics, "dinov2": Pictures, "smollm2": Windows}


def main() -> None:
    arguments = parser(__doc__, steps=SEARCH_STEPS, seeds=1)
    arguments.add_argument("--model", choices=SUBJECTS, required=True)
    arguments.add_argument("--keeps", type=float, nargs="+", default=[0.75, 0.5])
    arguments.add_argument("--recover-steps", type=int, nargs="+", default=[50, 300, 1000])
    arguments.add_argument("--samples", type=int, nargs="+", default=[400, 5000])
    arguments.add_argument("--lr", type=float, nargs="+", default=[None], help="by default what recover chooses")
    arguments.add_argument("--path", type=Path, help="folder that keeps the search's path between runs")
    args = arguments.parse_args()

    subject = SUBJECTS[args.model](args.split)
    if args.path is not None and (args.path / "path.json").exists():
        path = pp.SolutionPath.load(args.path)
    else:
        batches = subject.batches(0, args.steps)
        settings: dict[str, Any] = {"lowest_level": 0.4}
        path = pp.search(
            subject.searched, batches, objective=subject.objective, steps=args.steps, out=args.path, **settings
        )
    rows: list[dict[str, Any]] = []
    if args.path is not None and args.out is not None and args.out.exists():
        rows = json.loads(args.out.read_text())["rows"]
    done = {(row["keep"], row["samples"], row["steps"], row["lr"]) for row in rows}
    record = {
        "command": command(),
        "model": subject.label,
        "split": args.split,
        "search_steps": args.steps,
        "dense": subject.quality(subject.dense),
        "rows": rows,
    }
    data = {count: subject.samples(count) for count in args.samples}
    for keep in args.keeps:
        small = pp.slice_model(subject.dense, path.select(pp.Budget(keep=keep)))
        before = subject.quality(small)
        for count, steps, lr in product(args.samples, args.recover_steps, args.lr):
            if (keep, count, steps, lr) in done:
                continue
            began = time.perf_counter()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # nothing gained: the row says so
                after: Any = pp.recover(small, teacher=subject.dense, data=data[count], steps=steps, lr=lr)
            outcome = after.recovery
            rows.append(
                {
                    "keep": keep,
                    "samples": count,
                    "steps": steps,
                    "seconds": time.perf_counter() - began,
                    "lr": lr,
                    "before": before,
                    "after": subject.quality(after),
                    "held_out": {
                        "samples": outcome.samples,
                        "before": outcome.before[0],
                        "after": outcome.after[0],
                        "kept": outcome.kept,
                        "run": outcome.steps,
                        "lr": outcome.lr,
                    },
                }
            )
            print(json.dumps(rows[-1]), flush=True)
            write_record(args.out, record)  # hours may pass until the last


if __name__ == "__main__":
    main()
