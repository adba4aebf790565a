"""Models of timm, bare and in transformers' wrapper; ``.ci/run`` gives them an environment of their own."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForImageClassification, TimmWrapperConfig
from transformers import TimmWrapperForImageClassification as Classifier
from transformers import TimmWrapperModel as Wrapper

import pathprune
from conftest import Python, randomise, snapshot
from pathprune.checkpoint.other_libraries import load_model
from pathprune.checkpoint.save import save_model
from pathprune.discovery.discover import find_pairs
from pathprune.errors import ArtifactError, UnsupportedModelError
from pathprune.family.pair_list import PairList
from pathprune.transform.masks import masked
from pathprune.transform.slicing import slice_model
from strategies import CASES, selection_of

timm = pytest.importorskip("timm")

EXACT = 1e-10

VIT = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3, "mlp_ratio": 1.5, "num_classes": 5}
SWIN = {
    "img_size": 32,  # 8 x 8 patches: the first stage has four windows, shifted in its second block; the second has one
    "patch_size": 4,
    "window_size": 4,
    "embed_dim": 16,
    "depths": (2, 1),
    "num_heads": (2, 4),
    "mlp_ratio": 1.5,
    "drop_path_rate": 0.0,  # layers dropped at random would have no gradients
    "num_classes": 5,
}

# name -> (architecture, arguments of timm.create_model)
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit_tiny_patch16_224", VIT),
    "vit without class token": ("vit_tiny_patch16_224", {**VIT, "class_token": False, "global_pool": "avg"}),
    "vit with query-key norm": ("vit_tiny_patch16_224", {**VIT, "qk_norm": True}),
    "vit with LayerScale": ("vit_tiny_patch16_224", {**VIT, "init_values": 0.1}),
    "deit": ("deit_tiny_patch16_224", VIT),
    "deit distilled": ("deit_tiny_distilled_patch16_224", VIT),
    "swin": ("swin_tiny_patch4_window7_224", SWIN),
}
DEPTH = {"swin": 3}


@dataclass(frozen=True)
class Subject:
    """A tiny random model in float64 and eval mode; tests leave it as it is."""

    name: str
    model: Any
    inputs: dict[str, Tensor]
    pairs: PairList

    def output(self, model: nn.Module | None = None) -> Tensor:
        return run(model or self.model, self.inputs)


@torch.no_grad()
def run(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    output = model(**inputs)
    return output if isinstance(output, Tensor) else output[0]


def gap(one: Tensor, other: Tensor) -> float:
    """Largest difference, relative to the second's largest value."""
    assert one.shape == other.shape
    assert torch.isfinite(one).all()
    return float((one - other).abs().max() / other.abs().max())


def create(row: str, **changes: Any) -> Any:
    architecture, arguments = ROWS[row]
    return timm.create_model(architecture, pretrained=False, **{**arguments, **changes}).double().eval()


def images(row: str) -> Tensor:
    size = ROWS[row][1]["img_size"]
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def wrap(row: str, wrapper: type[Any]) -> Any:
    architecture, arguments = ROWS[row]
    own = {name: value for name, value in arguments.items() if name != "num_classes"}
    labels: dict[str, Any] = {"num_labels": arguments["num_classes"]}
    config = TimmWrapperConfig(architecture=architecture, model_args=own, **labels)
    return wrapper(config).double().eval()


@pytest.fixture(scope="module")
def bare_subjects() -> dict[str, Subject]:
    def subject(row: str) -> Subject:
        model, inputs = randomise(create(row)), {"x": images(row)}
        return Subject(row, model, inputs, find_pairs(model, inputs))

    return {row: subject(row) for row in ROWS}


@pytest.fixture(scope="module")
def wrapped_subjects() -> dict[tuple[str, type[Any]], Subject]:
    def subject(row: str, wrapper: type[Any]) -> Subject:
        model, inputs = randomise(wrap(row, wrapper)), {"pixel_values": images(row)}
        return Subject(row, model, inputs, find_pairs(model, inputs))

    return {(row, wrapper): subject(row, wrapper) for row in ROWS for wrapper in (Wrapper, Classifier)}


@pytest.fixture(params=ROWS)
def bare(request: pytest.FixtureRequest, bare_subjects: dict[str, Subject]) -> Subject:
    return bare_subjects[request.param]


@pytest.fixture(params=[Wrapper, Classifier])
def wrapped(
    request: pytest.FixtureRequest, bare: Subject, wrapped_subjects: dict[tuple[str, type[Any]], Subject]
) -> Subject:
    return wrapped_subjects[bare.name, request.param]


def assert_every_layer_is_offered(subject: Subject) -> None:
    depth = DEPTH.get(subject.name, 2)
    assert Counter(pair.kind for pair in subject.pairs) == {"qk": depth, "vo": depth, "mlp": depth}
    assert subject.pairs.refused == {}


def assert_sliced_is_masked(subject: Subject, case: str) -> None:
    dense = subject.output()
    for seed in range(2):
        selection = selection_of(subject.pairs, case, seed=seed)
        small = slice_model(subject.model, selection)
        with masked(subject.model, selection):
            expected = subject.output()
        assert gap(subject.output(small), expected) < EXACT
        if case != "full":
            assert gap(expected, dense) > 1e-3
            parameters = [sum(p.numel() for p in model.parameters()) for model in (small, subject.model)]
            assert parameters[0] < parameters[1]


def test_every_layer_of_a_bare_model_is_offered(bare: Subject) -> None:
    assert_every_layer_is_offered(bare)


def test_every_layer_of_a_wrapped_model_is_offered(wrapped: Subject) -> None:
    assert_every_layer_is_offered(wrapped)


def test_a_wrapped_model_needs_no_inputs(wrapped: Subject) -> None:
    assert list(find_pairs(wrapped.model)) == list(wrapped.pairs)


def test_finding_pairs_changes_nothing(bare: Subject) -> None:
    before = snapshot(bare.model)
    find_pairs(bare.model, bare.inputs)
    assert snapshot(bare.model) == before


@pytest.mark.parametrize("case", CASES)
def test_a_sliced_bare_model_is_the_masked_one(bare: Subject, case: str) -> None:
    assert_sliced_is_masked(bare, case)


@pytest.mark.parametrize("case", CASES)
def test_a_sliced_wrapped_model_is_the_masked_one(wrapped: Subject, case: str) -> None:
    assert_sliced_is_masked(wrapped, case)


@pytest.mark.parametrize("case", CASES)
def test_fused_attention_may_be_switched(bare: Subject, case: str) -> None:
    """With and without it, timm takes the attention's scale from different places."""
    small = slice_model(bare.model, selection_of(bare.pairs, case))
    expected = bare.output(small)
    switched = 0
    module: Any
    for module in small.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = not module.fused_attn
            switched += 1
    assert switched == DEPTH.get(bare.name, 2)
    assert gap(bare.output(small), expected) < EXACT


@pytest.mark.parametrize("case", CASES)
def test_gradients_reach_every_parameter(bare: Subject, case: str) -> None:
    selection = selection_of(bare.pairs, case)
    small = slice_model(bare.model, selection).train()
    outputs = small(**bare.inputs)
    sum(output.square().mean() for output in (outputs if isinstance(outputs, tuple) else (outputs,))).backward()
    for name, parameter in small.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.shape == parameter.shape
    for pair in bare.pairs:
        for slot in pair.slots if selection.kept(pair) else ():
            assert small.get_parameter(f"{slot.module}.weight").grad.abs().max() > 0, slot.module


@pytest.mark.parametrize("case", CASES)
def test_a_bare_model_comes_back_from_its_shapes_and_weights(bare: Subject, case: str, tmp_path: Path) -> None:
    """Without a configuration to write into, shapes and weights are two files."""
    small = slice_model(bare.model, selection_of(bare.pairs, case))
    save_model(small, tmp_path / "small")
    again = load_model(create(bare.name), tmp_path / "small")
    assert gap(bare.output(again), bare.output(small)) < 1e-14


@pytest.mark.parametrize("case", CASES)
def test_a_wrapped_model_saves_and_loads_natively(wrapped: Subject, case: str, tmp_path: Path) -> None:
    small = slice_model(wrapped.model, selection_of(wrapped.pairs, case))
    small.save_pretrained(tmp_path)
    auto = AutoModel if isinstance(small, Wrapper) else AutoModelForImageClassification
    again = auto.from_pretrained(tmp_path, dtype=torch.float64)
    assert type(again) is type(small)
    shapes = {name: parameter.shape for name, parameter in small.named_parameters()}
    assert {name: parameter.shape for name, parameter in again.named_parameters()} == shapes
    assert gap(wrapped.output(again), wrapped.output(small)) < 1e-14


def test_a_fresh_process_loads_wrapped_models(
    wrapped_subjects: dict[tuple[str, type[Any]], Subject], tmp_path: Path, python: Python
) -> None:
    folders = []
    for (row, wrapper), subject in wrapped_subjects.items():
        folder = tmp_path / f"{row} {wrapper.__name__}"
        small = slice_model(subject.model, selection_of(subject.pairs, "uneven"))
        small.save_pretrained(folder)
        save_file({**subject.inputs, "expected": subject.output(small).contiguous()}, folder / "case.safetensors")
        folders.append(folder)
    done = python(
        "import sys, pathlib\n"
        "import pathprune, torch, transformers\n"
        "from safetensors.torch import load_file\n"
        "for folder in map(pathlib.Path, sys.argv[1:]):\n"
        "    name, = transformers.AutoConfig.from_pretrained(folder).architectures\n"
        "    model = getattr(transformers, name).from_pretrained(folder, dtype=torch.float64)\n"
        "    case = load_file(folder / 'case.safetensors')\n"
        "    with torch.no_grad():\n"
        "        error = (model(case['pixel_values'])[0] - case['expected']).abs().max()\n"
        "    assert error < 1e-12, (folder, error)\n"
        "    print('equal')\n",
        *folders,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["equal"] * len(folders)


def test_a_sliced_model_is_exported(bare: Subject) -> None:
    small = slice_model(bare.model, selection_of(bare.pairs, "uneven"))
    exported = torch.export.export(small, (), bare.inputs).module()
    assert gap(run(exported, bare.inputs), bare.output(small)) < EXACT


def test_the_whole_pipeline_runs_on_pictures_alone(bare: Subject) -> None:
    model = copy.deepcopy(bare.model).float()
    data = [{"x": images(bare.name).float() + i} for i in range(4)]
    path = pathprune.search(model, data, steps=12, seed=0)
    half = path.select(pathprune.Budget(keep=0.5))
    small = pathprune.slice_model(model, half)
    with masked(model, half):
        expected = run(model, data[0])
    assert gap(run(small, data[0]), expected) < 1e-5
    recovered = pathprune.recover(small, teacher=model, data=data, validation=data, steps=10)
    assert [p.shape for p in recovered.parameters()] == [p.shape for p in small.parameters()]
    assert gap(run(recovered, data[0]), run(small, data[0])) > 1e-4


def test_a_bare_model_is_saved_and_loaded(bare: Subject, tmp_path: Path) -> None:
    small = slice_model(bare.model, selection_of(bare.pairs, "uneven"))
    pathprune.save_model(small, tmp_path / "small")
    assert sorted(file.name for file in (tmp_path / "small").iterdir()) == ["model.safetensors", "pathprune.json"]
    again = pathprune.load_model(create(bare.name), tmp_path / "small")
    assert gap(bare.output(again), bare.output(small)) < 1e-14
    pathprune.save_model(again, tmp_path / "small")  # over itself
    for sliced in (small, again):
        with pytest.raises(UnsupportedModelError, match="already sliced"):
            find_pairs(sliced, bare.inputs)
    with pytest.raises(ArtifactError, match="Build the model as it was built"):
        pathprune.load_model(create(bare.name, num_classes=6), tmp_path / "small")
    with pytest.raises(ArtifactError, match="give the folder that save_model wrote"):
        pathprune.load_model(create(bare.name), tmp_path)
