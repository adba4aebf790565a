"""Write the golden artifacts: small folders of every kind that pathprune writes, with what they compute.

    python tests/golden/make.py 0.1.0

They are written once, by the release that they are named after, and never again: ``tests/test_golden.py`` holds every
later release to them. A new format gets a folder of its own beside the old ones.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn

import pathprune as pp

HERE = Path(__file__).parent
SIZES = (0.8, 0.5, 0.3)
COMMON: dict[str, Any] = {"vocab_size": 40, "hidden_size": 24, "num_hidden_layers": 2, "intermediate_size": 24}
SEARCH: dict[str, Any] = {"steps": 12, "multiple": 2, "output_lr": 0.01, "progress": False}

MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("BertConfig", "BertModel", {**COMMON, "num_attention_heads": 3, "max_position_embeddings": 16}),
    "llama": (
        "LlamaConfig",
        "LlamaForCausalLM",
        {**COMMON, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8},
    ),
    "mixtral": (
        "MixtralConfig",
        "MixtralForCausalLM",
        {
            **COMMON,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "num_local_experts": 3,
            "num_experts_per_tok": 2,
            "experts_implementation": "eager",
        },
    ),
    "t5": (
        "T5Config",
        "T5ForConditionalGeneration",
        {"vocab_size": 40, "d_model": 24, "d_kv": 8, "num_heads": 3, "d_ff": 24, "num_layers": 2, "pad_token_id": 0},
    ),
}


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.scale = heads, width // heads, (width // heads) ** -0.5
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        weights = (query @ key.mT * self.scale).softmax(-1)
        return self.proj((weights @ value).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A model of no library, whose query, key and value are one map."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.fc1, self.fc2 = Attention(24, 3), nn.Linear(24, 40), nn.Linear(40, 24)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(x)
        return x + self.fc2(torch.relu(self.fc1(x)))


def dense_model(name: str) -> Any:
    config, model_class, settings = MODELS[name]
    return _randomised(getattr(transformers, model_class)(getattr(transformers, config)(**settings)))


def _randomised(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data = 0.2 * noise + (parameter.dim() == 1)
    return model.double().eval()


def inputs(name: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    if name == "other":
        return {"x": torch.randn(3, 5, 24, generator=generator, dtype=torch.float64)}
    ids = torch.randint(3, 40, (3, 7), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    return {**batch, "decoder_input_ids": ids[:, :4]} if name == "t5" else batch


def batches() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    return [{"input_ids": torch.randint(3, 40, (4, 7), generator=generator)} for _ in range(6)]


class Interrupted:
    """Data that stops the search after some batches."""

    def __init__(self, data: list[dict[str, Tensor]], after: int) -> None:
        self.data, self.left = data, after

    def __len__(self) -> int:
        return len(self.data)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for batch in self.data:
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
            yield batch


@torch.no_grad()
def outputs(model: nn.Module, name: str) -> Tensor:
    found = model.eval()(**inputs(name))
    return found if isinstance(found, Tensor) else found[0]


def numbers(path: pp.SolutionPath) -> dict[str, Any]:
    """Sizes and widths of a few selections."""
    budgets = [pp.Budget(**{kind: size}) for kind in ("keep", "params", "macs") for size in SIZES]
    return {str(budget): path.select(budget).to_dict() for budget in budgets}


def write(folder: Path, tensors: dict[str, Tensor], **facts: Any) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "expected.safetensors")
    (folder / "expected.json").write_text(json.dumps(facts, indent=1) + "\n")


def main() -> None:
    root = HERE / sys.argv[1]
    if root.exists():
        sys.exit(f"{root} exists, and golden artifacts are written once")
    root.mkdir()

    dense = dense_model("bert")
    dense.save_pretrained(root / "dense")
    path = pp.search(dense, batches(), out=root / "path", objective="embedding", **SEARCH)
    small = {str(keep): outputs(pp.slice_model(dense, path.select(pp.Budget(keep=keep))), "bert") for keep in SIZES}
    write(root / "path", small, selections=numbers(path))

    with suppress(KeyboardInterrupt):
        pp.search(dense, Interrupted(batches(), 18), out=root / "checkpoint", objective="embedding", **SEARCH)
    resumed = root / "resumed"
    shutil.copytree(root / "checkpoint", resumed)
    path = pp.search(dense, batches(), out=resumed, objective="embedding", resume=True, **SEARCH)
    shutil.rmtree(resumed)
    ranking = {name: torch.from_numpy(array) for name, array in path.ranking.items()}
    write(root / "checkpoint", ranking, selections=numbers(path))

    trained, path = pp.elastic(dense, path, data=batches(), steps=4, progress=False)
    trained.save_pretrained(root / "elastic")
    path.save(root / "elastic")
    small = {str(keep): outputs(pp.slice_model(trained, path.select(pp.Budget(keep=keep))), "bert") for keep in SIZES}
    write(root / "elastic", small, selections=numbers(path))

    for name in ("bert", "llama", "mixtral", "t5", "other"):
        model: Any = _randomised(Block()) if name == "other" else dense_model(name)
        pairs = pp.find_pairs(model, inputs(name))
        generator = torch.Generator().manual_seed(3)
        scores = {pair.name: torch.rand(pair.shape, generator=generator) for pair in pairs}
        path = pp.SolutionPath.from_scores(pairs, scores, multiple=1 if name != "mixtral" else 8)
        if name != "other":
            path = pp.compensate(model, path, [inputs(name)], progress=False)
        small_model = pp.slice_model(model, path.select(pp.Budget(keep=0.5)))
        pp.save_model(small_model, root / f"sliced-{name}")
        write(root / f"sliced-{name}", {"output": outputs(small_model, name)})


if __name__ == "__main__":
    main()
