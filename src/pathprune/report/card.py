"""The README.md of a saved model."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from pathprune.report.record import (
    count,
    dense_member,
    in_words,
    loader,
    megabytes,
    milliseconds,
    recovered,
    settings_lines,
    speed_up,
    title,
)

# What the Hugging Face Hub accepts as the id of a base model.
HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", re.ASCII)


def model_card(family: Mapping[str, Any], member: Mapping[str, Any]) -> str:
    """The model card of one pruned member, in Markdown with YAML front matter.

    Args:
        family: the record of the family (``pathprune.report.record``).
        member: the one of ``family["members"]`` that the card is for; not the dense model.

    Returns:
        The text of ``README.md``.
    """
    name = title(family)
    front = ["library_name: transformers", "tags:", "- pathprune", "- structured-pruning"]
    if HUB_ID.fullmatch(family["model"].get("name") or ""):
        front.append(f"base_model: {json.dumps(family['model']['name'])}")
    front_matter = "\n".join(front)
    metrics = "\n".join(f"- {_text(metric['label'])}: {_text(metric['text'])}" for metric in family["metrics"].values())
    settings = "\n".join(f"- {_text(key)}: {_text(value)}" for key, value in settings_lines(family))
    versions = ", ".join(f"{_text(library)} {_text(version)}" for library, version in family["versions"].items())
    return f"""---
{front_matter}
---

# {_text(name)}, {_text(member["name"])}

{_text(name)} ({_text(family["model"]["architecture"])}) made smaller by structured pruning with pathprune: whole heads,
dimensions of heads and hidden neurons were taken out, so that what is left is dense and needs no special kernels.

{_text(in_words(family, member))}

## Numbers

{_table(family, member)}

Multiply-accumulates are counted per token, at {member["seq_len"]} tokens; latency was measured at
{family["latency_tokens"]} tokens on {_text(str(family["machine"].get("processor", "an unnamed processor")))}.

{metrics}

## How to load it

```python
import pathprune  # teaches transformers to load pruned shapes
from transformers import {loader(family)}

model = {loader(family)}.from_pretrained({json.dumps(member["folder"])})  # the path of this folder
```

## How it was made

One search ranked all prunable units of the dense model; this member keeps
{member["prunable_params_kept_fraction"]:.1%} of the prunable parameters.
{"A recovery followed." if recovered(member) else "No recovery was run."}

{settings}

Made on {_text(family["date"])} with {versions}.
"""


def _table(family: Mapping[str, Any], member: Mapping[str, Any]) -> str:
    dense = dense_member(family)
    rows = [
        ("parameters", count(dense["params"]), count(member["params"])),
        (
            "prunable parameters kept",
            f"{dense['prunable_params_kept_fraction']:.1%}",
            f"{member['prunable_params_kept_fraction']:.1%}",
        ),
        ("multiply-accumulates per token", count(dense["macs_per_token"]), count(member["macs_per_token"])),
        ("size on disk", megabytes(dense["bytes_on_disk"]), megabytes(member["bytes_on_disk"])),
    ]
    for batch, latency in member["latency_ms"].items():
        faster = f"{milliseconds(latency)} ({speed_up(family, member, batch):.2f}×)"
        rows.append((f"latency, batch {batch}", milliseconds(dense["latency_ms"][batch]), faster))
    for key, metric in family["metrics"].items():
        for part, values in member["quality"].items():
            what = f"{metric['label']}, {part} recovery" if recovered(member) else metric["label"]
            rows.append((what, f"{metric['dense']:.3f}", f"{values[key]:.3f}"))
    lines = (f"| {_text(what)} | {before} | {after} |" for what, before, after in rows)
    return "\n".join(["| | dense | this model |", "|---|---:|---:|", *lines])


def _text(text: str) -> str:
    """One line of plain Markdown: names come from users, and must not open a table cell or an HTML tag."""
    return re.sub(r"([\\|<>`])", r"\\\1", " ".join(text.split()))
