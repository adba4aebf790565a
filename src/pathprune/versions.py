"""Versions of what a result depends on."""

from __future__ import annotations

from importlib import metadata

from pathprune._version import __version__


def library_versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    versions = {"pathprune": __version__}
    for name in ("torch", "transformers", "safetensors", "numpy"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "unknown"
    return versions
