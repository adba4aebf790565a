"""A search beside a training run of transformers' Trainer."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor
from transformers import TrainerCallback

from pathprune.discovery.discover import find_pairs
from pathprune.errors import SettingError
from pathprune.family.path import SolutionPath
from pathprune.objectives.base import Objective
from pathprune.ranking.config import SearchConfig
from pathprune.ranking.covariance import compensate
from pathprune.ranking.stepping import Search


class SearchCallback(TrainerCallback):
    """Searches a model while a Trainer trains it on one device: when training ends, its family is there.

    Training is what it would be without: weights are frozen in the steps of the search alone, which has batches and
    random numbers of its own. Each step compares the model with masks to the dense model as it is then; bases and
    covariances are those of the weights at the start, so it is for training that changes weights a little, as
    fine-tuning does. When training ends the steps that are left are done, and the path takes its means and covariances
    from the trained model, which it belongs to.

    Args:
        data: re-iterable of model-input dicts to search on, each one batch.
        config: how the search is set up.
        objective: a name, or an object with the methods of ``Objective``; by default what ``config`` names.
        every: training steps from one step of the search to the next.
        out: folder that the path is saved in.

    Attributes:
        path: after training.

    Raises:
        SettingError: ``every`` is not positive.

    Example:
        >>> callback = pp.SearchCallback(batches, pp.SearchConfig(steps=100), every=10, out=folder / "run")

        To use it: ``Trainer(model, arguments, train_dataset=..., callbacks=[callback]).train()``.
    """

    path: SolutionPath

    def __init__(
        self,
        data: Iterable[Mapping[str, Tensor]],
        config: SearchConfig | None = None,
        *,
        objective: str | Objective | None = None,
        every: int = 1,
        out: str | os.PathLike[str] | None = None,
    ) -> None:
        if every < 1:
            raise SettingError(f"every={every} must be positive: training steps to one step of the search")
        self.data, self.config, self.objective, self.every, self.out = data, config, objective, every, out

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.search = Search(kwargs["model"], self.data, self.config, objective=self.objective)
        self.search.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.every == 0 and self.search.steps_left:
            self._step()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = self.search.problem.model
        while self.search.steps_left:
            self._step()
        found = self.search.path()
        pairs = find_pairs(model, self.search.problem.batches.first)
        ranked = replace(found, pairs=pairs, fill={}, output={}, centre={}, covariance={})
        self.path = replace(compensate(model, ranked, self.data), output=found.output)
        if self.out is not None:
            self.path.save(self.out)

    def _step(self) -> None:
        self.search.problem.targets.known.clear()  # the dense model is another by now
        self.search.step()
