"""The progress of a training run as a person sees it, on stderr."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from tandem.train.recipe import Recipe

_LINES = 20
"""Lines that a run writes of its steps where stderr is no terminal."""


class Progress:
    """A bar with loss, learning rate, tokens/s and MFU; lines now and then where there is no terminal to draw it on."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.console = Console(stderr=True, highlight=False)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self.bar = Bar(*columns, TextColumn("{task.fields[text]}"), console=self.console, disable=not self.console.is_terminal)
        self.task = self.bar.add_task(recipe.name, total=recipe.batch.steps, text="")

    def __enter__(self) -> Progress:
        self.bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.bar.stop()

    def listen(self, event: dict[str, Any]) -> None:
        """Show one event."""
        if event["kind"] == "step":
            text = _step(event)
            self.bar.update(self.task, completed=event["step"], text=text)
            every = max(1, self.recipe.batch.steps // _LINES)
            if not self.console.is_terminal and event["step"] % every == 0:
                self.console.print(f"step {event['step']:,} of {self.recipe.batch.steps:,}: {text}", soft_wrap=True)
            return
        if event["kind"] == "data":
            self.bar.update(self.task, text=f"{event['stage']} {event['source']}: {event['documents']:,} documents")
            return
        line = _line(event)
        if line is not None:
            self.console.print(line, soft_wrap=True, markup=False)

    def summary(self, checkpoint: Path, metrics: dict[str, Any]) -> None:
        """Where the model is and what it came to, on stdout."""
        from tandem.report import text

        out = text.console()
        out.print(f"{checkpoint}: loss {metrics['loss']:.4f} after {metrics['tokens']:,} tokens", soft_wrap=True, markup=False)
        for task, found in metrics.get("accuracy", {}).items():
            out.print(f"  {task}: {found['accuracy']:.1%} ({found['low']:.1%} to {found['high']:.1%})")


def _step(event: dict[str, Any]) -> str:
    return (
        f"loss {event['loss']:.4f}  lr {event['lr']:.2e}  {event['tokens_per_s']:,.0f} tok/s"
        f"  MFU {event['mfu']:.0%}  phase {event['phase'] + 1}"
    )


def _shares(by_length: dict[str, dict[str, float]]) -> str:
    return ", ".join(f"{found['accuracy']:.0%} at {int(length):,}" for length, found in by_length.items())


def _line(event: dict[str, Any]) -> str | None:
    """An event of a run as a line of the log; None where the progress bar says it."""
    match event["kind"]:
        case "begin":
            return f"{event['recipe']}: {event['parameters'] / 1e6:.2f} M parameters, {event['steps']:,} steps"
        case "held_out":
            losses = "  ".join(f"{name} {loss:.3f}" for name, loss in event["loss"].items())
            return f"step {event['step']:,}: held-out loss {losses}"
        case "rollback":
            return f"step {event['step']:,}: back to here (return {event['retry']}), for {event['why']}"
        case "task":
            return f"{event['task']}: {event['accuracy']:.1%} of {event['count']} ({event['low']:.1%} to {event['high']:.1%})"
        case "needles":
            return "\n".join(f"{kind}: {_shares(by)}" for kind, by in event["needles"].items())
        case "samples":
            return "\n".join(f"sample: {prompt!r} -> {text!r}" for prompt, text in event["samples"].items())
    return None
