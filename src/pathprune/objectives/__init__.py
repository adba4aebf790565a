"""What a smaller model is to keep of what the dense one computes."""

from pathprune.objectives.base import Objective
from pathprune.objectives.choose import auto, get_objective, objective_name
from pathprune.objectives.embedding import EmbeddingObjective, HiddenObjective
from pathprune.objectives.logits import LogitsObjective
from pathprune.objectives.targets import Targets
from pathprune.objectives.task import TaskObjective

__all__ = [
    "EmbeddingObjective",
    "HiddenObjective",
    "LogitsObjective",
    "Objective",
    "Targets",
    "TaskObjective",
    "auto",
    "get_objective",
    "objective_name",
]
