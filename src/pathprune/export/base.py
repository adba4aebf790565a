"""What an exporter is."""

from __future__ import annotations

import os
from typing import Any, Protocol


class Exporter(Protocol):
    """Writes a sliced model for one runtime (``pathprune.registry.EXPORTERS``)."""

    def __call__(self, model: Any, out: str | os.PathLike[str], *, source: str | os.PathLike[str]) -> str:
        """Write the folder ``out``, whole or not at all.

        Args:
            model: sliced, of transformers.
            source: the folder that it was loaded from, whose tokenizer and other small files come along.

        Returns:
            How to open it, a line of Python or of a shell.

        Raises:
            UnsupportedModelError: the runtime cannot run it; says why.
        """
