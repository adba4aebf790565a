"""Pairs of linear maps, found by what a model computes, and proved."""
