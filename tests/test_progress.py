"""Progress in a log: lines that say how far a loop is."""

from __future__ import annotations

import time

import pytest

from pathprune.progress import track


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds, as the loop sees them."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_a_log_gets_a_start_an_estimate_a_line_every_half_minute_and_an_end(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with track(total=100, desc="search", unit="step", progress=True, initial=20) as bar:
        for step in range(80):
            clock[0] += 2
            bar.set_postfix(loss=f"{1 - step / 100:.2f}", refresh=False)
            bar.update()
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == ""
    assert lines[:3] == [
        "search: 100 steps, of which 20 are done",
        "search: 25 of 100 steps, loss 0.96, 2 s a step, about 2 min left",
        "search: 40 of 100 steps, loss 0.81, 2 s a step, about 2 min left",
    ]
    assert len(lines) == 1 + 1 + 5 + 1
    assert lines[-1] == "search: 100 steps done in 3 min, loss 0.21"


def test_a_part_estimates_the_whole_and_needs_no_end(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    for _ in track(range(8), desc="bases", unit="step", progress=True, leave=False, rest=3592):
        clock[0] += 2
    assert capsys.readouterr().err.splitlines() == [
        "bases: 8 steps",
        "bases: 5 of 8 steps, 2 s a step, about 2.0 h left in all",
    ]


def test_a_short_loop_says_little_and_one_of_unknown_length_no_estimate(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in track(range(1), desc="curvature", unit="step", progress=True, leave=False):
        clock[0] += 2
    assert capsys.readouterr().err == "curvature: 1 step\n"
    for _ in track(iter(range(7)), desc="statistics", unit="batch", progress=True, leave=False):
        clock[0] += 10
    assert capsys.readouterr().err.splitlines() == [
        "statistics: 3 batches, 10 s a batch",
        "statistics: 6 batches, 10 s a batch",
    ]


@pytest.mark.parametrize("wanted", [None, False])
def test_nothing_is_shown_unasked(wanted: bool | None, capsys: pytest.CaptureFixture[str]) -> None:
    assert list(track([1, 2], desc="search", unit="step", progress=wanted)) == [1, 2]
    assert capsys.readouterr() == ("", "")


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert list(track([1, 2], desc="search", unit="step", progress=True)) == [1, 2]
    assert "100%|" in capsys.readouterr().err


def test_a_loop_that_fails_claims_no_end(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyboardInterrupt), track(total=9, desc="search", unit="step", progress=True):
        raise KeyboardInterrupt
    assert capsys.readouterr().err == "search: 9 steps\n"
