"""Other packages add layouts, objectives and budgets, and no file of ours changes (``plugin`` is such a package)."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
import torch

import pathprune as pp
from helpers import tiny_batches, tiny_bert
from pathprune.errors import SettingError, UnsupportedModelError
from pathprune.registry import BUDGETS, OBJECTIVES, Registry

PLUGIN = Path(__file__).parent / "plugin"


def test_an_installed_package_brings_its_own(python: Callable[..., Any], tmp_path: Path) -> None:
    done = python(
        """
import sys
sys.path.append(sys.argv[1])
import torch, pathprune as pp
from house_plugin import Reader
torch.manual_seed(0)
model = Reader().eval()
ids = torch.randint(0, 30, (4, 6))
pairs = pp.find_pairs(model, {"input_ids": ids})
assert [pair.name for pair in pairs] == ["gazes.0.qk", "gazes.0.vo", "gazes.1.qk", "gazes.1.vo"], pairs
path = pp.search(model, [{"input_ids": ids}], objective="first-token", steps=21, multiple=1, progress=False)
assert path.config["objective"] == "first-token"
selection = path.select(pp.Budget(widest=15))
widths = [heads * width for heads, width in map(selection.widths, path.pairs)]
assert max(widths) <= 15 < 24, widths
small = pp.slice_model(model, selection)
with torch.no_grad(), pp.masked(model, selection):
    expected = model(ids)
torch.testing.assert_close(small(ids), expected, rtol=1e-4, atol=1e-5)
from pathprune.registry import EXPORTERS
how = EXPORTERS["numbers"](small, sys.argv[2], source="")
assert how.startswith("cat "), how
print(sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters()))
""",
        PLUGIN,
        tmp_path / "numbers",
    )
    assert (tmp_path / "numbers" / "numbers.txt").read_text().isdigit()
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "True"


@pytest.fixture
def plugin() -> Any:
    """Its module, without what says that it is installed."""
    spec = spec_from_file_location("house_plugin", PLUGIN / "house_plugin.py")
    assert spec
    assert spec.loader
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_layout_for_one_call(plugin: Any) -> None:
    inputs = {"input_ids": torch.arange(8).reshape(2, 4)}
    with pytest.raises(UnsupportedModelError, match="no attention or MLP in a known layout"):
        pp.find_pairs(plugin.Reader(), inputs)
    assert len(pp.find_pairs(plugin.Reader(), inputs, layouts=[plugin.find_gaze])) == 4


def test_an_objective_that_a_program_registers(plugin: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OBJECTIVES, "_values", dict(OBJECTIVES._values))

    class First(plugin.FirstToken):  # type: ignore[misc]
        name = "first"

        def target(self, outputs: Any, batch: Any) -> Any:
            return super().target(outputs[0], batch)

        def loss(self, outputs: Any, batch: Any, target: Any) -> Any:
            return super().loss(outputs[0], batch, target)

        def probe(self, outputs: Any, batch: Any, noise: Any) -> Any:
            return super().probe(outputs[0], batch, noise)

    OBJECTIVES.register("first", lambda model: First())
    path = pp.search(tiny_bert(), tiny_batches(), objective="first", steps=21, progress=False)
    assert path.config["objective"] == "first"
    with pytest.raises(SettingError, match="the objective 'task' is there already"):
        OBJECTIVES.register("task", lambda model: First())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            lambda: pp.Budget(parms=0.5),
            r"budget 'parms' is not one of keep, params, macs, bytes.*did you mean 'params'\?",
        ),
        (
            lambda: pp.search(tiny_bert(), tiny_batches(), objective="embeding"),
            r"is not one of auto, embedding, .*; did you mean 'embedding'\?",
        ),
        (
            lambda: pp.search(tiny_bert(), tiny_batches(), dynamics="sampeld"),
            r"dynamics='sampeld' is not one of .*; did you mean 'sampled'\?",
        ),
    ],
)
def test_unknown_names_get_what_was_meant(wrong: Callable[[], Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        wrong()


def test_a_registry_imports_what_is_asked_for_only() -> None:
    numbers: Registry[Any] = Registry("number", "numbers", {"pi": "math:pi", "broken": "nowhere:nothing"})
    assert numbers["pi"] == 3.141592653589793
    assert list(numbers) == ["pi", "broken"]
    assert "e" not in numbers
    with pytest.raises(SettingError, match=r"number 'e' is not one of pi, broken$"):
        numbers["e"]
    assert {*BUDGETS} >= {"keep", "params", "macs", "bytes"}
