"""Sliced models of other libraries than transformers."""

from __future__ import annotations

import os
import zlib
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from pathprune.errors import ArtifactError, MismatchError
from pathprune.family.artifact import open_regular, read_json
from pathprune.model.contexts import M
from pathprune.transform.modules import shape_attention, shape_modules
from pathprune.transform.record import PathpruneConfig
from pathprune.transform.record_checks import check_record

WEIGHTS, SHAPES = "model.safetensors", "pathprune.json"  # of a model of another library


def load_model(model: M, folder: str | os.PathLike[str]) -> M:
    """Give a model of another library than transformers the shapes and weights that ``save_model`` wrote.

    Args:
        model: the dense model as its own library builds it; changed in place. Its weights do not matter.

    Returns:
        ``model``.

    Raises:
        ArtifactError: the folder holds no such model, or that of another architecture.

    Example:
        >>> class Mlp(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.fc1, self.fc2 = torch.nn.Linear(4, 16), torch.nn.Linear(16, 4)
        ...     def forward(self, x):
        ...         return self.fc2(torch.relu(self.fc1(x)))
        >>> mlp, inputs = Mlp(), {"x": torch.randn(3, 4)}
        >>> pairs = pp.find_pairs(mlp, inputs)
        >>> mlp_path = pp.SolutionPath.from_scores(pairs, {"mlp": torch.rand(1, 16)})
        >>> pp.save_model(pp.slice_model(mlp, mlp_path.select(pp.Budget(keep=0.5))), folder / "mlp")
        >>> pp.load_model(Mlp(), folder / "mlp").fc1.out_features
        8
    """
    folder = Path(folder)
    try:
        described = read_json(folder / SHAPES)
        if not isinstance(described, dict):
            raise ValueError(f"{SHAPES} is not a JSON object")
        recorded = described.pop("tensors", None)  # 0.1.0 wrote none
        config: Any = PathpruneConfig.from_dict(described)
        found = tensor_checksums(folder / WEIGHTS)
        if recorded is not None and recorded != found:
            both = recorded if isinstance(recorded, dict) else {}
            wrong = next(name for name in (*found, *both, "everything") if found.get(name) != both.get(name))
            raise ValueError(f"{wrong} in {WEIGHTS} does not have the recorded checksum; it was altered")
        check_record(model, config.record, doubtful=not config.signed)
        shape_modules(model, config.record)
        safetensors.torch.load_model(model, folder / WEIGHTS)
        shape_attention(model, config.record)
    except (
        OSError,
        ValueError,
        TypeError,
        AttributeError,
        ArtifactError,
        MismatchError,
        RuntimeError,
        SafetensorError,
    ) as error:
        raise ArtifactError(
            f"cannot load {folder} into a {type(model).__name__}: {error}. "
            "Build the model as it was built before it was searched, and give the folder that save_model wrote"
        ) from error
    model.pathprune = config
    return model


def tensor_checksums(weights: Path) -> dict[str, int]:
    """CRC-32 of each tensor of a file.

    Raises:
        ValueError: it holds numbers that are not finite, or none but integers where weights should be.
    """
    open_regular(weights).close()
    found = {}
    with safe_open(weights, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118, it is no dict
            tensor = file.get_tensor(name).contiguous()
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise ValueError(f"{name} in {weights.name} has numbers that are not finite")
            found[name] = zlib.crc32(tensor.flatten().view(torch.uint8).numpy())
    return found
