"""What a run writes down of itself: one JSON object a line, and TensorBoard's files where it is installed and wished for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TextIO

from tandem.spec.errors import SpecError


class Journal:
    """`metrics.jsonl` of a run: one line for each step that counts."""

    def __init__(self, folder: Path, *, from_step: int, tensorboard: bool) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._board: Any = _board(folder, from_step) if tensorboard else None
        self._stream = _open(folder, from_step)

    def write(self, event: dict[str, Any]) -> None:
        """Add one line, on disk at once; numbers go to TensorBoard too, under the event's kind."""
        self._stream.write(json.dumps(event) + "\n")
        self._stream.flush()
        if self._board is not None:
            for name, value in _numbers(event):
                self._board.add_scalar(name, value, event["step"])

    def rewind(self, step: int) -> None:
        """Drop what was written after `step`: those steps are made again."""
        self._stream.close()
        self._stream = _open(self.folder, step)

    def close(self) -> None:
        """End the files."""
        self._stream.close()
        if self._board is not None:
            self._board.close()


def _board(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise SpecError("tensorboard=True: the package is not installed; pip install tensorboard") from None
    return SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)


def _open(folder: Path, step: int) -> TextIO:
    file = folder / "metrics.jsonl"
    draft = file.with_suffix(".new")
    kept = [line for line in read_journal(folder) if line["step"] <= step]
    draft.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
    draft.replace(file)
    return file.open("a", encoding="utf-8")


def read_journal(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's journal; a last one that was cut off by a crash is left out."""
    file = folder / "metrics.jsonl"
    if not file.is_file():
        return []
    lines: list[dict[str, Any]] = []
    for text in file.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            break
        if not isinstance(line, dict) or not {"kind", "step"} <= line.keys():
            raise SpecError(f"{file}: line {len(lines) + 1} is no event of a run; remove it, or the file")
        lines.append(line)
    return lines


def _numbers(event: dict[str, Any]) -> list[tuple[str, float]]:
    kind = event["kind"]
    flat = []
    for name, value in event.items():
        if name in ("kind", "step"):
            continue
        if isinstance(value, dict):
            flat += [(f"{kind}/{name}/{key}", float(v)) for key, v in value.items() if isinstance(v, (int, float))]
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            flat.append((f"{kind}/{name}", float(value)))
    return flat
