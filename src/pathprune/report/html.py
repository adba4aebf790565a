"""The page that shows a family to people: one file, readable without a network or scripts."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pathprune.errors import ArtifactError
from pathprune.path import SolutionPath
from pathprune.report import record


def write_report(folder: str | os.PathLike[str]) -> Path:
    """Write ``<folder>/report.html`` from ``<folder>/family.json`` and the path in ``<folder>/path``.

    A report that is there is replaced, when the new one is complete.

    Returns:
        Where the report is.

    Raises:
        ArtifactError: the record or the path is missing or malformed, or the folder cannot be written.
    """
    family = record.read_family(folder)
    path = SolutionPath.load(Path(folder) / "path")
    target = Path(folder) / "report.html"
    part = target.with_name(f".report.html.{os.getpid()}.part")
    try:
        part.write_text(_page(family, path), encoding="utf-8")
        os.replace(part, target)
    except OSError as error:
        raise ArtifactError(
            f"cannot write {target}: {error.strerror or error}. Free some space, or choose a folder that you may write to"
        ) from error
    finally:
        part.unlink(missing_ok=True)
    return target


def _page(family: Mapping[str, Any], path: SolutionPath) -> str:
    # Here and not above: both take a while to import, and whoever only asks for --help should not wait.
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
    return environment.from_string(PAGE).render(
        family=family,
        title=record.title(family),
        dense=record.dense_member(family),
        smaller=record.smaller_members(family),
        any_recovered=any(record.recovered(member) for member in record.smaller_members(family)),
        summary=_summary(family),
        speed_up=lambda member, batch: record.speed_up(family, member, batch),
        loader=record.loader(family),
        settings=list(record.settings_lines(family)),
        pictures=[(heading, Markup(svg), caption) for heading, svg, caption in _pictures(family, path)],
    )


def _summary(family: Mapping[str, Any]) -> str:
    """One paragraph: where the family comes from, and its mildest and its smallest member."""
    model, smaller = family["model"], record.smaller_members(family)
    smaller.sort(key=lambda member: member["params"], reverse=True)
    sentences = [
        f"One search ranked the {record.count(model['prunable_params'])} prunable ones among the "
        f"{record.count(model['params'])} parameters of {record.title(family)}, and so gave "
        f"{len(smaller)} smaller {'models' if len(smaller) > 1 else 'model'}."
    ]
    sentences += [record.in_words(family, member) for member in smaller]
    return " ".join(sentences)


def _pictures(family: Mapping[str, Any], path: SolutionPath) -> list[tuple[str, str, str]]:
    """(heading, SVG, how to read it)."""
    from pathprune.report import plots

    [member["prunable_params_kept_fraction"] for member in record.smaller_members(family)]
    return [
        (
            "Quality against size",
            plots.quality_by_size(family),
            "Each point is a model of the family, from the smallest at the left to the dense one at the right; "
            "the higher a line stays above the other, the more the recovery gave back. The vertical axes do not start at zero.",
        )
    ]
