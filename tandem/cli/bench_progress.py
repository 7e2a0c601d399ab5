"""The progress of `tandem bench` as a person sees it, on stderr."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar


class Progress:
    """A bar a run; nothing where stderr is no terminal."""

    def __init__(self) -> None:
        console = Console(stderr=True, highlight=False)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self.bar = Bar(*columns, console=console, disable=not console.is_terminal)

    def __enter__(self) -> Progress:
        self.bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.bar.stop()

    def run(self, number: int, runs: int, requests: int) -> Callable[[int, int], None]:
        """A bar for one run; what to call after each request."""
        task = self.bar.add_task(f"run {number + 1} of {runs}", total=requests)
        return lambda done, _: self.bar.update(task, completed=done)
