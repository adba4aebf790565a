"""For transformers without pathprune: a folder that brings the little code it needs."""

from __future__ import annotations

import os
from typing import Any

from pathprune.checkpoint.save import save_model


def export(model: Any, out: str | os.PathLike[str], *, source: str | os.PathLike[str]) -> str:
    """See ``Exporter``."""
    name = type(model).__name__
    save_model(model, out, source=source, standalone=True)
    return f"AutoModel.from_pretrained({str(out)!r}, trust_remote_code=True)  # or the Auto class of {name}"
