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
MAY_PRINT = {"cli/app.py", "demo.py"}

# The floors of the house, the lowest first: a room may import from floors below its own, and from itself.
FLOORS = [
    {"_version", "errors", "types"},
    {"registry", "progress", "reading", "serving", "versions"},
    {"family"},
    {"model", "report"},
    {"transform", "data", "objectives"},
    {"discovery", "checkpoint", "evaluation"},
    {"ranking", "export"},
    {"recovery"},
    {"cli", "demo"},
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


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
    family = [dotted(file) for file in MODULES if file.startswith("family/")]
    loaded = loaded_by(python, "import " + ", ".join(family))
    assert not loaded & {"torch", "transformers", "timm"}


def test_the_dynamics_need_no_model_library(python: Callable[..., Any]) -> None:
    loaded = loaded_by(python, "import pathprune.ranking.inclusion")
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
    loaded = loaded_by(python, "import pathprune.reading, pathprune.cli.app")
    assert not loaded & {"torch", "transformers", "huggingface_hub", "numpy"}


def test_every_error_is_one_of_ours() -> None:
    from pathprune import errors

    kinds = [value for value in vars(errors).values() if isinstance(value, type)]
    assert all(issubclass(kind, errors.PathpruneError) for kind in kinds)
    assert {kind.__name__ for kind in kinds} <= set(pathprune.__all__)


def room(module: str) -> str:
    """Of a dotted name: ``pathprune.family.order`` is in ``family``."""
    return module.split(".")[1]


def dotted(file: str) -> str:
    return ".".join(["pathprune", *file.removesuffix(".py").split("/")]).removesuffix(".__init__")


def imported(file: str) -> set[str]:
    """Modules of ours that one imports, wherever in it that is."""
    known = {dotted(other) for other in MODULES} - {"pathprune"}
    found = known & set(imports(MODULES[file]))
    # Of ``from package import module`` the module counts, which the package may import itself.
    return {module for module in found if not any(other.startswith(f"{module}.") for other in found)} - {dotted(file)}


@pytest.mark.parametrize("file", sorted(set(MODULES) - {"__init__.py", "_moved.py"}))
def test_nothing_imports_upward(file: str) -> None:
    here = room(dotted(file))
    for module in imported(file):
        assert room(module) == here or {here, room(module)} == {"cli", "demo"} or FLOOR[room(module)] < FLOOR[here], (
            f"{file} imports {module}"
        )


def test_there_are_no_circles() -> None:
    open_: dict[str, set[str]] = {dotted(file): imported(file) for file in MODULES if file != "__init__.py"}
    while free := {module for module, needs in open_.items() if not needs & open_.keys()}:
        for module in free:
            del open_[module]
    packages = {
        module for module in open_ if f"{module.replace('.', '/')}/__init__.py".removeprefix("pathprune/") in MODULES
    }
    assert not open_.keys() - packages, sorted(open_)


def test_files_are_short() -> None:
    lines = {file: len((SOURCE / file).read_text().splitlines()) for file in MODULES}
    assert not {file: count for file, count in lines.items() if count > 350}


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


@pytest.mark.parametrize("old", sorted(pathprune._moved.MOVED))
def test_modules_work_under_their_old_names(old: str, python: Callable[..., Any]) -> None:
    new = pathprune._moved.MOVED[old]
    done = python(
        "import warnings\n"
        "with warnings.catch_warnings(record=True) as heard:\n"
        "    warnings.simplefilter('always')\n"
        f"    import pathprune.{old}\n"
        f"import pathprune.{new}\n"
        f"old, new = vars(pathprune.{old}), vars(pathprune.{new})\n"
        "assert all(old[name] is value for name, value in new.items() if not name.startswith('__'))\n"
        f"assert [f'pathprune.{new} now' in str(one.message) for one in heard] == [True], heard\n"
    )
    assert done.returncode == 0, done.stderr


def test_tests_and_benchmarks_import_public_names_only() -> None:
    root = Path(__file__).parents[1]
    for file in [*root.glob("tests/**/*.py"), *root.glob("benchmarks/**/*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pathprune"):
                private = [name.name for name in node.names if name.name.startswith("_")]
                assert not private, f"{file.name} imports {private} of {node.module}"
