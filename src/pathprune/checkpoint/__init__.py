"""Sliced models on disk, and back."""
