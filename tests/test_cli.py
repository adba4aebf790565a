"""The command line as a user meets it: in a process of its own."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    ResNetConfig,
    ResNetModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

import pathprune as pp
from helpers import VOCAB, tiny_bert
from pathprune.cli.app import main
from pathprune.cli.options import parse_size
from pathprune.family.path import SolutionPath
from pathprune.objectives.targets import Targets
from pathprune.ranking.config import SearchConfig

SHAPE: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}
COMMAND = [sys.executable, "-c", "from pathprune.cli.app import main; main()"]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny dense model with a tokenizer, and texts beside it."""
    folder = tmp_path_factory.mktemp("dense") / "model"
    tiny_bert().save_pretrained(folder)
    vocab = {"[PAD]": 0, "[UNK]": 1, **{f"w{i}": i for i in range(2, VOCAB)}}
    core = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    lines = [" ".join(f"w{i}" for i in torch.randint(2, VOCAB, (6,), generator=generator)) for _ in range(64)]
    (folder.parent / "texts.txt").write_text("\n".join(lines))
    (folder.parent / "texts.jsonl").write_text("\n".join(json.dumps({"body": line}) for line in lines))
    return folder


def call(*args: object) -> subprocess.CompletedProcess[str]:
    """In a process of its own, where starting costs seconds."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([*COMMAND, *map(str, args)], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


Ask = Callable[..., tuple[int, str, str]]


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Ask:
    """The same command inside this process: (exit code, stdout, stderr)."""

    def run(*args: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["pathprune", *map(str, args)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        return int(stop.value.code or 0), *capfd.readouterr()

    return run


def test_the_whole_pipeline(dense: Path, tmp_path: Path, ask: Ask) -> None:
    def answer(*args: object) -> Any:
        code, out, err = ask(*args)
        assert code == 0, err
        return json.loads(out) if "--json" in args else out

    texts = dense.parent / "texts.txt"
    facts = answer("inspect", dense, "--json")
    assert len(facts["pairs"]) == 6
    assert 0 < facts["prunable_fraction"] < 1
    assert "encoder.layer.1.attention.qk" in answer("inspect", dense)

    done = call("search", dense, "--data", texts, "--out", tmp_path / "run", "--steps", 8, "--multiple", 2, "--seed", 3)
    assert "pathprune slice" in done.stdout  # what to do next
    said = done.stderr.splitlines()
    assert said[:2] == [
        "read 64 texts from texts.txt, one a line",
        "texts are cut at 8 tokens (--max-length); 0 of the 64 texts are longer",
    ]
    assert "search: 8 steps over 64 texts of up to 6 tokens, 384 tokens in 4 batches" in said
    assert "warning: --steps 8 is few: 1 measure curvature, and 6 find the path" in done.stderr
    assert said[-2] == "search: 6 steps"
    assert said[-1].startswith("search: 6 steps done in ")
    assert "|" not in done.stderr  # no bar when piped
    assert SolutionPath.load(tmp_path / "run").config["seed"] == 3

    half, recovered = tmp_path / "half", tmp_path / "recovered"
    facts = answer("slice", tmp_path / "run", dense, "--keep", 0.5, "--out", half, "--json")
    assert facts["prunable_params_kept_fraction"] <= 0.5
    assert (half / "tokenizer.json").exists()
    answer("slice", tmp_path / "run", dense, "--params", facts["params"], "--out", tmp_path / "same")
    answer("slice", tmp_path / "run", dense, "--macs", 0.9, "--out", tmp_path / "macs")

    jsonl = ("--data", dense.parent / "texts.jsonl", "--field", "body")
    settings = ("--steps", 20, "--lr", 3e-3)
    facts = answer("recover", half, "--teacher", dense, *jsonl, *settings, "--out", recovered, "--json")
    assert facts["fidelity_held_out"]["after"] >= facts["fidelity_held_out"]["before"]
    rows = answer("evaluate", half, recovered, "--teacher", dense, "--data", texts, "--json")["models"]
    assert rows[0]["fidelity"] == pytest.approx(1)
    assert rows[1]["params"] == rows[2]["params"] < rows[0]["params"]
    assert rows[1]["bytes_on_disk"] < rows[0]["bytes_on_disk"]
    said = answer("evaluate", half, "--teacher", dense, "--data", texts)
    assert "half" in said
    assert "(fidelity on 64 texts of up to 6 tokens, 384 tokens in 4 batches)" in said

    whole = tmp_path / "elastic"
    said = answer("elastic", tmp_path / "run", dense, "--data", texts, *settings, "--out", whole)
    assert f"pathprune slice {whole} {whole} --keep 0.5" in said
    again = ("elastic", tmp_path / "run", dense, "--data", texts, "--steps", 2, "--lowest", 0.4, "--out", whole)
    assert answer(*again, "--overwrite", "--json")["lowest"] == 0.4
    assert (whole / "tokenizer.json").exists()
    assert len(list(whole.glob("path*"))) == 2, "the old path is gone, its tensors too"
    facts = answer("slice", whole, whole, "--keep", 0.5, "--out", tmp_path / "elastic-50", "--json")
    assert not (tmp_path / "elastic-50" / "path.json").exists(), "the path is that of the whole model"
    assert facts["params"] == sum(p.numel() for p in pp.load_slice(whole, pp.Budget(keep=0.5)).parameters())


def test_each_kind_of_model_gets_its_data_and_objective(dense: Path, tmp_path: Path, ask: Ask) -> None:
    """A language model, an encoder-decoder and an image classifier keep their heads, from search to evaluation."""
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, **SHAPE))
    t5_shape: dict[str, Any] = {"d_model": 16, "d_kv": 8, "d_ff": 12, "num_layers": 1, "num_heads": 2}
    t5_shape |= {"decoder_start_token_id": 0}
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=VOCAB, **t5_shape))
    vit = ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, **SHAPE))
    pictures, texts = tmp_path / "pictures", dense.parent / "texts.txt"
    pictures.mkdir()
    for i in range(4):
        Image.new("RGB", (9, 9), (60 * i, 20, 20)).save(pictures / f"{i}.png")
    for name, model, data in (("llama", llama, texts), ("t5", t5, texts), ("vit", vit, pictures)):
        source, run, half, after = (tmp_path / f"{name}{part}" for part in ("", "-run", "-half", "-after"))
        model.save_pretrained(source)
        if model is vit:
            ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(source)
        else:
            AutoTokenizer.from_pretrained(dense).save_pretrained(source)
        given = ("--data", data, "--max-length", 10, "--json")
        for command in (
            ("search", source, *given, "--out", run, "--steps", 4, "--multiple", 1),
            ("slice", run, source, "--keep", 0.5, "--out", half, "--json"),
            ("recover", half, "--teacher", source, *given, "--out", after, "--steps", 2),
        ):
            code, _, err = ask(*command)
            assert code == 0, err
        assert SolutionPath.load(run).config["objective"] == "logits"
        assert SolutionPath.load(run).seq_len == (5 if model is vit else 10 if model is llama else 6)
        code, out, err = ask("evaluate", half, after, "--teacher", source, *given)
        assert code == 0, err
        facts = json.loads(out)
        assert facts["objective"] == "logits"
        assert facts["models"][0]["fidelity"] == pytest.approx(1, abs=1e-6)
        assert type(type(model).from_pretrained(after)) is type(model)
        assert json.loads((after / "config.json").read_text())["architectures"] == [type(model).__name__]


@pytest.mark.parametrize(("positions", "window"), [(2048, 256), (32, 32)])
def test_language_models_are_searched_in_long_windows(
    dense: Path, tmp_path: Path, ask: Ask, positions: int, window: int
) -> None:
    config = LlamaConfig(vocab_size=VOCAB, max_position_embeddings=positions, **SHAPE)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    AutoTokenizer.from_pretrained(dense).save_pretrained(tmp_path / "llama")
    given = ("--data", dense.parent / "texts.txt", "--steps", 4, "--lowest", 0.5, "--no-compensate")
    code, _, err = ask("search", tmp_path / "llama", *given, "--out", tmp_path / "run")
    assert code == 0, err
    path = SolutionPath.load(tmp_path / "run")
    assert path.seq_len == window
    assert (path.config["lowest_level"], path.config["compensate"], path.covariance) == (0.5, False, {})


def test_a_head_that_the_weights_lack_is_not_invented(dense: Path, tmp_path: Path, ask: Ask) -> None:
    folder = tmp_path / "encoder"
    shutil.copytree(dense, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["BertForMaskedLM"]}))
    code, out, err = ask("inspect", folder, "--json")
    assert code == 0, err
    assert json.loads(out)["base"]["architecture"] == "BertModel"


def test_bad_input_exits_with_2_and_leaves_nothing(dense: Path, tmp_path: Path, ask: Ask) -> None:
    texts = dense.parent / "texts.txt"
    run = tmp_path / "run"
    assert ask("search", dense, "--data", texts, "--out", run, "--steps", 4)[0] == 0

    def refused(message: str, *args: object) -> None:
        code, _, err = ask(*args)
        assert code == 2
        assert message in err
        assert "Traceback" not in err

    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "broken.jsonl").write_text("{")
    new = tmp_path / "new"
    refused("is empty", "search", dense, "--data", tmp_path / "empty.txt", "--out", new)
    refused("cannot read", "search", dense, "--data", tmp_path / "absent.txt", "--out", new)
    refused("is not text", "search", dense, "--data", tmp_path / "broken.jsonl", "--out", new)
    refused("'--steps'", "search", dense, "--data", texts, "--out", new, "--steps", 1)
    refused("cannot load a model", "inspect", tmp_path / "absent")
    shape: dict[str, Any] = {"embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1]}
    ResNetModel(ResNetConfig(num_channels=3, **shape)).save_pretrained(tmp_path / "resnet")
    refused("ResNetModel: no attention or MLP", "inspect", tmp_path / "resnet")
    refused("'--multiple'", "search", dense, "--data", texts, "--out", new, "--multiple", 0)
    refused("exactly one of", "slice", run, dense, "--out", new)
    refused("smallest model", "slice", run, dense, "--params", 200, "--out", new)
    refused("not in (0, 1]", "slice", run, dense, "--keep", 1.5, "--out", new)
    refused("neither a fraction", "slice", run, dense, "--params", "many", "--out", new)
    refused("holds no complete path", "slice", tmp_path / "absent", dense, "--keep", 0.5, "--out", new)
    refused("begun with", "search", dense, "--data", texts, "--out", run, "--steps", 5, "--resume")
    tiny_bert(seed=1).save_pretrained(tmp_path / "other")
    refused("another model", "slice", run, tmp_path / "other", "--keep", 0.5, "--out", new)
    refused("cannot write", "slice", run, dense, "--keep", 0.5, "--out", texts / "below-a-file")
    refused("is not a model folder", "slice", run, dense, "--keep", 0.5, "--out", run)
    refused("would be lost", "recover", tmp_path / "other", "--teacher", dense, "--data", texts, "--out", dense)
    refused("is not a model folder", "elastic", run, dense, "--data", texts, "--out", run)  # before it trains
    refused(
        "cannot run on --device nowhere", "evaluate", dense, "--teacher", dense, "--data", texts, "--device", "nowhere"
    )
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "pictures" / "a.png")
    refused("has nothing to read them with", "search", dense, "--data", tmp_path / "pictures", "--out", new)
    shutil.rmtree(tmp_path / "pictures")
    shutil.copytree(dense, tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    refused("cannot load a model", "inspect", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut")
    assert not new.exists()
    tensors = next(run.glob("path-*.safetensors"))
    tensors.write_bytes(tensors.read_bytes()[:-10])
    refused("truncated", "slice", run, dense, "--keep", 0.5, "--out", new)
    refused("No such option", "search", "--nonsense")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken.jsonl", "empty.txt", "other", "resnet", "run"]


def test_what_is_there_is_replaced_only_when_asked(
    dense: Path, tmp_path: Path, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the refusal comes before a model is loaded."""
    texts, run, half = dense.parent / "texts.txt", tmp_path / "run", tmp_path / "run" / "keep-50"
    searching = ("search", dense, "--data", texts, "--out", run, "--steps", 4)
    assert ask(*searching)[0] == 0
    cutting = ("slice", run, dense, "--keep", 0.5, "--out", half)
    assert ask(*cutting)[0] == 0
    whole = tmp_path / "elastic"
    training = ("elastic", run, dense, "--data", texts, "--steps", 2, "--out", whole)
    assert ask(*training)[0] == 0
    recovering = ("recover", half, "--teacher", dense, "--data", texts, "--steps", 2, "--out", whole)
    finished = f"{run} holds a finished path; --resume to load it, --overwrite to search anew in its place, or choose"
    held = f"{whole} holds a model; --overwrite replaces it, or choose another --out"
    refused: tuple[tuple[str, tuple[object, ...]], ...] = (
        (finished, searching),
        (f"{half} holds a model; --overwrite replaces it", cutting),
        (held, training),
        (held, recovering),
        ("is not empty; --overwrite replaces a demo that is there", ("demo", "--out", run)),
        ("give one of them", (*searching, "--resume", "--overwrite")),
    )
    with monkeypatch.context() as patch:
        for name in ("search", "slice", "recover", "elastic"):
            patch.setattr(f"pathprune.cli.{name}.load_dense", None)
        patch.setattr("pathprune.demo.minilm", None)
        for message, command in refused:
            code, _, err = ask(*command)
            assert (code, message in err) == (2, True), err
        (run / "checkpoint.json").write_text("{}")
        code, _, err = ask(*searching)
        assert (code, "unfinished search; --resume to go on with it, --overwrite to search anew" in err) == (2, True)
        (run / "checkpoint.json").unlink()

    code, _, err = ask(*searching, "--seed", 1, "--overwrite")
    assert (code, f"note: {half}: cut from the path that is replaced; slice again" in err) == (0, True), err
    assert SolutionPath.load(run).config["seed"] == 1
    code, _, err = ask(*cutting, "--overwrite")
    assert (code, "note" in err) == (0, False), err
    assert ask(*recovering, "--overwrite")[0] == 0
    assert pp.SolutionPath.load(whole).delta, "what stands beside a model stays"


def test_the_wrong_input_is_refused_before_anything_slow(
    dense: Path, tmp_path: Path, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one line, before a model is loaded."""
    for command in ("inspect", "search", "slice", "recover", "elastic", "evaluate"):
        monkeypatch.setattr(
            f"pathprune.cli.{command}.load_dense", lambda name, device: pytest.fail(f"{name} was loaded")
        )
    monkeypatch.chdir(tmp_path)
    texts, out = dense.parent / "texts.txt", ("--out", tmp_path / "new")
    SolutionPath.from_scores(pairs := pp.find_pairs(tiny_bert()), {p.name: torch.rand(p.shape) for p in pairs}).save(
        "run"
    )
    for name, content in {
        "t.csv": b"id,body\n1,hello",
        "binary.txt": bytes(range(256)) * 400,
        "saved/state.json": b"{}",
        "saved/data.arrow": b"x",
        "adapter/adapter_config.json": b"{}",
        "st/0_Transformer/config.json": b"{}",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)

    def refused(message: str, *args: object) -> None:
        code, said, err = ask(*args)
        assert (code, said) == (2, "")
        assert message in err
        assert len(err) < 700
        assert err.startswith("Usage:") or [line[:7] for line in err.splitlines() if "read 64" not in line] == [
            "error: "
        ]

    search = ("search", dense, *out, "--data")
    refused("t.csv has no column 'text'; it has 'id', 'body'. Name the one to read by --field", *search, "t.csv")
    refused("binary.txt is a binary file", *search, "binary.txt")
    refused("saved is a dataset as the library datasets saves it", *search, "saved")
    refused("cannot read nothing: No such file", *search, "nothing")
    refused("'--objective'", *search, texts, "--objective", "embeddings")
    refused("'--seed'", *search, texts, "--seed", 10**30)
    refused("'--multiple'", *search, texts, "--multiple", 10**30)
    refused("--lowest 1.5 must lie between 0 and 1", *search, texts, "--lowest", 1.5)
    refused("--resume: ", *search, texts, "--resume")
    for command in ("recover", "elastic"):
        args = (dense, "--teacher", dense) if command == "recover" else ("run", dense)
        for rate in ("nan", "0", "inf"):
            refused(f"--lr {rate} must be positive", command, *args, *out, "--data", texts, "--lr", rate)
    refused("holds no complete path", "elastic", dense, dense, *out, "--data", texts)
    refused("--keep 50 is not in (0, 1]; for 50 % write 0.5 or 50%", "slice", "run", dense, *out, "--keep", 50)
    refused("--keep 18M is not in (0, 1]", "slice", "run", dense, *out, "--keep", "18M")
    refused("--params 50 is an absolute number", "slice", "run", dense, *out, "--params", 50)
    refused(
        "takes exactly one of --keep, --params, --macs or --bytes",
        "slice",
        "run",
        dense,
        *out,
        "--keep",
        0.5,
        "--macs",
        0.5,
    )
    for model, message in {
        "./enc-50": "cannot load a model from ./enc-50: no such folder",
        "a/b/c": "no such folder",
        "t.csv": "it is a file",
        "run": "is the folder of a search, not of a model",
        "adapter": "is an adapter (LoRA or the like); merge it into its model first",
        "st": "has no config.json; is it st/0_Transformer?",
        "enc-50": "there is no folder of that name here, and not in the hub's cache either (HF_HUB_OFFLINE",
    }.items():
        refused(message, "inspect", model)
        refused(message, "search", model, *out, "--data", texts)
        refused(message, "slice", "run", model, *out, "--keep", 0.5)
        refused(message, "evaluate", model, "--teacher", dense, "--data", texts)
        refused(message, "recover", dense, "--teacher", model, *out, "--data", texts)
    assert not (tmp_path / "new").exists()


def test_the_hub_is_asked_once(tmp_path: Path) -> None:
    env = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    done = subprocess.run([*COMMAND, "inspect", "enc-50"], capture_output=True, text=True, env=env)
    assert done.returncode == 2
    assert "there is no folder of that name here, and the hub could not be asked" in done.stderr
    assert "Retrying" not in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("option", "text", "value"),
    [
        ("--keep", "0.5", 0.5),
        ("--keep", "50%", 0.5),
        ("--keep", "1", 1.0),
        ("--keep", "12.5 %", 0.125),
        ("--params", ".7", 0.7),
        ("--params", "100%", 1.0),
        ("--params", "1.0", 1.0),
        ("--params", "18M", 18_000_000),
        ("--params", "1.5b", 1_500_000_000),
        ("--params", "90_000_000", 90_000_000),
        ("--macs", "9e7", 90_000_000),
        ("--macs", "250k", 250_000),
        ("--macs", "2.5G", 2_500_000_000),
    ],
)
def test_sizes_are_read_as_people_write_them(option: str, text: str, value: float | int) -> None:
    found = parse_size(option, text)
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize("text", ["", "many", "-5", "50%%", "nan", "1e999", "0", "0%", "1.2.3e4", "101%", "1,5", "2.5"])
def test_what_is_no_size_is_refused(text: str) -> None:
    for option in ("--keep", "--params", "--macs"):
        with pytest.raises(pp.BudgetError, match=option):
            parse_size(option, text)


def test_every_command_cuts_texts_alike(dense: Path, tmp_path: Path, ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a length taken from the texts, never beyond the model's positions; what is cut is said."""
    monkeypatch.setattr("pathprune.evaluation.latency", lambda models, batch: [1.0] * len(models))
    words = [f"w{i % 50 + 2} " * (12 if i % 32 else 60) for i in range(64)]
    data = tmp_path / "texts.csv"
    data.write_text("text\n" + "\n".join(words))
    run, half = tmp_path / "run", tmp_path / "half"
    teacher = ("--teacher", dense, "--data", data)
    cut = "texts are cut at 16 tokens (--max-length); 2 of the 64 texts are longer\n"
    for command in (
        ("search", dense, "--data", data, "--out", run, "--steps", 4),
        ("slice", run, dense, "--keep", "50%", "--out", half),
        ("recover", half, *teacher, "--out", tmp_path / "recovered", "--steps", 2),
        ("elastic", run, dense, "--data", data, "--out", tmp_path / "elastic", "--steps", 2),
        ("evaluate", half, *teacher, "--json"),
    ):
        code, out, err = ask(*command)
        assert code == 0, err
        if command[0] != "slice":
            assert "read 64 texts from texts.csv, column 'text'\n" + cut in err
    assert json.loads(out)["latency_input"] == [16, 16]
    assert SolutionPath.load(run).seq_len == 16
    code, out, err = ask("evaluate", half, *teacher, "--max-length", 4)
    assert "cut at 4 tokens (--max-length); 64 of the 64 texts are longer" in err
    assert "(fidelity on 64 texts of up to 4 tokens, 256 tokens in 4 batches)" in out
    data.write_text("text\n" + "\n".join(f"{line} {line * 9}" for line in words))
    code, _, err = ask("evaluate", half, *teacher)
    assert code == 0, err
    assert "cut at 32 tokens" in err  # the model's positions
    code, _, err = ask("evaluate", half, *teacher, "--max-length", 33)
    assert code == 2
    assert "error: --max-length 33 is more than the 32 tokens that BertModel reads" in err


def test_the_dense_model_runs_once_for_all(
    dense: Path, tmp_path: Path, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []

    def counted(self: Any, batch: Any) -> Any:
        made.append("target")
        return real(self, batch)

    monkeypatch.setattr("pathprune.evaluation.latency", lambda models, batch: [1.0] * len(models))
    real = Targets.__call__
    monkeypatch.setattr(Targets, "__call__", counted)
    code, out, err = ask("evaluate", dense, dense, "--teacher", dense, "--data", dense.parent / "texts.txt", "--json")
    assert code == 0, err
    assert len(made) == 4  # batches, for three models
    assert [row["fidelity"] for row in json.loads(out)["models"]] == [pytest.approx(1, abs=1e-6)] * 3


@pytest.fixture(scope="module")
def classifier(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny classifier of texts into three."""
    folder = tmp_path_factory.mktemp("classifier") / "model"
    names: dict[str, Any] = {"id2label": {0: "sport", 1: "tech", 2: "7"}, "label2id": {"sport": 0, "tech": 1, "7": 2}}
    BertForSequenceClassification(BertConfig(vocab_size=VOCAB, **SHAPE, **names)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(dense).save_pretrained(folder)
    return folder


def test_labels_come_from_a_column(
    dense: Path, classifier: Path, tmp_path: Path, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def look(model: Any, batches: Any, **settings: Any) -> Any:
        seen.append((batches, settings["objective"]))
        raise pp.DataError("seen")

    monkeypatch.setattr("pathprune.ranking.run.search", look)
    table, out = tmp_path / "t.csv", ("--out", tmp_path / "run")
    search = ("search", classifier, "--data", table, *out, "--objective", "task")
    table.write_text("text,label,topic\n" + "w3 w4,tech,1\n,sport,0\nw5,7,2\n" + "w6,sport,0\n" * 20)
    for more in ((), ("--label-field", "topic")):
        assert ask(*search, *more)[2].endswith("error: seen\n")
        batches, objective = seen.pop()
        assert objective == "task"
        assert torch.cat([batch["labels"] for batch in batches]).tolist() == [1, 2] + [0] * 20
        assert [len(batch["labels"]) for batch in batches] == [16, 6]
    assert ask(*search[:-2])[2].endswith("error: seen\n")
    assert "labels" not in seen.pop()[0][0]  # they are not wanted

    def refused(message: str, *args: object) -> None:
        code, _, err = ask(*args)
        assert code == 2
        assert message in err

    refused(
        "no column 'genre'; it has 'text', 'label', 'topic'. Name the one to read by --label-field",
        *search,
        "--label-field",
        "genre",
    )
    table.write_text("text,label\nw3,tech\nw4,cooking\n")
    refused("the label 'cooking' of 'label' is none of the model's (sport, tech, 7)", *search)
    table.write_text("text,label\nw3,3\n")
    refused("the label '3' of 'label' is none of the model's", *search)
    refused("one text a line and no labels", *search[:3], dense.parent / "texts.txt", *search[4:])
    refused("--objective task is the model's own loss on labels, and BertModel has none", "search", dense, *search[2:])
    assert not seen


def test_tasks_of_language_models_and_of_pictures(dense: Path, tmp_path: Path, ask: Ask) -> None:
    """The next token, and the names of subfolders; a corrupt picture is left out and named."""
    llama, vit, pictures = tmp_path / "llama", tmp_path / "vit", tmp_path / "pictures"
    LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, **SHAPE)).save_pretrained(llama)
    AutoTokenizer.from_pretrained(dense).save_pretrained(llama)
    names: dict[str, Any] = {"id2label": {0: "dark", 1: "bright"}, "label2id": {"dark": 0, "bright": 1}}
    ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, **SHAPE, **names)).save_pretrained(vit)
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(vit)
    for i in range(6):
        file = pictures / ("bright" if i % 2 else "dark") / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9), (40 * i, 20, 20)).save(file)
    broken = pictures / "dark" / "broken.png"
    broken.write_bytes(b"no picture")
    texts, settings = dense.parent / "texts.txt", ("--objective", "task", "--steps", 4, "--multiple", 1)
    for model, data in ((llama, texts), (vit, pictures)):
        code, _, err = ask("search", model, "--data", data, "--max-length", 10, *settings, "--out", f"{model}-run")
        assert code == 0, err
        path = SolutionPath.load(f"{model}-run")
        assert path.config["objective"] == "task"
        assert (path.trajectory.loss > 0.3).all()  # a cross entropy, and no distance from the dense model
    assert err.count(f"warning: cannot read the image {broken}: cannot identify image file; it is left out") == 1
    assert "found 7 images" in err
    code, _, err = ask("search", vit, "--data", pictures, *settings, "--out", tmp_path / "none", "--max-bad", 0)
    assert code == 2
    assert f"cannot read the image {broken}: cannot identify image file; of 7 images, at most --max-bad 0" in err
    (pictures / "dark").rename(pictures / "dusk")
    code, _, err = ask("search", vit, "--data", pictures, *settings, "--out", tmp_path / "none")
    assert code == 2
    assert "the subfolder 'dusk' is none of the model's labels (dark, bright)" in err


def test_hints_name_what_was_given(dense: Path, tmp_path: Path, ask: Ask) -> None:
    folder = tmp_path / "my runs"
    code, out, err = ask("search", dense, "--data", dense.parent / "texts.txt", "--out", folder, "--steps", 4)
    assert code == 0, err
    line = next(line for line in out.splitlines() if line.startswith("Next: "))
    assert shlex.split(line)[1:5] == ["pathprune", "slice", str(folder), str(dense)]
    code, out, err = ask(*shlex.split(line)[2:])
    assert code == 0, err
    assert "texts.txt" not in out


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(28, "No space left on device", "/somewhere"), "error: No space left on device: /somewhere\n"),
        (KeyError("many\nlines"), "error: KeyError: 'many\\nlines'. pathprune did not foresee this"),
        (torch.OutOfMemoryError("CUDA"), "error: the device is out of memory; a smaller --batch-size"),
        (MemoryError(), "error: out of memory; a smaller --batch-size"),
    ],
)
def test_nothing_ends_in_a_traceback(ask: Ask, monkeypatch: pytest.MonkeyPatch, error: Exception, message: str) -> None:
    def fail(name: str) -> None:
        raise error

    monkeypatch.setattr("pathprune.cli.inspect.check_model", fail)
    code, out, err = ask("inspect", "model")
    assert (code, out) == (2, "")
    assert err.startswith(message)
    assert err.count("\n") == 1


def test_ctrl_c_keeps_what_is_done_and_resume_goes_on(dense: Path, tmp_path: Path) -> None:
    texts, out = dense.parent / "texts.txt", tmp_path / "run"
    command = [*COMMAND, "search", dense, "--data", texts, "--out", out, "--steps", "1200", "--batch-size", "4"]
    process = subprocess.Popen(
        list(map(str, command)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )

    def step() -> Any:
        try:
            return json.loads((out / "checkpoint.json").read_text())["step"]
        except (OSError, ValueError):
            return None

    deadline = time.monotonic() + 120
    while not step() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "--resume" in stderr
    assert "Traceback" not in stderr
    reached = step()
    planned = SearchConfig(steps=1200).path_steps
    assert 0 < reached < planned
    call("search", dense, "--data", texts, "--out", out, "--steps", 1200, "--batch-size", 4, "--resume", "--json")
    path = SolutionPath.load(out)
    assert len(path.trajectory.loss) == planned
    assert not (out / "checkpoint.json").exists()


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_stopped_elsewhere_exits_with_130_and_leaves_nothing(
    dense: Path, tmp_path: Path, ask: Ask, monkeypatch: pytest.MonkeyPatch, how: signal.Signals
) -> None:
    """By Ctrl-C, or by what a scheduler sends before it kills."""

    def stop(*args: Any, **kwargs: Any) -> Any:
        signal.raise_signal(how)

    texts = dense.parent / "texts.txt"
    assert ask("search", dense, "--data", texts, "--out", tmp_path / "run", "--steps", 4)[0] == 0
    monkeypatch.setattr("pathprune.transform.slicing.slice_modules", stop)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        assert ask("slice", tmp_path / "run", dense, "--keep", 0.5, "--out", tmp_path / "half")[0] == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_help_is_instant_and_version_agrees() -> None:
    def cpu() -> float:  # seconds of finished commands; time on the clock would be that of other tests, too
        times = os.times()
        return times.children_user + times.children_system

    started = []
    for _ in range(3):
        start = cpu()
        text = call("--help").stdout
        started.append(cpu() - start)
    for command in ("inspect", "search", "slice", "recover", "evaluate", "report", "demo"):
        assert command in text
    assert min(started) < 0.5
    assert call("--version").stdout.strip() == pp.__version__
