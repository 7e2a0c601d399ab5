"""Runs `tandem` and notes how long the router of its server takes to decide.

    python benchmarks/emulated_times.py NOTES.json serve MODEL --emulate HARDWARE ...

When the program ends it writes seconds: of each decision where a prompt or a state goes (`own`: of the processor alone, without
what other programs took meanwhile), of each round over all that waits, and how late the event loop came back to a timer; and
pairs of the monotonic clock and the server's processor time.
"""

from __future__ import annotations

import asyncio
import atexit
import json
import sys
from array import array
from collections.abc import Callable
from pathlib import Path
from time import perf_counter, process_time, thread_time
from typing import Any

from tandem.serve.pools import Pools
from tandem.serve.traffic import Traffic

LAG_S = 0.01


def note_decisions() -> dict[str, array[float]]:
    """From now on, the routers of this process add to the lists that are returned."""
    notes = {name: array("d") for name in ("prompt", "state", "own", "round", "lag", "cpu")}

    def timed(name: str, key: str) -> Callable[..., Any]:
        plain, seconds = getattr(Traffic, name), notes[key]

        def noted(self: Traffic, *arguments: Any) -> Any:
            begin, own = perf_counter(), thread_time()
            result = plain(self, *arguments)
            if result is not False:
                seconds.append(perf_counter() - begin)
                if key != "round":
                    notes["own"].append(thread_time() - own)
            return result

        return noted

    for name, key in (("_send_prompt", "prompt"), ("_send_state", "state"), ("dispatch", "round")):
        setattr(Traffic, name, timed(name, key))
    start = Pools.start

    async def watched(self: Pools) -> None:
        await start(self)
        notes["watch"] = asyncio.ensure_future(watch())  # type: ignore[assignment]

    async def watch() -> None:
        while True:
            due = perf_counter() + LAG_S
            await asyncio.sleep(LAG_S)
            notes["lag"].append(perf_counter() - due)
            if len(notes["lag"]) % 100 == 0:
                notes["cpu"].extend((perf_counter(), process_time()))

    Pools.start = watched  # type: ignore[method-assign]
    return notes


def main(out: Path, words: list[str]) -> None:
    notes = note_decisions()

    def write() -> None:
        out.write_text(json.dumps({key: list(found) for key, found in notes.items() if isinstance(found, array)}))

    atexit.register(write)
    from tandem.cli.app import main as tandem

    sys.argv = ["tandem", *words]
    tandem()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
