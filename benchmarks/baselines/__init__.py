"""Everyone's way to rank or prune units, one short function each; what they share is in ``problem``.

Each takes a ``Problem`` and returns a ``SolutionPath``, which holds every size, or a function that makes one size.
"""

from collections.abc import Callable
from typing import Any

from baselines.learned import lasso, lbi, ours, spp_released, upop
from baselines.peers import torch_pruning
from baselines.problem import Problem
from baselines.scores import fisher, flap, least_squares, magnitude, random, taylor, wanda

METHODS: dict[str, Callable[[Problem], Any]] = {
    "ours": ours,
    "random": random,
    "magnitude": magnitude,
    "taylor": taylor,
    "wanda": wanda,
    "flap": flap,
    "fisher": fisher,
    "least-squares": least_squares,
    "lasso": lasso,
    "spp-released": spp_released,
    "lbi": lbi,
    "upop": upop,
    "torch-pruning": torch_pruning,
}

__all__ = ["METHODS", "Problem"]
