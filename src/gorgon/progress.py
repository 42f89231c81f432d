"""Progress bars and log lines, on stderr only: stdout belongs to data."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

console = Console(stderr=True, highlight=False)


def say(text: str) -> None:
    """One log line on stderr."""
    console.print(text, markup=False)


class Bar:
    """One running bar; `advance` moves it, `note` changes the text behind it."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress, self._task = progress, task

    def advance(self, amount: float = 1) -> None:
        """Moves the bar on."""
        self._progress.advance(self._task, amount)

    def note(self, text: str) -> None:
        """Shows a short text, such as the current loss, behind the bar."""
        self._progress.update(self._task, note=text)


@contextmanager
def bar(title: str, total: int) -> Iterator[Bar]:
    """A progress bar over `total` units, gone from the screen when the block ends."""
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True) as progress:
        yield Bar(progress, progress.add_task(title, total=total, note=""))
