"""How far a loop is: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from types import TracebackType
from typing import Any

from tqdm import tqdm

EVERY = 30.0  # seconds between lines
FIRST = 5  # steps after which time can be estimated


def track(
    iterable: Iterable[Any] | None = None,
    *,
    desc: str,
    unit: str,
    progress: bool | None,
    total: int | None = None,
    initial: int = 0,
    leave: bool = True,
    rest: int = 0,
) -> Any:
    """A loop that shows how far it is; used as tqdm is: iterated, or a context whose ``update`` is called.

    Args:
        unit: what is counted, in the singular.
        progress: None shows a bar on a terminal and nothing elsewhere, True a bar on a terminal and lines elsewhere,
            False nothing.
        initial: units done before.
        leave: whether the end is worth a line.
        rest: units of the same cost that follow this loop, for an estimate of the whole.
    """
    if progress and not sys.stderr.isatty():
        return Lines(iterable, desc=desc, unit=unit, total=total, initial=initial, leave=leave, rest=rest)
    hidden = None if progress is None else not progress  # tqdm: None shows the bar on a terminal only
    return tqdm(iterable, desc=desc, unit=unit, total=total, initial=initial, leave=leave, disable=hidden)


class Lines:
    """A line at the start, one with an estimate after a few steps, then one every half minute, on standard error."""

    def __init__(
        self,
        iterable: Iterable[Any] | None,
        *,
        desc: str,
        unit: str,
        total: int | None,
        initial: int,
        leave: bool,
        rest: int,
    ) -> None:
        self.iterable, self.desc, self.unit, self.leave, self.rest = iterable, desc, unit, leave, rest
        self.total = len(iterable) if total is None and isinstance(iterable, Sized) else total
        self.initial = self.done = initial
        self.facts = ""
        self.began = self.said = time.monotonic()
        self.estimated = False
        if self.total is not None:
            self._say(f"{self._counted(self.total)}{f', of which {initial:,} are done' if initial else ''}")

    def __iter__(self) -> Iterator[Any]:
        with self:
            for one in self.iterable or ():
                yield one
                self.update()

    def __enter__(self) -> Lines:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if kind is None and self.leave:
            self._say(f"{self._counted(self.done)} done in {_span(time.monotonic() - self.began)}{self.facts}")

    def update(self, n: int = 1) -> None:
        self.done += n
        now = time.monotonic()
        new = self.done - self.initial
        pace = (now - self.began) / new
        left = None if self.total is None else pace * (self.total - self.done + self.rest)
        first = not self.estimated and new >= FIRST and left is not None and left >= EVERY
        if not first and now - self.said < EVERY:
            return
        self.said, self.estimated = now, True
        of = f"{self.done:,}" if self.total is None else f"{self.done:,} of {self.total:,}"
        whole = " in all" if self.rest else ""
        time_left = "" if left is None else f", about {_span(left)} left{whole}"
        self._say(f"{of} {_plural(self.unit)}{self.facts}, {pace:.2g} s a {self.unit}{time_left}")

    def set_postfix(self, refresh: bool = False, **facts: str) -> None:
        self.facts = "".join(f", {name} {value}" for name, value in facts.items())

    def _counted(self, count: int) -> str:
        return f"{count:,} {self.unit if count == 1 else _plural(self.unit)}"

    def _say(self, text: str) -> None:
        sys.stderr.write(f"{self.desc}: {text}\n")
        sys.stderr.flush()


def _plural(unit: str) -> str:
    return f"{unit}es" if unit.endswith("ch") else f"{unit}s"


def _span(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
