"""Batches of model inputs, made from texts and images as a user's own pipeline makes them."""

from pathprune.data.batches import Batch, Batches
from pathprune.data.images import Images
from pathprune.data.text import chat_text, first_tokens, fitting_length, packed, token_lengths, tokenized

__all__ = [
    "Batch",
    "Batches",
    "Images",
    "chat_text",
    "first_tokens",
    "fitting_length",
    "packed",
    "token_lengths",
    "tokenized",
]
