"""Pictures of a family and of its solution path, as SVG text that can stand inside a page.

Every function returns one ``<svg>`` element: deterministic, with its text as text, for a light ground of the page's
own (the page inverts it for a dark one), in colours that stay apart for colour-blind readers (Okabe and Ito's, and maps
of even lightness). Names are never read as mathematical markup.
"""

from __future__ import annotations

import functools
import html
import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ParamSpec

import matplotlib
import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.cm import ScalarMappable
from matplotlib.colorbar import Colorbar
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, PercentFormatter

from pathprune.family.budget import Budget
from pathprune.family.pairs import Pair
from pathprune.family.path import SolutionPath
from pathprune.report.record import dense_member, layer_labels, milliseconds, recovered, smaller_members, speed_up

BLUE, ORANGE, GREEN, VERMILLION, SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9"
INK, SOFT, FAINT = "#22272e", "#6b7480", "#d5dae1"

KINDS = {"qk": "query–key", "vo": "value–output", "mlp": "MLP"}
KIND_COLOURS = {"qk": SKY, "vo": GREEN, "mlp": ORANGE}
BATCH_COLOURS = (BLUE, SKY, GREEN, ORANGE, VERMILLION)

# Without viridis' bright end, which is hard to see as a line or a dot on white.
DEPTH = LinearSegmentedColormap.from_list("depth", matplotlib.colormaps["viridis"](np.linspace(0, 0.88, 64)))

LEVELS = np.linspace(0.1, 1.0, 40)

# Points of a line beyond what a page can show only make it heavy.
MOST_STEPS = 400

STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "figure.constrained_layout.use": True,
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#eceff3",
    "text.color": INK,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
}

P = ParamSpec("P")


def as_svg(draw: Callable[P, Figure]) -> Callable[P, str]:
    """Turn a function that draws a figure into one that returns it as SVG; the docstring's first line names it."""

    @functools.wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> str:
        # Ids are hashes with a salt: one for each function, or the pictures of a page would share some.
        with style.context(["default", STYLE, {"svg.hashsalt": draw.__name__}]):
            buffer = io.StringIO()
            figure = draw(*args, **kwargs)
            nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
            FigureCanvasSVG(figure)
            figure.savefig(buffer, format="svg", metadata=nothing)
        svg = buffer.getvalue()
        svg = svg[svg.index("<svg") :]
        used = set(re.findall(r"#([\w.-]+)", svg))
        svg = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in used else "", svg)
        label = html.escape((draw.__doc__ or "").partition(".")[0])
        # On a narrow screen a picture shrinks as far as its text can be read; then its card scrolls.
        narrowest = f"{0.6 * 72 * figure.get_figwidth():.0f}pt"
        return svg.replace("<svg", f'<svg role="img" aria-label="{label}" style="min-width: {narrowest}"', 1)

    return drawn


@as_svg
def quality_by_size(family: Mapping[str, Any]) -> Figure:
    """Quality against size: one panel per metric, one line per stage.

    Args:
        family: the record of a family (``pathprune.report.record``).
    """
    metrics = family["metrics"]
    rows = math.ceil(len(metrics) / 3)
    columns = math.ceil(len(metrics) / rows)
    figure = Figure(figsize=(max(5.0, 3.2 * columns), 2.9 * rows + 0.3))
    members = sorted(family["members"], key=lambda member: member["params"])
    sizes = [member["params"] / 1e6 for member in members]
    # Dense stands on both lines: nothing was removed from it, so that there is nothing to recover.
    lines = [("before", ORANGE, "o", "without recovery")]
    if any(map(recovered, smaller_members(family))):
        lines = [("before", ORANGE, "o", "before recovery"), ("after", BLUE, "s", "after recovery")]
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, (key, metric) in zip(grid, metrics.items(), strict=False):
        axes.axhline(metric["dense"], color=SOFT, linewidth=1, linestyle=(0, (2, 2)), label="dense")
        for part, colour, marker, label in lines:
            points = [
                (size, member["quality"][part][key])
                for size, member in zip(sizes, members, strict=True)
                if part in member["quality"]
            ]
            axes.plot(*zip(*points, strict=True), color=colour, marker=marker, markersize=5, label=label)
        for size, member in zip(sizes, members, strict=True):
            if member["folder"] is not None:
                above = member["quality"]["before"][key] > metric["dense"]
                outer = (max if above else min)(values[key] for values in member["quality"].values())
                beside = (6, 4) if above else (6, -9)  # on the side that the lines do not come back to
                axes.annotate(
                    member["name"], (size, outer), beside, textcoords="offset points", fontsize=7.5, color=SOFT
                )
        axes.set_title(metric["label"])
        axes.margins(x=0.08, y=0.12)
        axes.xaxis.set_major_locator(MaxNLocator(5))
    for axes in grid[len(metrics) :]:
        axes.set_axis_off()
    figure.supxlabel("parameters of the whole model (millions)", fontsize=9)
    figure.legend(*grid[0].get_legend_handles_labels(), loc="outside upper left", ncols=3)
    return figure


@as_svg
def solution_path(path: SolutionPath) -> Figure:
    """The solution path: L1 norm of Gamma over search steps, one line per layer.

    Args:
        path: its trajectory may be empty.
    """
    norms = path.trajectory.gamma_l1  # (S, P)
    if not len(norms):
        return _nothing("This path holds no search steps, so that there is no trajectory to draw.")
    kinds = _by_kind(path)
    figure = Figure(figsize=(10.5, 3.3))
    grid = figure.subplots(1, len(kinds), squeeze=False)[0]
    steps = np.unique(np.linspace(0, len(norms) - 1, MOST_STEPS).astype(int))
    for axes, (kind, pairs) in zip(grid, kinds.items(), strict=True):
        for depth, pair in zip(np.linspace(0, 1, len(pairs)), pairs, strict=True):
            column = path.pairs.index(pair)
            axes.plot(steps + 1, norms[steps, column], color=DEPTH(depth), linewidth=1.4)
        axes.set_title(KINDS[kind])
        axes.set_ylim(bottom=0)
    grid[0].set_ylabel("‖Γ‖₁")
    figure.supxlabel("search step", fontsize=9)
    labels = layer_labels([pair.name for pair in max(kinds.values(), key=len)])
    ticks = np.unique(np.linspace(0, len(labels) - 1, 8).astype(int))
    bar = _colour_bar(figure, ScalarMappable(Normalize(0, max(1, len(labels) - 1)), DEPTH), grid)
    bar.set_ticks(ticks.tolist(), labels=[labels[tick] for tick in ticks])
    return figure


@as_svg
def loss_by_level(path: SolutionPath) -> Figure:
    """Loss of the masks that the search visited, by the share of the model that they kept.

    Args:
        path: its trajectory may be empty.
    """
    loss, level = path.trajectory.loss, path.trajectory.level  # (S,), (S,)
    if not len(loss):
        return _nothing("This path holds no search steps, so that there are no losses to draw.")
    figure = Figure(figsize=(6.4, 3.6))
    axes = figure.subplots()
    steps = ScalarMappable(Normalize(1, len(loss)), DEPTH)
    axes.scatter(level, loss, c=steps.to_rgba(np.arange(1, len(loss) + 1)), s=16, alpha=0.85, linewidths=0)
    if (loss > 0).all():
        log_axis(axes, loss)
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_xlabel("prunable parameters kept")
    axes.set_ylabel("loss")
    _colour_bar(figure, steps, axes).set_label("search step")
    return figure


@as_svg
def kept_widths(path: SolutionPath, fractions: Sequence[float]) -> Figure:
    """Share of every layer that stays, for each share of the prunable parameters kept.

    Args:
        path: any solution path.
        fractions: of the prunable parameters, in (0, 1], to be marked: the family's members.
    """
    kinds = _by_kind(path)
    tallest = max(len(pairs) for pairs in kinds.values())
    figure = Figure(figsize=(10.5, 1.3 + 0.26 * tallest))
    grid = figure.subplots(1, len(kinds), squeeze=False)[0]
    selections = [path.select(Budget(keep=float(level))) for level in LEVELS]
    half = (LEVELS[1] - LEVELS[0]) / 2
    for axes, (kind, pairs) in zip(grid, kinds.items(), strict=True):
        share = [[chosen.kept(pair) / (pair.groups * pair.units) for chosen in selections] for pair in pairs]
        image = axes.imshow(
            share,
            cmap="YlGnBu",
            vmin=0,
            vmax=1,
            aspect="auto",
            interpolation="none",
            extent=(LEVELS[0] - half, LEVELS[-1] + half, len(pairs) - 0.5, -0.5),
        )
        for fraction in fractions:
            if LEVELS[0] - half <= fraction < 1:
                axes.axvline(fraction, color=VERMILLION, linewidth=1.3, linestyle=(0, (4, 2)))
        axes.grid(False)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        axes.set_yticks(range(len(pairs)), layer_labels([pair.name for pair in pairs]))
        axes.set_xticks([0.25, 0.5, 0.75, 1.0])
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.set_title(KINDS[kind])
    figure.supxlabel("prunable parameters kept", fontsize=9)
    bar = _colour_bar(figure, image, grid)
    bar.formatter = PercentFormatter(1, decimals=0)
    bar.set_label("share of the layer's units kept")
    return figure


@as_svg
def widths_by_layer(family: Mapping[str, Any]) -> Figure:
    """Widths of every layer of every member.

    Args:
        family: the record of a family (``pathprune.report.record``).
    """
    full = dense_member(family)["widths"]
    named = {kind: [name for name in full if name.endswith(f".{kind}")] for kind in KINDS}
    kinds = [kind for kind, names in named.items() if names]
    label = {name: text for kind in kinds for name, text in zip(named[kind], layer_labels(named[kind]), strict=True)}
    rows = list(dict.fromkeys(label[name] for name in full))  # an attention and an MLP of one label share a row
    members = family["members"]
    figure = Figure(figsize=(max(6.0, 0.9 + 2.45 * len(members)), 0.8 + 0.3 * len(rows)))
    grid = figure.subplots(1, len(members), squeeze=False, sharey=True)[0]
    for axes, member in zip(grid, members, strict=True):
        for name, (all_heads, all_width) in full.items():
            heads, width = member["widths"][name]
            kind = name.rpartition(".")[2]
            x, y = kinds.index(kind), rows.index(label[name])
            share = heads * width / (all_heads * all_width)
            axes.barh(y, 0.92, left=x, height=0.82, color="#f1f3f6")
            axes.barh(y, 0.92 * share, left=x, height=0.82, color=KIND_COLOURS[kind], alpha=0.6)
            text = "none" if not heads * width else f"{width}" if kind == "mlp" else f"{heads} × {width}"
            axes.text(x + 0.46, y, text, ha="center", va="center", fontsize=8)
        axes.set_title(member["name"])
        axes.set_xticks([x + 0.46 for x in range(len(kinds))], [KINDS[kind] for kind in kinds], fontsize=8)
        axes.set_yticks(range(len(rows)), rows)
        axes.set_xlim(-0.04, len(kinds))
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.grid(False)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
    return figure


@as_svg
def latency(family: Mapping[str, Any]) -> Figure:
    """Measured latency of every member, as a share of the dense model's, beside the share of arithmetic left.

    Args:
        family: the record of a family (``pathprune.report.record``).
    """
    members = smaller_members(family)
    dense = dense_member(family)["latency_ms"]
    figure = Figure(figsize=(max(7.6, 1.5 + 1.5 * len(members)), 3.4))
    axes = figure.subplots()
    wide = 0.8 / len(dense)
    for i, batch in enumerate(dense):
        times = [1 / speed_up(family, member, batch) for member in members]
        at = np.arange(len(members)) - 0.4 + wide * (i + 0.5)
        bars = axes.bar(
            at,
            times,
            0.94 * wide,
            color=BATCH_COLOURS[i % len(BATCH_COLOURS)],
            alpha=0.75,
            label=f"batch {batch} (dense: {milliseconds(dense[batch])})",
        )
        axes.bar_label(bars, [f"{1 / time:.2f}×" for time in times], padding=2, fontsize=8)
    for i, member in enumerate(members):
        macs = member["macs_fraction_of_whole_model"]
        label = f"multiply-accumulates, at {member['seq_len']} tokens" if i == 0 else None
        axes.plot([i - 0.45, i + 0.45], [macs, macs], color=INK, linewidth=2, solid_capstyle="butt", label=label)
    axes.axhline(1, color=SOFT, linewidth=1, linestyle=(0, (2, 2)))
    axes.set_xticks(range(len(members)), [member["name"] for member in members])
    axes.tick_params(axis="x", length=0)
    axes.grid(axis="x", visible=False)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_ylabel("share of the dense model's")
    axes.margins(y=0.08)
    figure.legend(loc="outside upper left", ncols=3)
    return figure


def _by_kind(path: SolutionPath) -> dict[str, list[Pair]]:
    """The path's pairs by kind, in forward order; kinds that the model lacks are left out."""
    kinds = {kind: [pair for pair in path.pairs if pair.kind == kind] for kind in KINDS}
    return {kind: pairs for kind, pairs in kinds.items() if pairs}


def _colour_bar(figure: Figure, colours: ScalarMappable, axes: Any) -> Colorbar:
    bar = figure.colorbar(colours, ax=axes, aspect=25, pad=0.015)
    bar.outline.set_visible(False)
    return bar


def _nothing(why: str) -> Figure:
    figure = Figure(figsize=(6.4, 0.8))
    figure.text(0.5, 0.5, why, ha="center", va="center", color=SOFT)
    return figure


def log_axis(axes: Axes, values: Any) -> None:
    """A logarithmic y axis with plain numbers (powers would be set as mathematics), dense enough to read off."""
    axes.set_yscale("log")
    narrow = values.max() < 30 * values.min()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if narrow else (1,)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
