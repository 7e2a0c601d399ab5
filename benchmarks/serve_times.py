"""Notes when an engine's steps, decode steps and prefill passes begin and end; alone, runs `tandem` that way.

    python benchmarks/serve_times.py NOTES.json serve MODEL ...

The notes are written when the program ends: lists [kind, begin_s, end_s, rows, mean context] on the monotonic clock.
"""

from __future__ import annotations

import atexit
import json
import sys
from pathlib import Path
from time import monotonic
from typing import Any

from tandem.engine.engine import Engine
from tandem.engine.runner import Runner

Note = tuple[str, float, float, int, float]


def note_steps() -> list[Note]:
    """From now on, every engine of this process adds to the list that is returned; a note costs some microseconds."""
    notes: list[Note] = []
    step, decode, prefill = Engine.step, Runner.decode, Runner.prefill

    def noted_step(self: Engine) -> Any:
        begin = monotonic()
        result = step(self)
        notes.append(("step", begin, monotonic(), 0, 0.0))
        return result

    def noted_decode(self: Runner, ids: Any, lengths: Any, slots: Any, blocks: Any) -> Any:
        begin = monotonic()
        logits = decode(self, ids, lengths, slots, blocks)
        notes.append(("decode", begin, monotonic(), len(ids), sum(lengths) / len(lengths)))
        return logits

    def noted_prefill(self: Runner, tokens: Any, state: Any, **rest: Any) -> Any:
        begin = monotonic()
        logits = prefill(self, tokens, state, **rest)
        notes.append(("prefill", begin, monotonic(), 1, float(len(tokens))))
        return logits

    Engine.step, Runner.decode, Runner.prefill = noted_step, noted_decode, noted_prefill  # type: ignore[method-assign]
    return notes


def main() -> None:
    file, notes = Path(sys.argv[1]), note_steps()
    atexit.register(lambda: file.write_text(json.dumps(notes), encoding="utf-8"))
    del sys.argv[1]
    from tandem.cli.app import main as tandem

    tandem()


if __name__ == "__main__":
    main()
