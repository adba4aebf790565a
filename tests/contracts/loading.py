"""Load every sliced model in a folder of folders, run it, and save it once more: the work of a fresh process.

    python loading.py FOLDER

Each folder holds ``model`` (as ``save_pretrained`` wrote it), ``class`` and ``options`` (JSON) and ``inputs.pt``.
What came out is left beside them, or the error.
"""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
import transformers

import pathprune  # noqa: F401  (which registers the loader)


def floats(output: Any) -> dict[str, torch.Tensor]:
    return {name: value for name, value in output.items() if torch.is_tensor(value) and value.is_floating_point()}


@torch.no_grad()
def load_and_run(folder: Path) -> None:
    facts = json.loads((folder / "facts.json").read_text())
    inputs = torch.load(folder / "inputs.pt")
    model_class = getattr(transformers, facts["class"])

    def load(dtype: torch.dtype) -> Any:
        return model_class.from_pretrained(folder / "model", dtype=dtype, **facts["options"])

    model = load(torch.float64)
    torch.save(floats(model(**inputs)), folder / "outputs.pt")
    model.save_pretrained(folder / "again")

    half = load(torch.bfloat16)
    wrong = {name for name, parameter in half.named_parameters() if parameter.dtype != torch.bfloat16}
    assert not wrong, f"not in bfloat16: {wrong}"
    inputs = {name: value.bfloat16() if value.is_floating_point() else value for name, value in inputs.items()}
    torch.save(floats(half(**inputs)), folder / "half.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for folder in sorted(Path(sys.argv[1]).iterdir()):
        try:
            load_and_run(folder)
        except Exception:
            (folder / "error.txt").write_text(traceback.format_exc())
