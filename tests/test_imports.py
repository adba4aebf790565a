"""What may import what, what may print, and that nothing is pickled."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import pathprune

SOURCE = Path(pathprune.__file__).parent
MODULES = {str(file.relative_to(SOURCE)): ast.parse(file.read_text()) for file in sorted(SOURCE.rglob("*.py"))}
MAY_PRINT = {"cli.py", "demo.py"}

LIGHT = ("pairs", "order", "artifact", "budget", "path")


def imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
            yield from (f"{node.module}.{name.name}" for name in node.names)


def names(tree: ast.AST) -> Iterator[str]:
    """Dotted names that are read, such as ``torch.load``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute | ast.Name):
            yield ast.unparse(node)


def loaded_by(python: Callable[..., Any], statement: str) -> set[str]:
    done = python(f"{statement}\nimport sys; print(*sorted(sys.modules))")
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_importing_pathprune_is_light(python: Callable[..., Any]) -> None:
    assert not loaded_by(python, "import pathprune") & {"torch", "transformers", "timm", "numpy"}


def test_what_reads_paths_needs_neither_torch_nor_transformers(python: Callable[..., Any]) -> None:
    loaded = loaded_by(python, "import " + ", ".join(f"pathprune.{name}" for name in LIGHT))
    assert not loaded & {"torch", "transformers", "timm"}


def test_the_dynamics_need_no_model_library(python: Callable[..., Any]) -> None:
    loaded = loaded_by(python, "import pathprune.inclusion")
    assert "torch" in loaded
    assert not loaded & {"transformers", "timm"}


def test_all_public_names_resolve() -> None:
    assert list(pathprune.__all__) == sorted(pathprune.__all__)
    for name in pathprune.__all__:
        assert getattr(pathprune, name).__name__ == name
    assert set(pathprune.__all__) <= set(dir(pathprune))
    with pytest.raises(AttributeError, match=r"module 'pathprune' has no attribute 'prune'"):
        pathprune.prune  # noqa: B018


def test_modules_are_there_without_an_import_of_their_own(python: Callable[..., Any]) -> None:
    done = python(
        "import pathprune as pp, sys\nassert 'data' in dir(pp)\nprint(pp.data.tokenized, pp.evaluation.fidelity)"
    )
    assert done.returncode == 0, done.stderr


def test_looking_at_data_needs_no_model_library(python: Callable[..., Any]) -> None:
    loaded = loaded_by(python, "import pathprune.reading, pathprune.cli")
    assert not loaded & {"torch", "transformers", "huggingface_hub", "numpy"}


def test_every_error_is_one_of_ours() -> None:
    from pathprune import errors

    kinds = [value for value in vars(errors).values() if isinstance(value, type)]
    assert all(issubclass(kind, errors.PathpruneError) for kind in kinds)
    assert {kind.__name__ for kind in kinds} <= set(pathprune.__all__)


@pytest.mark.parametrize(
    "module",
    ["slicing.py", "shapes.py", "experts.py", "masks.py", "discovery.py", "hub.py", "basis.py", "inclusion.py"],
)
def test_the_spine_does_not_import_the_search(module: str) -> None:
    assert not {"pathprune.searching", "pathprune.search", "pathprune.dynamics"} & set(imports(MODULES[module]))


@pytest.mark.parametrize("module", sorted(set(MODULES) - MAY_PRINT))
def test_only_the_command_line_prints(module: str) -> None:
    assert not {"print", "sys.stdout.write", "sys.stdout"} & set(names(MODULES[module]))


@pytest.mark.parametrize("module", sorted(MODULES))
def test_nothing_is_pickled(module: str) -> None:
    tree = MODULES[module]
    roots = {name.split(".")[0] for name in imports(tree)}
    assert not roots & {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    assert not {"torch.load", "torch.save", "np.load", "np.save", "eval", "exec"} & set(names(tree))
    assert "allow_pickle" not in ast.unparse(tree)
