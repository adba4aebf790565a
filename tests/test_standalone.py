"""Folders that open where pathprune is not: ``save_model(standalone=True)``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BertConfig, BertModel, BertTokenizer

import pathprune as pp
from golden import make
from pathprune.checkpoint.standalone import CODE
from pathprune.errors import UnsupportedModelError

AUTO = {
    "bert": "AutoModel",
    "llama": "AutoModelForCausalLM",
    "mixtral": "AutoModelForCausalLM",
    "t5": "AutoModelForSeq2SeqLM",
}

# In a process in which pathprune cannot be imported.
OPEN = """
import sys
sys.modules["pathprune"] = None
import torch, transformers
from safetensors.torch import load_file
auto, folder = sys.argv[1:]
stored = load_file(folder + "/expected.safetensors")
inputs = {name[3:]: tensor for name, tensor in stored.items() if name.startswith("in.")}
kind = getattr(transformers, auto)
options = {"experts_implementation": "eager"} if "mixtral" in folder else {}
model = kind.from_pretrained(folder, trust_remote_code=True, **options).eval()
with torch.no_grad():
    apart = (model(**inputs)[0] - stored["out"]).abs().max()
assert apart <= 1e-9 * stored["out"].abs().max(), apart
fresh = kind.from_config(model.config, trust_remote_code=True)
assert {n: p.shape for n, p in fresh.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
assert all(torch.isfinite(p).all() for p in fresh.parameters())
model.save_pretrained(folder + "/again")
again = kind.from_pretrained(folder + "/again", trust_remote_code=True, **options).eval()
with torch.no_grad():
    assert torch.equal(again(**inputs)[0], model(**inputs)[0])
print(type(model).__name__, hasattr(model.config, "quantization_config"))
"""

DISTRUST = """
import sys
sys.modules["pathprune"] = None
import transformers
getattr(transformers, sys.argv[1]).from_pretrained(sys.argv[2], ignore_mismatched_sizes=True)
"""


def small_model(name: str) -> tuple[Any, Any]:
    """Sliced, with heads, dimensions and neurons missing unevenly; and the dense one."""
    dense = make.dense_model(name)
    pairs = pp.find_pairs(dense, make.inputs(name))
    generator = torch.Generator().manual_seed(3)
    scores = {pair.name: torch.rand(pair.shape, generator=generator) for pair in pairs}
    path = pp.SolutionPath.from_scores(pairs, scores, multiple=8 if name == "mixtral" else 1)
    path = pp.compensate(dense, path, [make.inputs(name)], progress=False)
    return pp.slice_model(dense, path.select(pp.Budget(keep=0.5))), dense


@pytest.mark.parametrize("name", AUTO)
def test_a_folder_opens_without_us(name: str, tmp_path: Path, python: Callable[..., Any]) -> None:
    small, _ = small_model(name)
    folder = tmp_path / name
    pp.save_model(small, folder, standalone=True)
    tensors = {f"in.{key}": value.clone() for key, value in make.inputs(name).items()}
    save_file({**tensors, "out": make.outputs(small, name).contiguous()}, folder / "expected.safetensors")
    done = python(OPEN, AUTO[name], folder)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == [f"Sliced{type(small).__name__}", "False"]

    done = python(DISTRUST, AUTO[name], folder)
    assert done.returncode != 0
    assert "trust_remote_code=True" in done.stderr.strip().splitlines()[-1]


def test_the_code_in_the_folder_imports_nothing_of_ours(tmp_path: Path) -> None:
    small, _ = small_model("bert")
    pp.save_model(small, tmp_path / "small", standalone=True)
    code = (tmp_path / "small" / CODE).read_text()
    assert "import pathprune" not in code
    assert "from pathprune" not in code
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    assert config["model_type"] == "pathprune_bert"
    assert config["auto_map"]["AutoModelForMaskedLM"] == "modeling_pathprune.SlicedBertForMaskedLM"


def test_another_head_of_the_architecture_opens_with_the_same_encoder(tmp_path: Path) -> None:
    small, _ = small_model("bert")
    pp.save_model(small, tmp_path / "small", standalone=True)
    found = AutoModelForSequenceClassification.from_pretrained(tmp_path / "small", trust_remote_code=True).eval()
    inputs = make.inputs("bert")
    with torch.no_grad():
        torch.testing.assert_close(found.bert(**inputs)[0], small(**inputs)[0], rtol=1e-12, atol=1e-12)


def test_where_pathprune_is_the_folder_opens_too_and_trains(tmp_path: Path) -> None:
    small, dense = small_model("llama")
    pp.save_model(small, tmp_path / "small", standalone=True)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "small", trust_remote_code=True).eval()
    inputs = make.inputs("llama")
    recovered: Any = pp.recover(loaded, dense, [inputs] * 4, steps=2, progress=False)
    assert type(recovered) is type(loaded)
    assert loaded.generate(inputs["input_ids"], max_new_tokens=3).shape == (3, 10)


def test_what_cannot_stand_alone_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    class Mine(BertModel):
        pass

    settings: dict[str, Any] = {**make.COMMON, "num_attention_heads": 3, "max_position_embeddings": 16}
    model = Mine(BertConfig(**settings)).eval()
    with pytest.raises(UnsupportedModelError, match=r"standalone=True is for sliced models .* the Mine is none"):
        pp.save_model(model, tmp_path / "small", standalone=True)
    pairs = pp.find_pairs(model)
    path = pp.SolutionPath.from_scores(pairs, {pair.name: torch.rand(pair.shape) for pair in pairs})
    small = pp.slice_model(model, path.select(pp.Budget(keep=0.5)))
    with pytest.raises(UnsupportedModelError, match=r"Mine is from \S*test_standalone, not from transformers"):
        pp.save_model(small, tmp_path / "small", standalone=True)
    assert not list(tmp_path.iterdir())


def test_the_command_writes_it_with_the_tokenizer(tmp_path: Path, python: Callable[..., Any]) -> None:
    small, _ = small_model("bert")
    pp.save_model(small, tmp_path / "small")
    (tmp_path / "small" / "tokenizer_config.json").write_text("{}")
    command = "import sys\nsys.argv = ['pathprune', *sys.argv[1:]]\nfrom pathprune.cli.app import main\nmain()"
    done = python(command, "export", "auto", tmp_path / "small", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{tmp_path / 'out'}: AutoModel.from_pretrained(")
    assert (tmp_path / "out" / "tokenizer_config.json").exists()
    done = python(command, "export", "auto", tmp_path / "small", "--out", tmp_path / "out")
    assert (done.returncode, "--overwrite replaces it" in done.stderr) == (2, True)
    done = python(command, "evaluate", tmp_path / "out", "--teacher", tmp_path / "small", "--data", tmp_path)
    assert (done.returncode, "is an export, which opens by code of its own" in done.stderr) == (2, True)
    done = python(command, "export", "onx", tmp_path / "small", "--out", tmp_path / "other")
    assert (done.returncode, "'onx' is not one of auto" in done.stderr) == (2, True)


def test_sentence_transformers_opens_it(tmp_path: Path, python: Callable[..., Any]) -> None:
    pytest.importorskip("sentence_transformers")
    small, _ = small_model("bert")
    small.float()
    source = tmp_path / "source"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(35))]
    source.mkdir()
    (source / "vocab.txt").write_text("\n".join(words))
    BertTokenizer(str(source / "vocab.txt")).save_pretrained(source)
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    ]
    (source / "modules.json").write_text(json.dumps(modules))
    (source / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 24, "pooling_mode_mean_tokens": True}
    (source / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    pp.save_model(small, tmp_path / "small", source=source, standalone=True)
    done = python(
        """
import sys
sys.modules["pathprune"] = None
from sentence_transformers import SentenceTransformer
print(SentenceTransformer(sys.argv[1], trust_remote_code=True, device="cpu").encode(["w1 w2 w3", "w4"]).shape)
""",
        tmp_path / "small",
    )
    assert done.stdout.strip() == "(2, 24)", done.stderr[-1500:]
