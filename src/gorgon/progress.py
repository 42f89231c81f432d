"""Progress bars and log lines, on stderr only: stdout belongs to data."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

console = Console(stderr=True, highlight=False)
LINE_SECONDS = 20.0
"""Without a terminal, as in a job's log, progress is a line this often."""


def say(text: str) -> None:
    """One log line on stderr."""
    console.print(text, markup=False, soft_wrap=True)


class Bar:
    """One running bar; `advance` moves it, `note` changes the text behind it."""

    def __init__(self, title: str, total: int, progress: Progress | None) -> None:
        self._title, self._total, self._done, self._note = title, total, 0.0, ""
        self._progress = progress
        self._task = progress.add_task(title, total=total, note="") if progress is not None else TaskID(0)
        self._told = time.monotonic()

    def advance(self, amount: float = 1) -> None:
        """Moves the bar on; where no bar can be drawn, says so in a line every LINE_SECONDS."""
        self._done += amount
        if self._progress is not None:
            self._progress.advance(self._task, amount)
        elif time.monotonic() - self._told >= LINE_SECONDS:
            self._told = time.monotonic()
            say(f"{self._title}: {self._done:.0f}/{self._total} {self._note}".rstrip())

    def note(self, text: str) -> None:
        """Shows a short text, such as the current loss, behind the bar."""
        self._note = text
        if self._progress is not None:
            self._progress.update(self._task, note=text)


@contextmanager
def bar(title: str, total: int) -> Iterator[Bar]:
    """A progress bar over `total` units, gone from the screen when the block ends; lines where there is no screen."""
    if not console.is_terminal:
        yield Bar(title, total, None)
        return
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True) as progress:
        yield Bar(title, total, progress)
