"""Random numbers that do not depend on what is drawn elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from pathprune.model.contexts import seeded


class Randomness:
    """A stream of torch's random numbers, which goes on where it was whenever it is entered.

    Between two steps of a search its caller may draw as it likes: the search's data come in the same order.

    Raises:
        SettingError: the seed is none.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        self.seed, self.device = seed, device
        self.restart()

    def restart(self) -> None:
        with seeded(self.seed, self.device):
            self.state = self._read()

    @contextmanager
    def drawn(self) -> Iterator[None]:
        """What is drawn until the context ends comes from the stream; the caller's random state comes back."""
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.set_rng_state(self.state[0])
            if self.device.type == "cuda":
                torch.cuda.set_rng_state(self.state[1], self.device)
            try:
                yield
            finally:
                self.state = self._read()

    def _read(self) -> list[Tensor]:
        return [torch.get_rng_state(), *([torch.cuda.get_rng_state(self.device)] if self.device.type == "cuda" else [])]
