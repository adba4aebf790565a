"""One run recovers every size, as prefixes of one checkpoint, of which a size reads its own bytes only."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, AutoModelForMaskedLM, BertForMaskedLM, BertModel, MixtralConfig, MixtralForCausalLM

import pathprune as pp
from conftest import Subject, assert_same_model, randomise, tiny_inputs
from helpers import VOCAB, tiny_batches, tiny_bert
from pathprune.checkpoint import tensors
from pathprune.evaluation import fidelity
from pathprune.family.path import SolutionPath
from pathprune.objectives.embedding import HiddenObjective
from pathprune.objectives.targets import Targets
from pathprune.recovery.nested import Sizes
from pathprune.transform.sorting import rebased
from pathprune.types import Floats
from test_sorting import path_of

SIZES = (0.75, 0.5, 0.25)


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "compensated"])
def searched(request: pytest.FixtureRequest) -> tuple[BertModel, SolutionPath]:
    """From a search of three steps, which leaves much to recover."""
    model, data = tiny_bert(), tiny_batches(count=12)
    return model, pp.search(model, data, steps=3, multiple=4, progress=False, compensate=request.param)


def losses(model: torch.nn.Module, path: SolutionPath, dense: torch.nn.Module) -> list[float]:
    unseen = tiny_batches(seed=1)
    return [
        1 - fidelity(pp.slice_model(model, path.select(pp.Budget(keep=keep))), dense, unseen) for keep in (*SIZES, 1.0)
    ]


def test_every_size_is_recovered_and_nothing_else_touched(searched: tuple[BertModel, SolutionPath]) -> None:
    dense, path = searched
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    data = tiny_batches(count=40)
    model, again = pp.elastic(dense, path, data=data, steps=150, lr=3e-3, progress=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in dense.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in (*dense.parameters(), *model.parameters()))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert model.config.to_dict() == dense.config.to_dict()
    found, start = losses(model, again, dense), losses(dense, path, dense)
    assert all(a < 0.8 * b for a, b in zip(found[1:3], start[1:3], strict=True))
    assert found[0] < 0.9 * start[0]
    assert found[3] < 1e-6  # the dense model is what it was
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items() if "embed" in name)
    assert again.order.step.keys() == path.order.step.keys()
    np.testing.assert_array_equal(again.order.units, path.order.units)


def test_what_is_trained_is_what_ships(subject: Subject) -> None:
    """The masks and fills of a step are those of the size that the path gives in the end."""
    path = replace(path_of(subject), basis={})
    sizes = Sizes(path, 0.3, torch.device("cpu"))
    with torch.no_grad():
        for tensor in (*sizes.slope.values(), *sizes.shift.values()):
            tensor += 0.1 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0))
    after = sizes.path()
    levels: list[Any] = []
    for step in range(20):
        visited = sizes.visit(step)
        assert visited.budget is not None
        levels.append(visited.budget.keep)
        selection = after.select(visited.budget)
        for pair in path.pairs:
            np.testing.assert_allclose(sizes.masks[pair.name].detach(), selection.mask(pair), rtol=1e-5)
            if pair.name in selection.fill:
                np.testing.assert_array_equal(sizes.fills[pair.name].detach(), selection.fill[pair.name])
            assert (pair.name in sizes.outputs) == (pair.name in selection.output)
            if pair.name in selection.output:
                np.testing.assert_array_equal(sizes.outputs[pair.name], selection.output[pair.name])
    assert 0.3 <= min(levels) < 0.36
    assert 0.94 < max(levels) < 1
    assert abs(np.mean(levels) - 0.65) < 0.03


def test_same_seed_same_weights(searched: tuple[BertModel, SolutionPath]) -> None:
    (one, first), (two, second) = (
        pp.elastic(*searched, data=tiny_batches(), steps=3, progress=False) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    for part in ("fill", "slope", "output", "fill_sum", "delta", "delta_sum"):
        assert getattr(first, part).keys() == getattr(second, part).keys()
        for name, array in getattr(first, part).items():
            np.testing.assert_array_equal(array, getattr(second, part)[name])


def test_the_teacher_is_evaluated(searched: tuple[BertModel, SolutionPath]) -> None:
    """Dropout would be in every remembered target."""
    dense, path = searched
    taught = tiny_bert()
    taught.config.hidden_dropout_prob = 0.5
    for module in taught.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    teacher, (batch, *_) = Targets(taught.train(), HiddenObjective()), tiny_batches()
    pp.elastic(dense, path, data=[batch], validation=[batch], steps=1, teacher=teacher, progress=False)
    assert taught.training
    assert torch.equal(teacher(batch), Targets(taught.eval(), HiddenObjective())(batch))


def test_a_layer_that_the_model_holds_under_two_names() -> None:
    dense = tiny_bert()
    dense.alias = dense.encoder.layer[1].output
    path = pp.SolutionPath.from_scores(
        pairs := pp.find_pairs(dense), {pair.name: np.ones(pair.shape) for pair in pairs}
    )
    model, again = pp.elastic(dense, path, data=tiny_batches(count=12), steps=3, lr=1e-3, progress=False)
    assert all(isinstance(parameter, torch.nn.Parameter) for parameter in model.parameters())
    pp.slice_model(model, again.select(pp.Budget(keep=0.5)))


def test_experts_are_recovered_too() -> None:
    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": 24, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    dense = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=VOCAB, intermediate_size=32, num_local_experts=3, initializer_range=0.3, head_dim=8, **shape
        )
    ).eval()
    data = tiny_batches(count=12)
    dense.set_experts_implementation("eager")  # grouped kernels take no experts of width zero
    path = pp.search(dense, data, steps=10, progress=False)
    assert any(pair.stacked for pair in path.pairs)
    model, again = pp.elastic(dense, path, data=data, steps=120, lr=1e-3, progress=False)
    found, start = losses(model, again, dense), losses(dense, path, dense)
    assert found[0] < start[0]
    assert all(a < 0.9 * b for a, b in zip(found[1:3], start[1:3], strict=True))


@pytest.mark.parametrize("lowest", [0.0, 1.0, -0.5, float("nan")])
def test_a_lowest_size_out_of_range_is_refused(searched: tuple[BertModel, SolutionPath], lowest: float) -> None:
    with pytest.raises(pp.SettingError, match=r"lowest=.* must lie between 0 and 1"):
        pp.elastic(*searched, data=tiny_batches(), lowest=lowest)


def test_bad_input_is_refused(searched: tuple[BertModel, SolutionPath]) -> None:
    dense, path = searched
    with pytest.raises(pp.SettingError, match="steps=0"):
        pp.elastic(dense, path, data=tiny_batches(), steps=0)
    with pytest.raises(pp.DataError, match="data is empty"):
        pp.elastic(dense, path, data=[])
    with pytest.raises(pp.MismatchError, match="belongs to another model"):
        pp.elastic(tiny_bert(seed=3), path, data=tiny_batches())

    class Broken(HiddenObjective):
        def loss(self, outputs: Any, batch: Any, target: Tensor) -> Tensor:
            return super().loss(outputs, batch, target) * float("nan")

    flags = [parameter.requires_grad for parameter in dense.parameters()]
    with pytest.raises(pp.DataError, match="loss is nan on the samples held back"):
        pp.elastic(dense, path, data=tiny_batches(), objective=Broken(), progress=False)
    assert [parameter.requires_grad for parameter in dense.parameters()] == flags


# Loading


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Bytes asked for, by tensor."""
    asked: dict[str, int] = {}

    def count(name: str, tensor: Tensor) -> Tensor:
        asked[name] = asked.get(name, 0) + tensor.numel() * tensor.element_size()
        return tensor

    class Part:
        def __init__(self, part: Any, name: str) -> None:
            self.part, self.name, self.get_shape, self.get_dtype = part, name, part.get_shape, part.get_dtype

        def __getitem__(self, at: Any) -> Tensor:
            return count(self.name, self.part[at])

    class File:
        def __init__(self, *args: Any, **settings: Any) -> None:
            self.file = safe_open(*args, **settings)
            self.keys = self.file.keys

        def __enter__(self) -> File:
            return self

        def __exit__(self, *error: object) -> None:
            pass

        def get_tensor(self, name: str) -> Tensor:
            return count(name, self.file.get_tensor(name))

        def get_slice(self, name: str) -> Part:
            return Part(self.file.get_slice(name), name)

    monkeypatch.setattr(tensors, "safe_open", File)
    return asked


def saved(
    subject: Subject, folder: Path, *, compensated: bool = True, trained: bool = False, **options: Any
) -> tuple[Any, SolutionPath]:
    found = path_of(subject)
    model, path = pp.sort_units(subject.model, found if compensated else replace(found, centre={}, covariance={}))
    if trained:
        rng = np.random.default_rng(0)
        path = rebased(
            replace(path, delta={name: rng.normal(size=p.shape) for name, p in model.named_parameters()}), model
        )
    model.save_pretrained(folder, **options)
    path.save(folder)
    return model, path


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("keep", [1.0, 0.6, 0.25, 0.01])
def test_a_loaded_size_is_the_sliced_one(subject: Subject, keep: float, trained: bool, tmp_path: Path) -> None:
    model, path = saved(subject, tmp_path, trained=trained)
    loaded: Any = pp.load_slice(tmp_path, pp.Budget(keep=keep))
    small = pp.slice_model(model, path.select(pp.Budget(keep=keep)))
    parameters = dict(small.named_parameters())
    assert parameters.keys() == dict(loaded.named_parameters()).keys()
    for name, parameter in loaded.named_parameters():
        assert parameter.dtype == torch.float64
        torch.testing.assert_close(parameter, parameters[name], rtol=1e-12, atol=1e-12)
    expected = subject.output(small)
    assert (subject.output(loaded) - expected).abs().max() < 1e-10 * expected.abs().max()
    assert type(loaded) is type(small)
    loaded.save_pretrained(tmp_path / "again")
    assert_same_model(type(loaded).from_pretrained(tmp_path / "again", dtype="auto"), loaded, subject.inputs)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("compensated", [False, True])
def test_a_size_reads_its_own_bytes(
    subjects: dict[str, Subject], counted: dict[str, int], tmp_path: Path, compensated: bool, trained: bool
) -> None:
    subject = subjects["bert"]
    model, path = saved(subject, tmp_path, compensated=compensated, trained=trained)
    for keep in SIZES:
        counted.clear()
        selection = path.select(pp.Budget(keep=keep))
        pp.load_slice(tmp_path, pp.Budget(keep=keep))
        weights = {slot.module for pair in path.pairs for slot in pair.slots}
        asked = sum(counted[f"{name}.{part}"] for name in weights for part in ("weight", "bias"))
        whole = sum(p.numel() * 8 for name in weights for p in model.get_submodule(name).parameters())
        sample = len(weights) * 2 * 17 * 8  # of every weight and bias, to tell that the path belongs to them
        consumers = sum(pair.consumer.size * 8 for pair in path.pairs if pair.kind != "qk")  # biases of no unit
        assert whole == path.pairs.prunable_params * 8 + consumers
        assert asked <= selection.pair_params * 8 + consumers + sample
        assert asked >= selection.pair_params * 8
        added = sum(counted.get(f"delta/{name}.{part}", 0) for name in weights for part in ("weight", "bias"))
        assert added == trained * (selection.pair_params * 2 + consumers / 4)
        for pair in path.pairs if compensated else []:
            if pair.name not in path.covariance:
                continue
            kept, inner = int(selection.keep[pair.name].sum()), pair.groups * pair.width
            whole = selection.keep[pair.name].all()
            columns = kept if pair.kind == "mlp" else inner  # neurons are a prefix, heads' dimensions are several
            assert counted.get(f"covariance/{pair.name}", 0) <= (0 if whole else kept * columns * 4)
            assert counted.get(f"normal/{pair.name}", 0) == (0 if whole else kept * pair.consumer.size * 8)
    for name, tensor in model.state_dict().items():
        if name in counted and name.rpartition(".")[0] not in weights:
            assert counted[name] <= tensor.numel() * 8 + 17 * 8, "the rest is read once"


def test_shards_are_read_like_one_file(subjects: dict[str, Subject], tmp_path: Path) -> None:
    subject = subjects["llama"]
    saved(subject, tmp_path / "whole")
    saved(subject, tmp_path / "shards", max_shard_size="8KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 2
    one, other = (pp.load_slice(tmp_path / name, pp.Budget(keep=0.5)) for name in ("whole", "shards"))
    assert_same_model(one, other, subject.inputs)


@pytest.mark.parametrize("model_class", [AutoModel, BertModel, AutoModelForMaskedLM, BertForMaskedLM])
def test_loads_with_the_class_that_is_asked_for(subjects: dict[str, Subject], model_class: Any, tmp_path: Path) -> None:
    subject = subjects["bert"]  # searched with its head
    saved(subject, tmp_path)
    loaded = pp.load_slice(tmp_path, pp.Budget(keep=0.5), model_class=model_class)
    whole = pp.load_slice(tmp_path, pp.Budget(keep=0.5))
    assert type(loaded) is (BertModel if model_class in (AutoModel, BertModel) else BertForMaskedLM)
    inputs = tiny_inputs()
    hidden = [model(**inputs, output_hidden_states=True).hidden_states[-1] for model in (loaded, whole)]
    torch.testing.assert_close(*hidden, rtol=1e-10, atol=1e-10)


def test_options_are_those_of_from_pretrained(subjects: dict[str, Subject], tmp_path: Path) -> None:
    saved(subjects["llama"], tmp_path)
    loaded = pp.load_slice(tmp_path, pp.Budget(keep=0.5), dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}


def test_a_folder_without_a_path_or_weights_is_refused(subjects: dict[str, Subject], tmp_path: Path) -> None:
    subject = subjects["bert"]
    subject.model.save_pretrained(tmp_path / "model")
    with pytest.raises(pp.ArtifactError, match=r"path\.json does not exist"):
        pp.load_slice(tmp_path / "model", pp.Budget(keep=0.5))
    saved(subject, tmp_path / "both")
    (tmp_path / "both" / "model.safetensors").unlink()
    with pytest.raises(pp.ArtifactError, match=r"must hold model\.safetensors"):
        pp.load_slice(tmp_path / "both", pp.Budget(keep=0.5))
    (tmp_path / "both" / "config.json").unlink()
    with pytest.raises(pp.ArtifactError, match="cannot build a BertForMaskedLM"):
        pp.load_slice(tmp_path / "both", pp.Budget(keep=0.5))


def test_a_class_that_transformers_lacks_must_be_given(subjects: dict[str, Subject], tmp_path: Path) -> None:
    class OwnBert(BertForMaskedLM):
        pass

    subject = subjects["bert"]
    model = OwnBert(subject.model.config).double().eval()
    model.load_state_dict(subject.model.state_dict())
    pairs = pp.find_pairs(model)
    saved(replace(subject, model=model, pairs=pairs), tmp_path)
    with pytest.raises(pp.ArtifactError, match=r"transformers has no OwnBert, .* pass it as model_class="):
        pp.load_slice(tmp_path, pp.Budget(keep=0.5))
    assert type(pp.load_slice(tmp_path, pp.Budget(keep=0.5), model_class=OwnBert)) is OwnBert


def test_a_path_that_is_not_sorted_is_refused(subjects: dict[str, Subject], tmp_path: Path) -> None:
    subject = subjects["bert"]
    subject.model.save_pretrained(tmp_path)
    path_of(subject).save(tmp_path)
    with pytest.raises(pp.MismatchError, match=r"sort its model once with pathprune\.sort_units"):
        pp.load_slice(tmp_path, pp.Budget(keep=0.5))


@pytest.mark.parametrize("part", ["covariance", "normal", "centre", "delta/", "delta_normal", "delta_sum"])
@pytest.mark.parametrize("wrong", ["shape", "nan", "gone", "gone from one of 0.1.0", "another number"])
def test_a_path_with_broken_moments_is_refused(
    subjects: dict[str, Subject], tmp_path: Path, part: str, wrong: str
) -> None:
    saved(subjects["bert"], tmp_path, trained=True)
    tensors = load_file(next(tmp_path.glob("path-*.safetensors")))
    for name in [name for name in tensors if name.startswith(part)]:
        if wrong.startswith("gone"):
            tensors.pop(name)
        elif wrong == "another number":
            tensors[name].view(-1)[0] += 1
        else:
            tensors[name] = tensors[name][1:] if wrong == "shape" else tensors[name] * float("nan")
    save_file(tensors, next(tmp_path.glob("path-*.safetensors")))
    if wrong == "gone from one of 0.1.0":
        meta = json.loads((tmp_path / "path.json").read_text())
        (tmp_path / "path.json").write_text(
            json.dumps({key: value for key, value in meta.items() if key not in ("sha256", "checksums")})
        )
    message = {
        "another number": "does not have the recorded checksum",
        "gone": "is missing or does not have the recorded checksum|lacks a part",
        "shape": f"{part}.* has shape|a delta for .* which the model has not",
        "nan": "not finite",
        "gone from one of 0.1.0": "covariance/|sort its model once|lacks a part of what was trained",
    }
    with pytest.raises((pp.ArtifactError, pp.MismatchError), match=message[wrong]):
        pp.load_slice(tmp_path, pp.Budget(keep=0.5))
    with pytest.raises(pp.ArtifactError, match="SHA-256"):
        SolutionPath.load(tmp_path)
    (next(tmp_path.glob("path-*.safetensors"))).write_bytes(b"\x08")
    with pytest.raises(pp.ArtifactError, match="is not a readable path"):
        pp.load_slice(tmp_path, pp.Budget(keep=0.5))


def test_what_was_trained_is_part_of_every_size(searched: tuple[BertModel, SolutionPath], tmp_path: Path) -> None:
    dense, path = searched
    model, again = pp.elastic(dense, path, data=tiny_batches(), steps=5, progress=False)
    assert {name for name, _ in model.named_parameters()} - again.delta.keys() == {
        name for name, _ in model.named_parameters() if "_embeddings." in name
    }
    model.save_pretrained(tmp_path)
    again.save(tmp_path)
    plain = AutoModel.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), model.parameters(), strict=True))
    for keep in SIZES:
        budget = pp.Budget(keep=keep)
        small = pp.slice_model(model, again.select(budget))
        loaded = dict(pp.load_slice(tmp_path, budget).named_parameters())
        for name, parameter in small.named_parameters():
            torch.testing.assert_close(loaded[name], parameter, rtol=1e-5, atol=1e-6)
        with torch.no_grad(), pp.masked(model, again.select(budget)):
            torch.testing.assert_close(
                model(**tiny_batches()[0]).last_hidden_state,
                small(**tiny_batches()[0]).last_hidden_state,
                rtol=1e-4,
                atol=1e-4,
            )
    further, once_more = pp.elastic(model, again, data=tiny_batches(), steps=1, lr=1e-9, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(further.parameters(), model.parameters(), strict=True))
    for name, delta in again.delta.items():
        np.testing.assert_allclose(once_more.delta[name], delta, rtol=1e-2, atol=1e-6)


def test_a_delta_for_another_parameter_is_refused(subjects: dict[str, Subject], tmp_path: Path) -> None:
    model, path = saved(subjects["bert"], tmp_path)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    good = next(name for name, _ in model.named_parameters())
    wrongs: list[dict[str, Floats]] = [{"nothing": np.ones(3)}, {good: np.ones(3)}]
    for wrong in wrongs:
        bad = replace(path, delta=wrong)
        with pytest.raises(pp.MismatchError, match="which the model has not"):
            pp.slice_model(model, bad.select(pp.Budget(keep=0.5)))
        bad.save(tmp_path)
        with pytest.raises(pp.MismatchError, match="which the model has not"):
            pp.load_slice(tmp_path, pp.Budget(keep=0.5))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(pp.MismatchError, match="not finite"):
        replace(path, delta={good: np.full(3, 1e9)})  # too large for its 16 bits


def test_a_sorted_path_keeps_its_moments(subjects: dict[str, Subject], tmp_path: Path) -> None:
    _, path = saved(subjects["bert"], tmp_path)
    with pytest.raises(pp.MismatchError, match="leave them out, and sort it again"):
        replace(path, centre={}, covariance={})


def test_other_weights_than_the_path_s_are_refused(subjects: dict[str, Subject], tmp_path: Path) -> None:
    subject = subjects["bert"]
    model, _ = saved(subject, tmp_path)
    other = randomise(type(model)(model.config).double(), seed=9)
    other.save_pretrained(tmp_path)
    with pytest.raises(pp.MismatchError, match="belongs to another model: weights"):
        pp.load_slice(tmp_path, pp.Budget(keep=0.5))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "layer_norm_eps": 0.1}))
    with pytest.raises(pp.MismatchError, match="belongs to another model: configuration"):
        pp.load_slice(tmp_path, pp.Budget(keep=0.5))
