"""The page that shows a family to people: one file, readable without a network or scripts."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pathprune.errors import PathpruneError
from pathprune.family.files import write_text
from pathprune.family.path import SolutionPath
from pathprune.report import record


def write_report(folder: str | os.PathLike[str]) -> Path:
    """Write ``<folder>/report.html`` from ``<folder>/family.json`` and the path in ``<folder>/path``.

    A report that is there is replaced once the new one is complete.

    Returns:
        Where the report is.

    Raises:
        ArtifactError: the record or the path is missing or malformed, or the folder cannot be written.
        PathpruneError: Jinja2 or matplotlib, the extra ``report``, is not installed.
    """
    for library in ("jinja2", "matplotlib"):
        if find_spec(library) is None:
            raise PathpruneError(f"a report needs {library}, which is not installed: pip install 'pathprune[report]'")
    family = record.read_family(folder)
    page = _page(family, SolutionPath.load(Path(folder) / "path"))
    target = Path(folder) / "report.html"
    write_text(target, page)
    return target


def _page(family: Mapping[str, Any], path: SolutionPath) -> str:
    # Not at the top: whoever imports pathprune.report for a model card need not wait for these.
    import jinja2
    from markupsafe import Markup

    from pathprune.report.template import PAGE

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "count": record.count,
        "megabytes": record.megabytes,
        "milliseconds": record.milliseconds,
        "percent": "{:.1%}".format,
    }
    smaller = record.smaller_members(family)
    return environment.from_string(PAGE).render(
        family=family,
        title=record.title(family),
        summary=_summary(family),
        dense=record.dense_member(family),
        smaller=smaller,
        headline=next(iter(family["metrics"])),
        batches=sorted(record.dense_member(family)["latency_ms"], key=int),
        recovery=any(map(record.recovered, smaller)),
        recovered=record.recovered,
        reached=record.reached,
        speed_up=lambda member, batch: record.speed_up(family, member, batch),
        pictures=[(heading, Markup(svg), caption) for heading, svg, caption in _pictures(family, path)],
        loader=record.loader(family),
        made=[
            ("Settings", record.settings_lines(family)),
            ("Time", _times(family["seconds"])),
            ("Machine", family["machine"].items()),
            ("Versions", family["versions"].items()),
        ],
    )


def _summary(family: Mapping[str, Any]) -> str:
    """One paragraph: where the family comes from, and what its largest and its smallest member offer."""
    model, smaller = family["model"], sorted(record.smaller_members(family), key=lambda member: -member["params"])
    key, metric = next(iter(family["metrics"].items()))
    sentences = [
        f"One search ranked what can be removed from {record.title(family)}: "
        f"{record.count(model['prunable_params'])} of its {record.count(model['params'])} parameters."
    ]
    for member in smaller[:: max(1, len(smaller) - 1)]:
        size = f"{member['name']} keeps {member['params_fraction_of_whole_model']:.0%} of all parameters"
        speed = ""
        if member["latency_ms"]:
            batch = max(member["latency_ms"], key=int)
            speed = f" and runs {record.speed_up(family, member, batch):.1f} times as fast at batch {batch}"
        recovery = "after" if record.recovered(member) else "without"
        sentences.append(
            f"{size}{speed}, with {metric['label']} at {record.reached(member)[key]:.3f} {recovery} recovery "
            f"(dense: {metric['dense']:.3f})."
        )
    return " ".join(sentences)


def _times(seconds: Mapping[str, float]) -> Iterable[tuple[str, str]]:
    for part, time in seconds.items():
        yield part, f"{time:.0f} s" if time < 120 else f"{time / 60:.1f} min"


def _pictures(family: Mapping[str, Any], path: SolutionPath) -> list[tuple[str, str, str]]:
    """(heading, SVG, how to read it)."""
    from pathprune.report import plots

    smaller = record.smaller_members(family)
    pictures = [
        (
            "Quality against size",
            plots.quality_by_size(family),
            "Each point is a model, from the smallest at the left to the dense one at the right; the dotted line is "
            "the dense model's own value, from which smaller ones may stray either way (the vertical axes do not start "
            "at zero).",
        ),
        (
            "What each model kept",
            plots.widths_by_layer(family),
            "Each bar is the share of a layer's units that stays; for attention the numbers are heads × dimensions "
            "of each head, for the MLP hidden neurons.",
        ),
        (
            "Where width goes as models shrink",
            plots.kept_widths(path, [member["prunable_params_kept_fraction"] for member in smaller]),
            "Read from right to left, every row shows how one layer narrows as less of the model is kept; a row that "
            "keeps the colour of 100% for long matters most, and the dashed lines mark the models above.",
        ),
    ]
    if record.dense_member(family)["latency_ms"]:
        speed = (
            "Speed",
            plots.latency(family),
            f"Bars are measured latency at {family['latency_tokens']} tokens as a share of the dense model's, with the "
            "speed-up above; a bar that ends at the thick line is as fast as its arithmetic promises, a taller one is "
            "slower.",
        )
        pictures.insert(1, speed)
    if not len(path.trajectory.loss):
        return pictures
    if path.config.get("dynamics") != "sampled":  # which starts from a ranking, not from zero: its lines would be flat
        solution = (
            "The solution path",
            plots.solution_path(path),
            "Each line is one layer, coloured by depth: the higher it stands and the earlier it leaves zero, the "
            "more of that layer's units the search found worth keeping (the panels have scales of their own).",
        )
        pictures.append(solution)
    losses = (
        "Loss along the search",
        plots.loss_by_level(path),
        "Each dot is one step of the search, coloured by when it came; where late dots lie below early ones, the "
        "search found better units to keep at that size.",
    )
    pictures.append(losses)
    return pictures
