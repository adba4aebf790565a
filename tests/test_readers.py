"""Whatever stands in a file: what was written, or one error that says what is wrong."""

from __future__ import annotations

import importlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForMaskedLM, BertForMaskedLM, BertModel

import pathprune as pp
from alterations import altered, damaged
from helpers import tiny_batches, tiny_bert
from pathprune.checkpoint import hf
from pathprune.checkpoint.other_libraries import load_model
from pathprune.checkpoint.save import save_model
from pathprune.errors import ArtifactError, MismatchError, PathpruneError
from pathprune.transform.modules import matched_record, shape_modules
from pathprune.transform.record import PathpruneConfig
from pathprune.transform.record_checks import check_record
from pathprune.types import Floats

RANDOMS = st.randoms(use_true_random=False)
BATCH = tiny_batches(1)[0]
LAYER = "encoder.layer.0.attention"


class Other(nn.Module):
    """A model of no library."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(6, 16), nn.Linear(16, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(torch.relu(self.fc1(x)))


def random_path(pairs: Any) -> pp.SolutionPath:
    rng = np.random.default_rng(0)
    return pp.SolutionPath.from_scores(pairs, {pair.name: rng.random(pair.shape) for pair in pairs}, multiple=2)


def output(model: nn.Module, inputs: dict[str, Tensor] = BATCH) -> Tensor:
    with torch.no_grad():
        found = model.eval()(**inputs)
    return found if isinstance(found, Tensor) else found[0]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders: a path, a sliced model, an elastic one, and one of no library."""
    work = tmp_path_factory.mktemp("written")
    model = tiny_bert()
    path = random_path(pp.find_pairs(model))
    path.save(work / "path")
    save_model(pp.slice_model(model, path.select(pp.Budget(keep=0.5))), work / "sliced")
    trained, elastic = pp.elastic(
        model, pp.search(model, tiny_batches(4), steps=3, progress=False), data=tiny_batches(4), steps=2, progress=False
    )
    trained.save_pretrained(work / "elastic")
    elastic.save(work / "elastic")
    other, inputs = Other(), {"x": torch.randn(2, 6)}
    save_model(
        pp.slice_model(other, random_path(pp.find_pairs(other, inputs)).select(pp.Budget(keep=0.5))), work / "other"
    )
    return {name: work / name for name in ("path", "sliced", "elastic", "other")}


def copied(written: dict[str, Path], name: str, to: Path) -> Path:
    return Path(shutil.copytree(written[name], to / name, dirs_exist_ok=True))


def edit(file: Path, change: Callable[[dict[str, Any]], object], *, unhash: bool = True) -> None:
    document = json.loads(file.read_text())
    inner = document.get("quantization_config", document)
    if unhash:
        for key in ("sha256", "checksums"):
            inner.pop(key, None)
    change(inner)
    file.write_text(json.dumps(document))


# Any alteration


READERS: dict[str, tuple[str, str, Callable[[Path], Any]]] = {
    "path.json": ("path", "path.json", lambda folder: pp.SolutionPath.load(folder).ranking),
    "tensors of a path": ("path", "path-*.safetensors", lambda folder: pp.SolutionPath.load(folder).ranking),
    "elastic": ("elastic", "path.json", lambda folder: output(pp.load_slice(folder, pp.Budget(keep=0.5)))),
    "elastic tensors": ("elastic", "path-*", lambda folder: output(pp.load_slice(folder, pp.Budget(keep=0.5)))),
    "pathprune.json": ("other", "pathprune.json", lambda folder: dict(load_model(Other(), folder).named_parameters())),
    "weights": ("other", "model.safetensors", lambda folder: dict(load_model(Other(), folder).named_parameters())),
}


def alike(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(alike(one[key], other[key]) for key in one)
    return bool((one == other).all()) and one.shape == other.shape


@pytest.mark.parametrize("reader", READERS)
def test_an_altered_file_is_refused_or_read_as_it_was(written: dict[str, Path], tmp_path: Path, reader: str) -> None:
    name, pattern, read = READERS[reader]
    folder = copied(written, name, tmp_path)
    file = next(folder.glob(pattern))
    before, expected = file.read_bytes(), read(folder)

    @settings(max_examples=25 if name == "elastic" else 60)
    @given(RANDOMS, st.booleans())
    def attack(random: Random, as_json: bool) -> None:
        if as_json and file.suffix == ".json":
            changed = altered(json.loads(before), random)
            if isinstance(changed, dict):
                changed.setdefault("sha256", "0" * 64)  # else it is one of 0.1.0
            data = json.dumps(changed).encode()
        else:
            data = damaged(before, random)
        file.unlink()
        file.write_bytes(data)
        try:
            found = read(folder)
        except PathpruneError:
            return
        assert alike(found, expected)

    attack()
    file.write_bytes(before)
    assert alike(read(folder), expected)


@pytest.mark.parametrize("unhash", [False, True])
def test_an_altered_record_is_refused_or_runs(written: dict[str, Path], unhash: bool) -> None:
    document = json.loads((written["sliced"] / "config.json").read_text())["quantization_config"]
    dense = tiny_bert()
    weights = load_file(written["sliced"] / "model.safetensors")

    @settings(max_examples=100)
    @given(RANDOMS)
    def attack(random: Random) -> None:
        changed = altered({key: value for key, value in document.items() if key != "sha256"}, random)
        if not isinstance(changed, dict):
            return
        if not unhash:
            changed.setdefault("sha256", document["sha256"])
        try:
            config: Any = PathpruneConfig.from_dict(changed)
            with torch.device("meta"):
                model = BertModel(dense.config)
            record = matched_record(model, config.record)
            check_record(model, record, doubtful=not config.signed)
            shape_modules(model, record)
        except (PathpruneError, LookupError):
            return
        shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        if unhash:
            assert len(shapes) == len(weights)
        else:
            assert config.record == document["record"]

    attack()


# Faults, each with the input that showed it


RECORD: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "a head of one": (lambda r: r["attributes"][f"{LAYER}.self"].update(attention_head_size=1), "should be"),
    "a head size halved": (
        lambda r: r["attributes"][f"{LAYER}.self"].update(
            attention_head_size=r["attributes"][f"{LAYER}.self"]["attention_head_size"] // 2
        ),
        "should be|no heads|do not make",
    ),
    "a head size removed": (lambda r: r["attributes"][f"{LAYER}.self"].pop("attention_head_size"), "should be"),
    "an attention's sizes removed": (lambda r: r["attributes"].pop(f"{LAYER}.self"), "do not make"),
    "a pad removed": (lambda r: r["modules"][f"{LAYER}.output.dense"].update(pad=None), "which no map puts out"),
    "a pad's places changed": (
        lambda r: r["modules"][f"{LAYER}.output.dense"]["pad"].update(padded=3),
        "which no map puts out|malformed",
    ),
    "no bias": (lambda r: r["modules"][f"{LAYER}.output.dense"].update(bias=False), "takes the bias"),
    "both sides": (
        lambda r: r["modules"]["encoder.layer.0.output.dense"].update(out_features=8),
        "slicing changes one",
    ),
    "a class for a parameter": (
        lambda r: r["parameters"].update({LAYER: {"__class__": [1]}}),
        "gives .*__class__ the shape",
    ),
}


@pytest.mark.parametrize("name", RECORD)
def test_a_changed_record_is_refused_at_load(written: dict[str, Path], tmp_path: Path, name: str) -> None:
    """By its checksum, and where that is gone (0.1.0 wrote none) because it makes no sense."""
    change, message = RECORD[name]
    folder = copied(written, "sliced", tmp_path)
    edit(folder / "config.json", lambda q: change(q["record"]), unhash=False)
    with pytest.raises(ArtifactError, match="does not have the recorded SHA-256; it was altered"):
        AutoModel.from_pretrained(folder)
    edit(folder / "config.json", lambda q: None)
    with pytest.raises(ArtifactError, match=message):
        AutoModel.from_pretrained(folder)


def llama(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
    )
    model = transformers.LlamaModel(config).eval()
    save_model(pp.slice_model(model, random_path(pp.find_pairs(model)).select(pp.Budget(keep=0.5))), tmp_path / "llama")
    return tmp_path / "llama"


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.reverse(),
        lambda c: c.__setitem__(1, c[0]),
        lambda c: c.__setitem__(0, c[0] + 1),
        lambda c: c.pop(),
        lambda c: c.__setitem__(slice(0, 2), c[1::-1]),
    ],
)
def test_rotary_columns_are_couples_in_order(tmp_path: Path, change: Callable[[list[int]], object]) -> None:
    folder = llama(tmp_path)
    expected = output(AutoModel.from_pretrained(folder))
    edit(folder / "config.json", lambda q: None)
    assert torch.equal(output(AutoModel.from_pretrained(folder)), expected)
    edit(folder / "config.json", lambda q: change(q["record"]["rotary"]["layers.0.self_attn"]))
    with pytest.raises(ArtifactError, match="rotary column"):
        AutoModel.from_pretrained(folder)


def test_a_model_of_before_loads(written: dict[str, Path], tmp_path: Path) -> None:
    """Records, paths and weights without checksums, as 0.1.0 wrote them."""
    for name, file in (
        ("sliced", "config.json"),
        ("path", "path.json"),
        ("elastic", "path.json"),
        ("other", "pathprune.json"),
    ):
        edit(copied(written, name, tmp_path) / file, lambda q: q.pop("tensors", None) if "record" in q else None)
    assert torch.equal(
        output(AutoModel.from_pretrained(tmp_path / "sliced")), output(AutoModel.from_pretrained(written["sliced"]))
    )
    loaded, before = (pp.SolutionPath.load(folder) for folder in (tmp_path / "path", written["path"]))
    assert alike(loaded.ranking, before.ranking)
    sizes = [
        output(pp.load_slice(folder, pp.Budget(keep=0.5))) for folder in (tmp_path / "elastic", written["elastic"])
    ]
    assert torch.equal(*sizes)
    models = [dict(load_model(Other(), folder).named_parameters()) for folder in (tmp_path / "other", written["other"])]
    assert alike(*models)


PATHS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "rescale of vo": (lambda m: m["pairs"][1].update(rescale=True), "disagree"),
    "slots reversed": (lambda m: m["pairs"][1]["slots"].reverse(), "make no pair"),
    "another slot size": (lambda m: m["pairs"][0]["slots"][0].update(size=16), "the model's has 32, 32 and one"),
    "another bias": (lambda m: m["pairs"][0]["slots"][0].update(bias=False), "no bias"),
    "a slot's bias null": (lambda m: m["pairs"][0]["slots"][0].update(bias=None), "None is not a bool"),
    "another block": (lambda m: m["pairs"][1].update(block=""), "where the model has none"),
    "a map twice": (
        lambda m: m["pairs"][0]["slots"][0].update(module=m["pairs"][1]["slots"][0]["module"]),
        "that another pair takes",
    ),
    "no such map": (lambda m: m["pairs"][0]["slots"][0].update(module="x"), "names x[,;]"),
    "params": (lambda m: m["base"].update(params="many"), "params is 'many', which is no count"),
    "macs": (lambda m: m["base"].update(macs_per_token=1.5), "macs_per_token is 1.5"),
    "fingerprint": (lambda m: m["base"].update(fingerprint=3), "3 is not a str"),
    "architecture null": (lambda m: m["base"].update(architecture=None), "None is not a str"),
    "a huge size": (lambda m: m["pairs"][0].update(width=2**63), "below 2"),
    "calls": (lambda m: m["pairs"][0].update(calls=float("nan")), "calls=nan must be positive"),
    "multiple": (lambda m: m.update(multiple=10**30), "must be at least 1, and an integer below"),
}


@pytest.mark.parametrize("name", PATHS)
def test_a_changed_path_is_refused(written: dict[str, Path], tmp_path: Path, name: str) -> None:
    """By its checksum; without one, when it is read or when the model is seen."""
    change, message = PATHS[name]
    folder = copied(written, "path", tmp_path)
    edit(folder / "path.json", change, unhash=False)
    with pytest.raises(ArtifactError, match="its content does not have the recorded SHA-256; it was altered"):
        pp.SolutionPath.load(folder)
    edit(folder / "path.json", lambda meta: None)
    with pytest.raises((ArtifactError, MismatchError), match=message):
        pp.slice_model(tiny_bert(), pp.SolutionPath.load(folder).select(pp.Budget(keep=0.5)))


def test_a_singular_basis_is_refused() -> None:
    path = random_path(pp.find_pairs(tiny_bert()))
    pair = next(pair for pair in path.pairs if pair.rotatable)
    basis: dict[str, Floats] = {pair.name: np.ones((pair.groups, pair.width, pair.width))}
    with pytest.raises(MismatchError, match=f"basis of {pair.name} has a matrix that cannot be inverted"):
        pp.SolutionPath(path.pairs, path.ranking, basis=basis)


@pytest.mark.parametrize("value", ["text", 3, [1]])
def test_a_selection_is_a_dict(written: dict[str, Path], value: Any) -> None:
    record = json.loads((written["sliced"] / "config.json").read_text())["quantization_config"]["record"]
    with pytest.raises(ArtifactError, match=r"selection is a (str|int|list); it must be a dict"):
        PathpruneConfig(record, value)


@pytest.mark.parametrize(
    ("name", "of"),
    [
        ("query.weight", LAYER + ".self"),
        ("LayerNorm.bias", LAYER + ".output"),
        ("word_embeddings.weight", "embeddings"),
    ],
)
@pytest.mark.parametrize("renamed", [False, True])
def test_weights_that_lack_a_tensor_are_refused(
    written: dict[str, Path], tmp_path: Path, name: str, of: str, renamed: bool
) -> None:
    """transformers warns, and puts random numbers in its place."""
    folder = copied(written, "sliced", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensor = tensors.pop(f"{of}.{name}")
    save_file(tensors | ({f"{of}.x{name}": tensor} if renamed else {}), folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ArtifactError, match=rf"the weights lack {of}\.{name}"):
        AutoModel.from_pretrained(folder)


@pytest.mark.parametrize("change", [lambda t: t[:-1], lambda t: (100 * t).to(torch.int64)])
def test_weights_of_another_shape_or_type_are_refused(
    written: dict[str, Path], tmp_path: Path, change: Callable[[Tensor], Tensor]
) -> None:
    """Also where somebody follows transformers' advice to ignore mismatched sizes."""
    folder = copied(written, "sliced", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    name = f"{LAYER}.self.query.weight"
    save_file(tensors | {name: change(tensors[name]).contiguous()}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ArtifactError, match=f"the weights have {name} as .* they do not belong together"):
        AutoModel.from_pretrained(folder, ignore_mismatched_sizes=True)


def test_heads_and_poolers_may_be_missing_as_from_any_model(written: dict[str, Path], tmp_path: Path) -> None:
    expected = output(AutoModel.from_pretrained(written["sliced"]))
    model: Any = AutoModelForMaskedLM.from_pretrained(written["sliced"])
    assert isinstance(model, BertForMaskedLM)
    assert torch.equal(output(model.bert), expected)
    labels = transformers.AutoModelForSequenceClassification.from_pretrained(written["sliced"], num_labels=7)
    labels.save_pretrained(tmp_path / "labels")
    again = type(labels).from_pretrained(tmp_path / "labels", num_labels=3, ignore_mismatched_sizes=True)
    assert again.classifier.weight.shape == (3, 32)
    assert torch.equal(output(again.bert), expected)
    small = BertModel.from_pretrained(written["sliced"], add_pooling_layer=False)
    small.save_pretrained(tmp_path / "small")
    assert torch.equal(output(AutoModel.from_pretrained(tmp_path / "small")), expected)


def test_an_elastic_model_without_its_pooler_loads(tmp_path: Path) -> None:
    """As many sentence encoders are saved."""
    model = BertModel(tiny_bert().config, add_pooling_layer=False).eval()
    path = random_path(pp.find_pairs(model))
    sorted_model, sorted_path = pp.sort_units(model, path)
    sorted_model.save_pretrained(tmp_path)
    sorted_path.save(tmp_path)
    budget = pp.Budget(keep=0.5)
    expected = output(pp.slice_model(sorted_model, sorted_path.select(budget)))
    torch.testing.assert_close(output(pp.load_slice(tmp_path, budget)), expected)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors.pop("embeddings.LayerNorm.bias")
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ArtifactError, match=r"the checkpoint has no embeddings\.LayerNorm\.bias"):
        pp.load_slice(tmp_path, budget)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "config.json",
            lambda c: c.update(num_hidden_layers=10**6),
            "num_hidden_layers=1000000 in its configuration is",
        ),
        ("config.json", lambda c: c.update(hidden_size="x"), "cannot build a BertModel"),
        ("config.json", lambda c: c.update(hidden_size=10**18), "cannot build a BertModel"),
        ("model.safetensors.index.json", lambda c: c.update(weight_map=[1]), "cannot read the weights"),
        ("model.safetensors.index.json", lambda c: c.update(weight_map={"x": 3}), "cannot read the weights"),
    ],
)
def test_load_slice_refuses_odd_files(
    written: dict[str, Path], tmp_path: Path, name: str, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    folder = copied(written, "elastic", tmp_path)
    if not (folder / name).exists():
        (folder / name).write_text("{}")
    edit(folder / name, change)
    with pytest.raises(ArtifactError, match=message):
        pp.load_slice(folder, pp.Budget(keep=0.5))


@pytest.mark.parametrize("value", [float("nan"), "int"])
def test_load_slice_refuses_weights_that_are_no_numbers(written: dict[str, Path], tmp_path: Path, value: Any) -> None:
    folder = copied(written, "elastic", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    name = "encoder.layer.1.output.dense.bias"
    tensors[name] = tensors[name].to(torch.int32) if value == "int" else tensors[name] * value
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises((ArtifactError, MismatchError), match=r"floating-point|not finite|another model"):
        pp.load_slice(folder, pp.Budget(keep=0.5))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.view(-1)[:1].fill_(9.0), r"fc2\.bias in model\.safetensors does not have the recorded checksum"),
        (lambda t: t.fill_(float("nan")), r"fc2\.bias in model\.safetensors has numbers that are not finite"),
    ],
)
def test_weights_of_other_libraries_are_checked(
    written: dict[str, Path], tmp_path: Path, change: Callable[[Tensor], Tensor], message: str
) -> None:
    folder = copied(written, "other", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    change(tensors["fc2.bias"])
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ArtifactError, match=message):
        load_model(Other(), folder)


@pytest.mark.parametrize("make", [os.mkfifo, lambda file: file.symlink_to("/dev/zero"), Path.mkdir])
@pytest.mark.parametrize(
    ("name", "file"), [("other", "pathprune.json"), ("other", "model.safetensors"), ("elastic", "model.safetensors")]
)
def test_pipes_devices_and_folders_are_no_files(
    written: dict[str, Path], tmp_path: Path, make: Callable[[Path], object], name: str, file: str
) -> None:
    folder = copied(written, name, tmp_path)
    (folder / file).unlink()
    make(folder / file)
    with pytest.raises(ArtifactError, match="is no regular file"):
        load_model(Other(), folder) if name == "other" else pp.load_slice(folder, pp.Budget(keep=0.5))


def test_a_record_of_300_000_entries_is_refused_at_once(written: dict[str, Path]) -> None:
    record = json.loads((written["sliced"] / "config.json").read_text())["quantization_config"]["record"]
    shape = next(iter(record["modules"].values()))
    with pytest.raises(ArtifactError, match=r"names 300,00. modules, more than any model has"):
        PathpruneConfig({**record, "modules": {f"layer.{i}": shape for i in range(300_000)}})
    config = PathpruneConfig({**record, "rotary": {LAYER + ".self": list(range(300_000))}})
    with pytest.raises(ArtifactError, match="has rotary column 299999; the head has 8"):
        check_record(tiny_bert(), config.record)


def test_hub_can_be_imported_anew(written: dict[str, Path]) -> None:
    again = importlib.reload(hf)
    assert again.METHOD == "pathprune (pip install pathprune, then `import pathprune` before loading this model)"
    assert isinstance(output(AutoModel.from_pretrained(written["sliced"])), Tensor)
