"""Models by folder or hub id."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from pathprune.cli.options import HUB_ID
from pathprune.errors import PathpruneError

CODE = "modeling_pathprune.py"  # as pathprune.checkpoint.standalone names it, which needs torch


def check_model(name: str) -> None:
    """That there is such a model, before anything slow: a folder of one, or an id that the hub knows.

    Raises:
        PathpruneError: there is none.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        if (folder / "adapter_config.json").exists():
            raise PathpruneError(
                f"{name} is an adapter (LoRA or the like); merge it into its model first, "
                "model.merge_and_unload().save_pretrained(FOLDER), and give that folder"
            )
        if not (folder / "config.json").exists():
            inside = [file.parent for file in sorted(folder.glob("*/config.json"))]
            what = (
                "is the folder of a search, not of a model" if (folder / "path.json").exists() else "is no model folder"
            )
            beside = f"; is it {inside[0]}?" if inside else ""
            raise PathpruneError(f"cannot load a model from {name}: it {what}, it has no config.json{beside}")
        if (folder / CODE).exists():
            raise PathpruneError(
                f"{name} is an export, which opens by code of its own, not run here; give the folder that it was "
                "made from"
            )
        return
    if folder.exists():
        raise PathpruneError(f"cannot load a model from {name}: it is a file; give the folder that it is in")
    if not re.fullmatch(HUB_ID, name, re.ASCII):
        raise PathpruneError(f"cannot load a model from {name}: no such folder")
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import GatedRepoError, OfflineModeIsEnabled, RepositoryNotFoundError

    if isinstance(try_to_load_from_cache(name, "config.json"), str):
        return
    no = f"cannot load a model from {name}: there is no folder of that name here, and"
    try:
        # Asked once: transformers would try six times, and not say what it looked for.
        get_hf_file_metadata(hf_hub_url(name, "config.json"), timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except OfflineModeIsEnabled:
        raise PathpruneError(f"{no} not in the hub's cache either (HF_HUB_OFFLINE forbids to ask the hub)") from None
    except GatedRepoError:
        raise PathpruneError(
            f"{no} the hub gives {name} only to whom it has granted access; log in: hf auth login"
        ) from None
    except RepositoryNotFoundError:
        raise PathpruneError(f"{no} the hub has no such model, or does not show it to you (hf auth login)") from None
    except Exception as error:  # of the HTTP client, whose kinds change with the hub's library
        raise PathpruneError(f"{no} the hub could not be asked: {error}") from None


def load_dense(name: str, device: str | None) -> Any:
    """A model by folder or hub id, ready to run: with the head that the checkpoint holds, or none."""
    import torch

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        if torch.empty(1, device=device).is_meta:
            raise PathpruneError(f"cannot run on --device {device}: it holds no numbers; use cpu, cuda or the like")
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise PathpruneError(f"cannot run on --device {device}: {str(error).partition(chr(10))[0]}") from None
    import transformers
    from transformers.utils import logging

    from pathprune.serving import served

    logging.disable_progress_bar()
    name = str(Path(name).expanduser()) if name.startswith("~") else name
    try:
        config = transformers.AutoConfig.from_pretrained(name)
        kind = getattr(transformers, (config.architectures or ["AutoModel"])[0], transformers.AutoModel)
        if served(name, fetch=True):  # a sentence encoder is used without the head that some checkpoints hold
            kind = transformers.AutoModel
        model, found = kind.from_pretrained(name, output_loading_info=True)
        if found["missing_keys"]:  # a configuration that names a head, and weights without it
            model = transformers.AutoModel.from_pretrained(name)
        return model.to(device).eval()
    except Exception as error:  # of any kind: the files are the user's, and each library has its own
        raise PathpruneError(f"cannot load a model from {name!r}: {error}") from error
