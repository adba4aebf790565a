"""Sliced models for other runtimes: one file a target."""
