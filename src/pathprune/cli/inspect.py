"""``pathprune inspect``."""

from __future__ import annotations

import typer

from pathprune.cli.models import check_model, load_dense
from pathprune.cli.options import (
    JsonOpt,
    ModelArg,
)
from pathprune.cli.output import print_json, shell_word


def inspect(model: ModelArg, as_json: JsonOpt = False) -> None:
    """Show what can be pruned in a model, and what cannot and why."""
    check_model(model)
    from pathprune.discovery.discover import find_pairs

    dense = load_dense(model, "cpu")
    pairs = find_pairs(dense)
    share = pairs.prunable_params / pairs.base.params
    if as_json:
        from pathprune.family.serialise import base_to_json, pair_to_json

        print_json(
            base=base_to_json(pairs.base),
            prunable_params=pairs.prunable_params,
            prunable_fraction=share,
            pairs=[pair_to_json(pair) for pair in pairs],
            refused=pairs.refused,
        )
        return
    typer.echo(
        f"{pairs.base.architecture}: {pairs.prunable_params:,} of {pairs.base.params:,} parameters "
        f"({share:.1%}) are prunable"
    )
    typer.echo(f"{'pair':<44} {'kind':<4} {'heads':>5} {'width':>6} {'params':>12}")
    for pair in pairs:
        typer.echo(f"{pair.name:<44} {pair.kind:<4} {pair.groups:>5} {pair.width:>6} {pair.params:>12,}")
    for name, reason in pairs.refused.items():
        typer.echo(f"refused {name}: {reason}")
    data = "IMAGES" if getattr(dense, "main_input_name", "") == "pixel_values" else "TEXTS"
    typer.echo(f"\nNext: pathprune search {shell_word(model)} --data {data} --out run")
