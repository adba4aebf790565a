"""Tiny models and data that several test files use."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import BertConfig, BertModel

VOCAB = 64


def tiny_bert(seed: int = 0) -> BertModel:
    """Two layers, 4 heads of 8, in eval mode; sizes unlike one another so that mix-ups show."""
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        initializer_range=0.3,
        max_position_embeddings=32,
    )
    return BertModel(config).eval()


def tiny_batches(count: int = 6, seed: int = 0) -> list[dict[str, Tensor]]:
    """Batches of 4 sequences of 7 tokens, with padding."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(count):
        mask = torch.ones(4, 7, dtype=torch.long)
        mask[1, 4:] = 0
        batches.append({"input_ids": torch.randint(5, VOCAB, (4, 7), generator=generator), "attention_mask": mask})
    return batches
