"""Options and arguments that commands share."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from pathprune.errors import BudgetError, SettingError
from pathprune.registry import DYNAMICS, OBJECTIVES

WINDOW = 256  # tokens


LARGEST_SEED = 2**63 - 1


HUB_ID = r"[\w-][\w.-]*(/[\w-][\w.-]*)?"


BYTES = {"": 1, "b": 1} | {
    f"{letter}{suffix}": base**power
    for power, letter in enumerate("kmgt", 1)
    for suffix, base in (("", 1000), ("b", 1000), ("ib", 1024))
}
UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9, "t": 10**12}


def one_of(names: Callable[[], Mapping[str, Any]], *more: str) -> Callable[[str], str]:
    def check(name: str) -> str:
        known = names()
        if name not in known and name not in more:
            hint = getattr(known, "hint", lambda name: "")(name)
            raise typer.BadParameter(f"{name!r} is not one of {', '.join((*more, *known))}{hint}")
        return name

    return check


ModelArg = Annotated[str, typer.Argument(help="Folder or hub id of the dense model.")]


DataOpt = Annotated[
    Path,
    typer.Option(
        help="Texts: a file, one a line (.txt), with a header (.csv, .tsv), or JSON (.json, .jsonl). "
        "Or a folder of images."
    ),
]


POOLED = [f"{name}-{pooling}" for name in ("embedding", "hidden") for pooling in ("mean", "class", "last")]
ObjectiveOpt = Annotated[
    str,
    typer.Option(
        callback=one_of(
            lambda: OBJECTIVES,
            "auto",
            *(f"{name}-{pooling}" for name in ("embedding", "hidden") for pooling in ("mean", "class", "last")),
        ),
        help="What to stay close to: auto goes by what the model returns; embedding or hidden, with -mean, -class or "
        "-last for a pooling; logits; task is the model's own loss, on labels: "
        "of --label-field, of subfolders' names, or the next token.",
    ),
]


PrefixOpt = Annotated[
    str | None, typer.Option(help="What stands before every text, such as 'query: '; by default what the folder says.")
]


FieldOpt = Annotated[str, typer.Option(help="Column or field that holds the text.")]


LabelFieldOpt = Annotated[str, typer.Option(help="Column or field that holds the label, for --objective task.")]


DynamicsOpt = Annotated[
    str, typer.Option(callback=one_of(lambda: DYNAMICS), help="How the path is found: sampled, lbi or spp-released.")
]


UnitOpt = Annotated[
    str,
    typer.Option(
        callback=one_of(lambda: dict.fromkeys(UNIT_KINDS)),
        help="What an attention layer may lose: mixed, dim, shared or head.",
    ),
]
UNIT_KINDS = ("mixed", "dim", "shared", "head")  # of pathprune.family.order, which needs numpy


MaxBadOpt = Annotated[int, typer.Option(min=0, help="Images that may be left out because they cannot be read.")]


BatchOpt = Annotated[
    int | None, typer.Option(min=1, help="Texts or images in a batch: by default 16, of language models 4.")
]


LengthOpt = Annotated[
    int | None,
    typer.Option(
        min=2,
        help="Tokens of a text; longer ones are cut. By default, what holds 95 % of them, at most 512. "
        "Of language models, the window's length, by default 256.",
    ),
]


DeviceOpt = Annotated[str | None, typer.Option(help="cpu, cuda, ...; the default is a GPU where there is one.")]


SeedOpt = Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="Seed of everything random.")]


OverwriteOpt = Annotated[bool, typer.Option("--overwrite", help="Replace what --out holds.")]


JsonOpt = Annotated[bool, typer.Option("--json", help="Print one JSON object, for programs.")]


def parse_size(option: str, text: str | None) -> float | int | None:
    """``0.5`` and ``50%`` are shares, ``18M``, ``1.5B`` and ``18000000`` absolute numbers; of bytes, ``60MB``."""
    if text is None:
        return None
    units, example = (BYTES, "60MB") if option == "--bytes" else (UNITS, "18M, 1.5B")
    found = re.fullmatch(
        rf"([0-9_]+|[0-9_]*\.[0-9]+|[0-9.]+e[+-]?[0-9]+)\s*({'|'.join(sorted(units, reverse=True))}|%)",
        text.strip().lower(),
    )
    try:
        number = float(found[1]) if found else math.nan
    except ValueError:
        number = math.nan
    if not found or not math.isfinite(number):
        absolute = "" if option == "--keep" else f", and no number like {example} or 18000000"
        raise BudgetError(f"{option} {text} is neither a fraction like 0.5 nor 50%{absolute}")
    share = found[2] == "%" or (found[2] == "" and (not found[1].isdigit() or option == "--keep"))
    value = number / 100 if found[2] == "%" else number
    if option == "--keep" and found[2] not in ("", "%"):
        raise BudgetError(
            f"{option} {text} is not in (0, 1]; it is a share of the prunable parameters, like 0.5 or 50%"
        )
    if not share and value * units[found[2]] <= 100:
        raise BudgetError(f"{option} {text} is an absolute number, and no model is that small; a share is 0.5 or 50%")
    if share and found[2] == "" and value > 1 and option != "--keep" and value.is_integer():
        share = False  # 9e7
    if not share:
        return round(value * units[found[2]])
    if not 0 < value <= 1:
        meant = f"; for {number:g} % write {number / 100:g} or {number:g}%" if 1 < number <= 100 else ""
        raise BudgetError(f"{option} {text} is not in (0, 1]{meant or '; half is 0.5 or 50%'}")
    return value


def check_fraction(option: str, value: float) -> None:
    if not 0 < value < 1:
        raise SettingError(f"{option} {value:g} must lie between 0 and 1")


def check_rate(lr: float | None) -> None:
    if lr is not None and not 0 < lr < math.inf:
        raise SettingError(f"--lr {lr:g} must be positive, such as 1e-4")


Bf16Opt = Annotated[bool, typer.Option("--bf16", help="Multiply matrices in bfloat16: faster where the hardware can.")]
