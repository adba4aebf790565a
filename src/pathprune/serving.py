"""How a sentence encoder is used: what a folder of sentence-transformers says beside the weights."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pathprune.errors import ArtifactError

POOLINGS = {"mean": "mean", "mean_sqrt_len_tokens": "mean", "cls": "class", "lasttoken": "last"}  # cosines see no scale
OLD_POOLINGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}


@dataclass(frozen=True)
class Served:
    """How a sentence encoder is used.

    Attributes:
        pooling: ``"mean"`` of the real tokens, ``"class"`` (the first) or ``"last"``; another name of
            sentence-transformers, or several joined by ``+``, where it is none of these.
        prefix: what is put before a text unless its caller says otherwise; often empty.
        prompts: name -> what callers may ask for by that name.
        max_length: in tokens, at which texts are cut; None where only the model sets a limit.
        lower_case: whether texts are put into small letters first.
    """

    pooling: str
    prefix: str
    prompts: dict[str, str]
    max_length: int | None
    lower_case: bool


def served(source: str | os.PathLike[str], *, fetch: bool = False) -> Served | None:
    """What a model's folder says of its use; None where it says nothing.

    Args:
        source: folder, or hub id.
        fetch: ask the hub for files that are not in its cache.

    Raises:
        ArtifactError: a file is not what sentence-transformers writes.
    """
    modules = _json(source, "modules.json", fetch)
    if not isinstance(modules, list):
        return None
    try:
        paths = {module["type"].rpartition(".")[2]: module["path"] for module in modules}
        if "Pooling" not in paths:
            return None
        pooling = _json(source, f"{paths['Pooling']}/config.json", fetch) or {}
        root = f"{paths['Transformer']}/" if paths.get("Transformer") else ""
        text = _json(source, f"{root}sentence_bert_config.json", fetch) or {}
        use = _json(source, "config_sentence_transformers.json", fetch) or {}
        named = (
            pooling.get("pooling_mode") or [mode for key, mode in OLD_POOLINGS.items() if pooling.get(key)] or "mean"
        )
        modes = [named] if isinstance(named, str) else list(named)
        prompts = {str(name): str(prompt) for name, prompt in (use.get("prompts") or {}).items()}
        return Served(
            pooling=POOLINGS.get(modes[0], modes[0]) if len(modes) == 1 else "+".join(modes),
            prefix=prompts.get(use.get("default_prompt_name") or "", ""),
            prompts=prompts,
            max_length=None if text.get("max_seq_length") is None else int(text["max_seq_length"]),
            lower_case=bool(text.get("do_lower_case")),
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ArtifactError(
            f"{source}: modules.json, or a file that it names, is not as sentence-transformers writes it: {error!r}. "
            "Load and save the model with sentence-transformers, or remove modules.json"
        ) from error


def _json(source: str | os.PathLike[str], name: str, fetch: bool) -> Any:
    """Content of a model's file; None where there is none."""
    from huggingface_hub import try_to_load_from_cache
    from transformers.utils.hub import cached_file

    path: Any = Path(source, name)
    if not Path(source).is_dir():
        quiet = {
            f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "gated_repo", "connection_errors")
        }
        try:
            path = cached_file(source, name, **quiet) if fetch else try_to_load_from_cache(str(source), name)
        except (OSError, ValueError):  # neither a folder nor a hub id
            return None
    if not isinstance(path, str | os.PathLike) or not os.path.isfile(path):
        return None
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} cannot be read as JSON: {error}") from error
