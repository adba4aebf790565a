"""What an unfinished search leaves on disk, and whether another may go on with it."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pathprune.data.batches import Batches
from pathprune.errors import MismatchError
from pathprune.family.artifact import remove_artifact
from pathprune.family.pair_list import PairList
from pathprune.family.serialise import base_to_json
from pathprune.objectives.targets import Targets
from pathprune.ranking.config import SearchConfig

CHECKPOINT_FORMAT = 1


RESUMING = {"a finished path": "load it", "an unfinished search": "go on with it"}


def held_search(out: str | os.PathLike[str]) -> str | None:
    """What a folder holds that another search would replace, a key of ``RESUMING``."""
    if (Path(out) / "checkpoint.json").exists():
        return "an unfinished search"
    return "a finished path" if (Path(out) / "path.json").exists() else None


def remove_checkpoint(out: Path) -> None:
    """Of a search that is finished; what cannot be deleted wastes space, and may be resumed to the same end."""
    with suppress(OSError):
        remove_artifact(out, "checkpoint")
        remove_artifact(out, "statistics")


def check_same_search(pairs: PairList, config: SearchConfig, base: Any, settings: Any, out: object) -> None:
    ours = base_to_json(pairs.base)
    if not isinstance(base, dict) or not base or any(ours.get(key) != value for key, value in base.items()):
        raise MismatchError(f"the search in {out} is of another model; resume with the model that it was begun with")
    mine = asdict(config)
    theirs = settings if isinstance(settings, dict) else {}
    if changed := [f"{key}={theirs.get(key)!r}, now {mine[key]!r}" for key in mine if theirs.get(key) != mine[key]]:
        raise MismatchError(
            f"the search in {out} was begun with {'; '.join(changed)}. Resume with the same settings, or search anew"
        )


def data_identity(batches: Batches) -> dict[str, Any]:
    """What tells a search's data from others: their first batch, and how many there are where that is known."""
    data: Any = batches.data
    try:
        count = len(data)
    except TypeError:  # an iterable without a length
        count = None
    return {"first": Targets.key(batches.first).hex(), "batches": count}


def check_same_data(batches: Batches, theirs: Any, out: object) -> None:
    """Refuse other data than a search was begun with; files of earlier releases do not say which that was."""
    if not isinstance(theirs, dict):
        return
    ours = data_identity(batches)
    counts = theirs.get("batches"), ours["batches"]
    if theirs.get("first") != ours["first"]:
        what = "another first batch"
    elif None not in counts and counts[0] != counts[1]:
        what = f"{counts[0]} batches, now {counts[1]}"
    else:
        return
    raise MismatchError(
        f"the search in {out} was begun with other data: {what}. Resume with the same batches in the same order, "
        "or search anew"
    )
