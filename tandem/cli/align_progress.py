"""The progress of an alignment as a person sees it, on stderr."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from tandem.report.alignment_text import figures

_LINES = 10
"""Lines that a stage writes of its steps where stderr is no terminal."""


class Progress:
    """A bar a stage, with loss or reward; lines now and then where there is no terminal to draw it on."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self.bar = Bar(*columns, TextColumn("{task.fields[text]}"), console=self.console, disable=not self.console.is_terminal)
        self.tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Progress:
        self.bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.bar.stop()

    def listen(self, event: dict[str, Any]) -> None:
        """Show one event."""
        match event["kind"]:
            case "step":
                self._step(event)
            case "sampled":
                if event["done"] == event["total"]:
                    self._line(f"{event['stage']}: {event['done']:,} answers sampled")
            case "stage":
                self._line(f"{event['stage']}: {event['doing']}")
            case "report":
                for question, found in figures(event.get("evaluation", {})).items():
                    self._line(f"{event['stage']}: {question}: {found}")

    def _step(self, event: dict[str, Any]) -> None:
        parts = [f"{name} {event[name]:.4g}" for name in ("loss", "reward", "kl", "length") if name in event]
        text = "  ".join(parts)
        if event["stage"] not in self.tasks:
            self.tasks[event["stage"]] = self.bar.add_task(event["stage"], total=event["steps"], text="")
        self.bar.update(self.tasks[event["stage"]], completed=event["step"], text=text)
        every = max(1, event["steps"] // _LINES)
        if not self.console.is_terminal and event["step"] % every == 0:
            self._line(f"{event['stage']}: step {event['step']:,} of {event['steps']:,}: {text}")

    def _line(self, text: str) -> None:
        self.console.print(text, soft_wrap=True, markup=False)
