"""Sliced models load and save like any model of transformers, in this process and in others."""

from __future__ import annotations

import copy
import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import nn

from conftest import Python, Subject, assert_same_model, run_model, snapshot, tiny_inputs, tiny_model
from pathprune.checkpoint.folders import check_free, exchange
from pathprune.checkpoint.other_libraries import load_model
from pathprune.checkpoint.save import save_model
from pathprune.discovery.discover import find_pairs
from pathprune.errors import ArtifactError, MismatchError, UnsupportedModelError
from pathprune.family.path import SolutionPath
from pathprune.transform.modules import Padding
from pathprune.transform.record import PathpruneConfig
from pathprune.transform.slicing import slice_model
from strategies import CASES, selection_of

AUTO = {"bert": transformers.AutoModelForMaskedLM, "llama": transformers.AutoModelForCausalLM}


def load(subject: Subject, folder: Path, **settings: Any) -> Any:
    auto = AUTO.get(subject.family, transformers.AutoModel)
    return auto.from_pretrained(folder, **{"dtype": torch.float64, **settings})


@pytest.fixture
def small(subject: Subject) -> Any:
    return slice_model(subject.model, selection_of(subject.pairs, "uneven"))


@pytest.fixture
def folder(small: Any, tmp_path: Path) -> Path:
    small.save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("case", CASES)
def test_a_loaded_model_is_the_saved_one(subject: Subject, tmp_path: Path, case: str) -> None:
    small = slice_model(subject.model, selection_of(subject.pairs, case))
    small.save_pretrained(tmp_path / "one")
    loaded = load(subject, tmp_path / "one")
    assert type(loaded) is type(small)
    assert_same_model(loaded, small, subject.inputs)
    assert not loaded.training
    loaded.save_pretrained(tmp_path / "two")
    again = load(subject, tmp_path / "two")
    assert_same_model(again, small, subject.inputs)
    one, two = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("one", "two"))
    assert one == two


def test_a_fresh_process_loads_every_family(subjects: dict[str, Subject], tmp_path: Path, python: Python) -> None:
    cases = dict(zip(subjects, ("uneven", "fewer heads", "no attention"), strict=True))
    for family, subject in subjects.items():
        small = slice_model(subject.model, selection_of(subject.pairs, cases[family]))
        small.save_pretrained(tmp_path / family)
        for name, tensor in subject.inputs.items():
            np.save(tmp_path / family / f"{name}.npy", tensor.numpy())
        with torch.no_grad():
            np.save(tmp_path / family / "expected.npy", small(**subject.inputs)[0].numpy())
    done = python(
        "import sys, pathlib\n"
        "import pathprune, transformers, numpy as np, torch\n"
        "for folder in map(pathlib.Path, sys.argv[1:]):\n"
        "    name, = transformers.AutoConfig.from_pretrained(folder).architectures\n"
        "    model = getattr(transformers, name).from_pretrained(folder, dtype=torch.float64)\n"
        "    inputs = {n: torch.from_numpy(np.load(folder / f'{n}.npy')) for n in ('input_ids', 'attention_mask')}\n"
        "    with torch.no_grad():\n"
        "        error = np.abs(model(**inputs)[0].numpy() - np.load(folder / 'expected.npy')).max()\n"
        "    assert error < 1e-12, (folder, error)\n"
        "    print('equal', folder.name)\n",
        *(tmp_path / family for family in subjects),
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [word for family in subjects for word in ("equal", family)]


def test_a_process_without_pathprune_is_told_to_import_it(
    subjects: dict[str, Subject], tmp_path: Path, python: Python
) -> None:
    bert = subjects["bert"]
    slice_model(bert.model, selection_of(bert.pairs, "uneven")).save_pretrained(tmp_path)
    done = python(
        "import sys\nfrom transformers import AutoModelForMaskedLM\n"
        "AutoModelForMaskedLM.from_pretrained(sys.argv[1])\n"
        "print('loaded')\n",
        tmp_path,
    )
    assert done.returncode != 0
    assert "loaded" not in done.stdout
    assert "`import pathprune` before loading" in done.stdout + done.stderr


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, "auto"])
def test_precision_is_chosen_as_always(subject: Subject, small: Any, folder: Path, dtype: Any) -> None:
    loaded = load(subject, folder, dtype=dtype)
    expected = copy.deepcopy(small)
    for parameter in expected.parameters() if dtype != "auto" else ():  # buffers keep theirs, as in from_pretrained
        parameter.data = parameter.data.to(dtype)
    assert_same_model(loaded, expected, subject.inputs)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_is_chosen_as_always(subject: Subject, small: Any, folder: Path, implementation: str) -> None:
    loaded = load(subject, folder, attn_implementation=implementation)
    assert loaded.config._attn_implementation == implementation
    torch.testing.assert_close(subject.output(loaded), subject.output(small), rtol=1e-5, atol=1e-5)


def test_sharding_and_device_maps_work(subject: Subject, small: Any, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    small.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = load(subject, tmp_path, device_map="cpu")
    assert_same_model(loaded, small, subject.inputs)


def test_a_loaded_model_is_not_taken_for_a_quantised_one(subject: Subject, small: Any, folder: Path) -> None:
    loaded = load(subject, folder)
    assert getattr(loaded, "is_quantized", False) is False
    assert getattr(loaded, "hf_quantizer", None) is None
    assert loaded.half().dtype == torch.float16
    assert loaded.float().dtype == torch.float32
    loaded = load(subject, folder).to(torch.float64)
    assert_same_model(loaded, small, subject.inputs)
    assert loaded.to("cpu") is loaded
    loaded.train()
    loaded(**subject.inputs)[0].sum().backward()
    assert all(parameter.grad is not None for parameter in loaded.parameters())


def test_a_loaded_model_is_small_and_not_searched_again(subject: Subject, small: Any, folder: Path) -> None:
    loaded = load(subject, folder)
    shapes = {name: parameter.shape for name, parameter in small.named_parameters()}
    assert {name: parameter.shape for name, parameter in loaded.named_parameters()} == shapes
    assert any(isinstance(hook, Padding) for module in loaded.modules() for hook in module._forward_hooks.values())
    with pytest.raises(UnsupportedModelError, match="already sliced"):
        find_pairs(loaded)


def test_loading_leaves_no_trace_on_other_models(subject: Subject, folder: Path, tmp_path: Path) -> None:
    load(subject, folder)
    subject.model.save_pretrained(tmp_path / "dense")
    dense = load(subject, tmp_path / "dense")
    assert_same_model(dense, subject.model, subject.inputs)
    assert not hasattr(dense.config, "quantization_config")


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [
        ("BertModel", "BertForSequenceClassification"),
        ("BertModel", "BertForMaskedLM"),
        ("BertForMaskedLM", "BertModel"),
        ("BertForSequenceClassification", "BertForMaskedLM"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_heads_come_and_go_as_always(tmp_path: Path, saved: str, loaded: str) -> None:
    dense = tiny_model("bert", saved)
    small = slice_model(dense, selection_of(find_pairs(dense), "fewer heads"))
    small.save_pretrained(tmp_path)
    other = getattr(transformers, loaded).from_pretrained(tmp_path, dtype=torch.float64)
    one, two = (getattr(model, "bert", model) for model in (small, other))
    torch.testing.assert_close(run_model(one, tiny_inputs()), run_model(two, tiny_inputs()))
    other.save_pretrained(tmp_path / "again")
    again = getattr(transformers, loaded).from_pretrained(tmp_path / "again", dtype=torch.float64)
    assert_same_model(other, again, tiny_inputs())


def test_automodel_finds_the_backbone_of_a_model_with_a_head(subjects: dict[str, Subject], tmp_path: Path) -> None:
    for family in ("bert", "llama"):
        subject = subjects[family]
        small = slice_model(subject.model, selection_of(subject.pairs, "uneven"))
        small.save_pretrained(tmp_path / family)
        backbone = transformers.AutoModel.from_pretrained(tmp_path / family, dtype=torch.float64)
        torch.testing.assert_close(subject.output(backbone), subject.output(small.base_model))


def test_a_record_of_another_architecture_is_refused(subjects: dict[str, Subject], tmp_path: Path) -> None:
    bert, llama = subjects["bert"], subjects["llama"]
    slice_model(llama.model, selection_of(llama.pairs, "uneven")).save_pretrained(tmp_path)
    bert.model.save_pretrained(tmp_path / "bert")
    config = json.loads((tmp_path / "bert" / "config.json").read_text())
    config["quantization_config"] = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    (tmp_path / "bert" / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ArtifactError, match=r"the shape record names .*, which BertForMaskedLM does not have; load it with"
    ):
        load(bert, tmp_path / "bert")


@pytest.fixture(scope="module")
def record(subjects: dict[str, Subject]) -> dict[str, Any]:
    llama = subjects["llama"]
    small = slice_model(llama.model, selection_of(llama.pairs, "uneven"))
    return dict(small.config.quantization_config.record)


Q, DOWN = "model.layers.0.self_attn.v_proj", "model.layers.0.mlp.down_proj"
ATTENTION = "model.layers.0.self_attn"
Change = Callable[[Any], object]

HOSTILE: dict[str, tuple[Change, str]] = {
    "another part": (lambda r: r.update(code="x"), "needs modules, parameters, attributes and rotary"),
    "a part less": (lambda r: r.pop("rotary"), "needs modules, parameters, attributes and rotary"),
    "modules are a list": (lambda r: r.update(modules=[Q]), "malformed"),
    "attributes are a list": (lambda r: r.update(attributes=["head_dim"]), "malformed"),
    "rotary is text": (lambda r: r.update(rotary="all"), "malformed"),
    "a shape is a number": (lambda r: r["modules"].update({Q: 3}), f"shape record of {Q} is malformed"),
    "a shape is nothing": (lambda r: r["modules"].update({Q: None}), f"shape record of {Q} is malformed"),
    "an unknown key": (lambda r: r["modules"][Q].update(device="cuda"), f"shape record of {Q} is malformed"),
    "a missing key": (lambda r: r["modules"][Q].pop("bias"), f"shape record of {Q} is malformed"),
    "a huge size": (lambda r: r["modules"][DOWN].update(in_features=2**31), f"shape record of {DOWN} is malformed"),
    "a negative size": (lambda r: r["modules"][DOWN].update(in_features=-1), f"shape record of {DOWN} is malformed"),
    "a fraction": (lambda r: r["modules"][DOWN].update(in_features=3.0), f"shape record of {DOWN} is malformed"),
    "a size that is true": (lambda r: r["modules"][DOWN].update(in_features=True), "malformed"),
    "a bias that is 1": (lambda r: r["modules"][DOWN].update(bias=1), "malformed"),
    "a pad that is a list": (lambda r: r["modules"][Q].update(pad=[1]), "malformed"),
    "a pad that is a number": (lambda r: r["modules"][Q].update(pad=1), "malformed"),
    "a side that is none": (lambda r: r["modules"][Q]["pad"].update(side="up"), "malformed"),
    "more in a pad": (lambda r: r["modules"][Q]["pad"].update(value=1), "malformed"),
    "a pad narrower than its blocks": (lambda r: r["modules"][Q]["pad"].update(padded=1), "malformed"),
    "a pad of other blocks": (lambda r: r["modules"][Q]["pad"].update(blocks=99), "malformed"),
    "a huge pad": (lambda r: r["modules"][Q]["pad"].update(padded=2**31 - 1, blocks=2, width=0), "malformed"),
    "code for an attribute": (lambda r: r["attributes"][ATTENTION].update(forward=1), "only sizes of .* may be set"),
    "a private attribute": (lambda r: r["attributes"][ATTENTION].update(__class__=1), "only sizes of"),
    "text for a size": (lambda r: r["attributes"][ATTENTION].update(head_dim="8"), "only sizes of"),
    "attributes without values": (lambda r: r["attributes"].update({ATTENTION: ["head_dim"]}), "malformed|only sizes"),
    "a column that is none": (lambda r: r["rotary"].update({ATTENTION: [0, -1]}), "columns that are not indices"),
    "columns that are text": (lambda r: r["rotary"].update({ATTENTION: "01"}), "columns that are not indices"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_shape_records_are_refused(record: dict[str, Any], name: str) -> None:
    change, message = HOSTILE[name]
    hostile = copy.deepcopy(record)
    PathpruneConfig(hostile)
    change(hostile)
    with pytest.raises(ArtifactError, match=message):
        PathpruneConfig(hostile)


@pytest.mark.parametrize("record", [None, [], "record", 3])
def test_what_is_no_record_is_refused(record: Any) -> None:
    with pytest.raises(ArtifactError, match="needs modules, parameters, attributes and rotary"):
        PathpruneConfig(record)


def edit_config(folder: Path, change: Change) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    del config["quantization_config"]["sha256"]  # as 0.1.0 wrote it
    change(config["quantization_config"])
    file.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q: q.update(format=2), "has format 2, this pathprune reads 1; update pathprune"),
        (lambda q: q.pop("format"), "has format None"),
        (lambda q: q.update(extra=1), r"unknown keys in the shape record: \['extra'\]"),
        (lambda q: q.pop("record"), "needs modules, parameters, attributes and rotary"),
        (lambda q: q["record"]["modules"].update(lm_head={"nothing": 1}), "shape record of lm_head is malformed"),
        # A slice is never larger than its dense map, whose sizes the configuration still has.
        (lambda q: q["record"]["modules"][DOWN].update(in_features=10**9), "in_features"),
        (lambda q: q["record"]["modules"][DOWN].update(out_features=25), "out_features"),
        (lambda q: q["record"]["rotary"].update({ATTENTION: [0, 10**6]}), "rotary"),
        (lambda q: q["record"]["modules"].update({ATTENTION: q["record"]["modules"][DOWN]}), "not a linear map"),
    ],
)
def test_a_doctored_configuration_does_not_load(
    subjects: dict[str, Subject], tmp_path: Path, change: Change, message: str
) -> None:
    llama = subjects["llama"]
    slice_model(llama.model, selection_of(llama.pairs, "uneven")).save_pretrained(tmp_path)
    edit_config(tmp_path, change)
    with pytest.raises((ArtifactError, MismatchError), match=message):
        load(llama, tmp_path)


def test_saving_makes_a_whole_folder(subject: Subject, small: Any, tmp_path: Path) -> None:
    source, folder = tmp_path / "dense", tmp_path / "sub" / "small"
    source.mkdir()
    for name in ("tokenizer.json", "model.safetensors", "pytorch_model.bin", "README.md", ".hidden"):
        (source / name).write_text("{}")
    for card in ("one", "two"):
        save_model(small, folder, source=source, card=card)
        assert (folder / "README.md").read_text() == card
        assert (folder / "tokenizer.json").exists()
        assert not (folder / "pytorch_model.bin").exists()
        assert [file.name for file in folder.parent.iterdir()] == ["small"]
        assert_same_model(load(subject, folder), small, subject.inputs)


def test_what_belongs_to_the_dense_model_alone_stays_there(subjects: dict[str, Subject], tmp_path: Path) -> None:
    """Modules of sentence-transformers come along with their weights; checkpoints and other sizes do not."""
    bert, source = subjects["bert"], tmp_path / "dense"
    names = ("1_Pooling/config.json", "2_Dense/model.safetensors", "additional_chat_templates/tool.jinja", "vocab.txt")
    rest = (
        "checkpoint-5/config.json",
        "keep-25/config.json",
        "onnx/config.json",
        "path.json",
        "model.onnx",
        ".git/HEAD",
    )
    for name in (*names, *rest):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name)
    modules = [{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}]
    (source / "modules.json").write_text(json.dumps(modules))
    small = slice_model(bert.model, selection_of(bert.pairs, "uneven"))
    save_model(small, tmp_path / "small", source=source)
    assert set(listing(tmp_path / "small")) == {"config.json", "model.safetensors", "modules.json", *names}
    (source / "modules.json").write_text("[1]")
    save_model(small, tmp_path / "again", source=source)
    assert "1_Pooling/config.json" not in listing(tmp_path / "again")


def test_a_link_to_a_folder_stays_a_link(saved: tuple[nn.Module, Path], tmp_path: Path) -> None:
    small, folder = saved
    (tmp_path / "link").symlink_to(folder)
    save_model(small, tmp_path / "link", card="new")
    assert (tmp_path / "link").is_symlink()
    assert (folder / "README.md").read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "small"]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub that is out of reach, and the cache's folder of a model's files."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    kept = tmp_path / "cache" / "models--someone--encoder"
    (kept / "refs").mkdir(parents=True)
    (kept / "refs" / "main").write_text("0" * 40)
    for commit in "01":
        (kept / "snapshots" / (commit * 40)).mkdir(parents=True)
        for name in ("tokenizer.json", "model.safetensors"):
            (kept / "snapshots" / (commit * 40) / name).write_text(commit)
    return kept


@pytest.mark.parametrize("loaded", [None, "1" * 40])
def test_the_tokenizer_of_a_model_of_the_hub_comes_along(
    subjects: dict[str, Subject], hub: Path, tmp_path: Path, loaded: str | None
) -> None:
    """That of the commit whose weights were loaded, if that is known."""
    bert = subjects["bert"]
    small: Any = slice_model(bert.model, selection_of(bert.pairs, "uneven"))
    small.config._commit_hash = loaded
    save_model(small, tmp_path / "small", source="someone/encoder")
    assert (tmp_path / "small" / "tokenizer.json").read_text() == ("0" if loaded is None else "1")
    assert_same_model(load(bert, tmp_path / "small"), small, bert.inputs)


@pytest.mark.parametrize("source", ["someone/else", "no such folder/at all/here"])
def test_a_hub_that_gives_no_tokenizer_costs_no_model(
    subjects: dict[str, Subject], hub: Path, tmp_path: Path, source: str
) -> None:
    bert = subjects["bert"]
    small = slice_model(bert.model, selection_of(bert.pairs, "uneven"))
    with pytest.warns(UserWarning, match=f"without a tokenizer or processor: {source}"):
        save_model(small, tmp_path / "small", source=source)
    assert_same_model(load(bert, tmp_path / "small"), small, bert.inputs)


@pytest.fixture
def saved(subjects: dict[str, Subject], tmp_path: Path) -> tuple[nn.Module, Path]:
    """A model in a folder, with a file beside its weights."""
    bert = subjects["bert"]
    small = slice_model(bert.model, selection_of(bert.pairs, "uneven"))
    save_model(small, tmp_path / "small", card="old")
    return small, tmp_path / "small"


def listing(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


@pytest.mark.parametrize("nth", [1, 2, 3])
@pytest.mark.parametrize("function", ["rename", "mkdir", "write_text"])
def test_a_full_disk_leaves_the_model_that_was_there(
    saved: tuple[nn.Module, Path], monkeypatch: pytest.MonkeyPatch, function: str, nth: int
) -> None:
    """Whichever call fails: the old folder and an error, or the new folder and none."""
    small, folder = saved
    before = listing(folder.parent)
    real, calls = getattr(Path, function), 0

    def fail(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == nth:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args, **kwargs)

    def save() -> str | None:
        try:
            save_model(small, folder, card="new")
        except ArtifactError as error:
            return str(error)
        return None

    with monkeypatch.context() as patch:
        patch.setattr(Path, function, fail)
        message = save()
    if message is None:
        assert (folder / "README.md").read_text() == "new"
    else:
        assert "No space left on device" in message
        assert "nothing was changed" in message
        assert listing(folder.parent) == before


def test_a_folder_of_something_else_is_not_replaced(saved: tuple[nn.Module, Path], tmp_path: Path) -> None:
    small, _ = saved
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("mine")
    before = listing(tmp_path)
    for name in ("mine", "file"):
        with pytest.raises(ArtifactError, match=r"exists and is not a model folder; choose another folder"):
            save_model(small, tmp_path / name)
    with pytest.raises(ArtifactError, match="cannot write the model to"):
        save_model(small, tmp_path / "file" / "below")
    for length in (240, 300):
        with pytest.raises(ArtifactError, match="File name too long"):
            save_model(small, tmp_path / ("x" * length))
    assert listing(tmp_path) == before


def test_what_stands_beside_a_model_stays(
    saved: tuple[nn.Module, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A clone of a hub repository, an elastic model's path, another size below."""
    small, folder = saved
    (folder / "README.md").unlink()
    rest = {".git/HEAD": "ref", "keep-25/model.safetensors": "weights", "path.json": "{}", "path-0123.safetensors": "p"}
    stale = {
        "model-00001-of-00002.safetensors": "old",
        "model.safetensors.index.json": "{}",
        "pytorch_model.bin": "old",
    }
    for name, text in (rest | stale).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    save_model(small, folder)
    after = listing(folder)
    assert {name: after.pop(name).decode() for name in rest} == rest
    assert set(after) == {"config.json", "model.safetensors"}

    real = Path.rename

    def rename(self: Path, target: Path) -> Path:
        if self.name == ".git":
            raise OSError(errno.EACCES, "Permission denied")
        return real(self, target)

    with monkeypatch.context() as patch:  # on a file system without links, what is beside moves after the exchange
        patch.setattr(os, "link", forbidden)
        patch.setattr(Path, "rename", rename)
        with pytest.raises(ArtifactError, match=r"what stood in .* is still in .*\.old .*; move what you need"):
            save_model(small, folder)
        assert {Path(name).name for name in listing(tmp_path)} >= {Path(name).name for name in rest}
        with pytest.raises(ArtifactError, match="is still in"):
            check_free(folder)
        patch.setattr(Path, "rename", real)
        with pytest.warns(UserWarning, match="a run was killed while it replaced the model .* what stood beside it is"):
            save_model(small, folder)
    assert listing(folder) == after | {name: text.encode() for name, text in rest.items()}
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


def forbidden(*args: Any, **kwargs: Any) -> Any:
    raise OSError(errno.EPERM, "Operation not permitted")


def interrupted(real: Callable[..., Any], nth: int, after: bool) -> Callable[..., Any]:
    """Ctrl-C just before or just after the n-th call."""
    calls = iter(range(1, 99))

    def call(*args: Any, **kwargs: Any) -> Any:
        at = next(calls) == nth
        if at and not after:
            raise KeyboardInterrupt
        result = real(*args, **kwargs)
        if at:
            raise KeyboardInterrupt
        return result

    return call


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("exchanging", [True, False])
@pytest.mark.parametrize("nth", [1, 2, 3])
def test_ctrl_c_leaves_a_whole_model_and_what_stood_beside_it(
    saved: tuple[nn.Module, Path], monkeypatch: pytest.MonkeyPatch, nth: int, exchanging: bool, after: bool
) -> None:
    """At every rename, and at the exchange where there is one."""
    small, folder = saved
    (folder / "thesis.txt").write_text("years of work")
    before = listing(folder)
    save_model(small, folder.with_name("other"), card="new")
    whole = listing(folder.with_name("other")) | {"thesis.txt": b"years of work"}
    with monkeypatch.context() as patch:
        if exchanging and nth == 1:
            patch.setattr("pathprune.checkpoint.folders.exchange", interrupted(exchange, 1, after))
        else:
            patch.setattr(Path, "rename", interrupted(Path.rename, nth - exchanging, after))
        if not exchanging:
            patch.setattr("pathprune.checkpoint.folders.exchange", lambda one, other: False)
        with pytest.raises(KeyboardInterrupt):
            save_model(small, folder, card="new")
    assert listing(folder) in (before, whole)
    check_free(folder)
    assert listing(folder) in (before, whole)
    assert sorted(path.name for path in folder.parent.iterdir()) == ["other", "small"]


@pytest.mark.parametrize("name", [".small.{}.{}", ".small.{}-0123abcd.{}"], ids=["as 0.1.0 wrote it", "now"])
def test_what_a_killed_run_left_is_finished_or_goes(saved: tuple[nn.Module, Path], name: str) -> None:
    small, folder = saved
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        dead = process.pid
    before = listing(folder)

    def leave(process: int, kind: str, *files: str) -> Path:
        left = folder.with_name(name.format(process, kind))
        for file in files:
            (left / file).parent.mkdir(parents=True, exist_ok=True)
            (left / file).write_text(file)
        return left

    leave(dead, "part", "model.safetensors")
    leave(dead, "old", "config.json", "model.safetensors", "pytorch_model.bin", ".git/HEAD")
    mine = leave(os.getppid(), "part", "model.safetensors")  # its process runs
    foreign = leave(dead, "older", "x")
    with pytest.warns(UserWarning, match=f"replaced the model in {folder}; what stood beside it is back"):
        save_model(small, folder, card="old")
    assert listing(folder) == before | {".git/HEAD": b".git/HEAD"}
    assert sorted(folder.parent.iterdir()) == sorted([folder, mine, foreign])

    leave(dead, "part", "model.safetensors")
    folder.rename(folder.with_name(name.format(dead, "old")))  # killed between two renames
    with pytest.warns(UserWarning, match=f"replaced the model in {folder}; the old one is back"):
        check_free(folder)
    assert listing(folder) == before | {".git/HEAD": b".git/HEAD"}
    assert sorted(folder.parent.iterdir()) == sorted([folder, mine, foreign])


def test_a_model_and_its_path_are_replaced_together(subjects: dict[str, Subject], tmp_path: Path) -> None:
    bert = subjects["bert"]
    paths = []
    for seed in (0, 1):
        scores = {p.name: torch.rand(*p.shape, generator=torch.Generator().manual_seed(seed)) for p in bert.pairs}
        paths.append(SolutionPath.from_scores(bert.pairs, scores))
        save_model(bert.model, tmp_path / "model", path=paths[-1])
    (tmp_path / "model" / "path.txt").write_text("mine")
    save_model(bert.model, tmp_path / "model", path=paths[0])
    paths[0].save(tmp_path / "alone")
    expected = listing(tmp_path / "alone")
    assert {name: file for name, file in listing(tmp_path / "model").items() if name in expected} == expected
    assert len(list((tmp_path / "model").glob("path*"))) == len(expected) + 1


def test_a_model_does_not_replace_the_one_it_was_made_from(saved: tuple[nn.Module, Path]) -> None:
    small, folder = saved
    before = listing(folder)
    with pytest.raises(ArtifactError, match="was made from, and would be lost; choose another folder"):
        save_model(small, folder, source=f"{folder}/../small")
    assert listing(folder) == before


def test_the_current_folder_is_a_folder_like_any_other(
    saved: tuple[nn.Module, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small, folder = saved
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    save_model(small, ".", card="old")
    assert listing(tmp_path / "here").keys() == listing(folder).keys()


def test_saving_changes_nothing_in_the_model(subject: Subject, small: Any, tmp_path: Path) -> None:
    before = snapshot(small)
    save_model(small, tmp_path / "out")
    after = snapshot(small)
    for parts in (before, after):
        parts.pop("config")  # save_pretrained itself notes the architecture there
    assert after == before


class Listed(nn.Module):
    """Calls its maps from a list of its own, as Mask2Former does."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(4, 8), nn.Linear(8, 4)
        self.layers = [self.fc1, nn.ReLU(), self.fc2]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_maps_that_a_model_holds_in_two_places_change_in_both(tmp_path: Path) -> None:
    model, inputs = Listed(), {"x": torch.randn(3, 4)}
    small = slice_model(model, selection_of(find_pairs(model, inputs), "uneven"))
    save_model(small, tmp_path / "small")
    loaded = load_model(Listed(), tmp_path / "small")
    assert torch.equal(loaded(**inputs), small(**inputs))
    assert not torch.equal(small(**inputs), model(**inputs))


def test_a_layer_that_is_held_twice_is_not_saved_by_halves(tmp_path: Path) -> None:
    dense = tiny_model("bert")
    dense.again = dense.bert.encoder.layer[0]
    pairs = find_pairs(dense)
    small = slice_model(dense, selection_of(pairs, "uneven"))
    with pytest.raises(ArtifactError, match=r"cannot save the BertForMaskedLM: .* holds twice .* by copy\.deepcopy"):
        save_model(small, tmp_path / "small")
    assert not list(tmp_path.iterdir())
