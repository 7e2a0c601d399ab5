"""An engine in this process, for benchmarks/serve.py: how its steps compare with the raw decoder's, and what prefixes save."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from serve_times import Note

from tandem.engine.config import EngineConfig
from tandem.engine.engine import Engine
from tandem.engine.types import EngineRequest, SamplingParams
from tandem.model.hybrid import Decoder
from tandem.model.tokenizer import Tokenizer

CACHE_BYTES = 2 << 30
SHARED = 2048
"""Tokens of the prompt that requests share."""
TAIL = 32
"""Tokens of each request's own after it."""


@dataclass(frozen=True)
class Periods:
    """Seconds from one step's beginning to the next one's, and of the decode step inside, with its mean context."""

    seconds: np.ndarray
    decode_s: np.ndarray
    context: np.ndarray

    @property
    def usual(self) -> float:
        """The median period."""
        return float(np.median(self.seconds))

    @property
    def inside(self) -> float:
        """Share of the time that the decode steps themselves take."""
        return float(self.decode_s.sum() / self.seconds.sum())


@dataclass(frozen=True)
class Pairs:
    """Seconds of an engine's steps and of the decode step inside, and of the raw decoder's steps taken in turns with them."""

    context: np.ndarray
    raw_s: np.ndarray
    step_s: np.ndarray
    decode_s: np.ndarray


def periods(notes: Sequence[Note], rows: int, *, stops: Sequence[float] = ()) -> Periods:
    """Those between two decode steps of `rows` requests each with no prefill, and no moment of `stops`, between them."""
    found, last = [], None
    events: list[Note] = [*notes, *(("stop", moment, moment, 0, 0.0) for moment in stops)]
    for note in sorted(events, key=lambda n: n[1]):
        if note[0] in ("prefill", "stop") or (note[0] == "decode" and note[3] != rows):
            last = None
        elif note[0] == "decode":
            if last is not None:
                found.append((note[1] - last[1], last[2] - last[1], last[4]))
            last = note
    table = np.array(found or np.zeros((0, 3)), dtype=np.float64).reshape(-1, 3)
    return Periods(table[:, 0], table[:, 1], table[:, 2])


def line(context: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """Seconds as a straight line over context, fitted to the medians of eight stretches so that hiccups do not count."""
    order = np.argsort(context, kind="stable")
    stretches = [part for part in np.array_split(order, 8) if len(part)]
    x = np.array([np.median(context[part]) for part in stretches])
    y = np.array([np.median(seconds[part]) for part in stretches])
    return np.polyfit(x, y, 1 if len(x) > 1 else 0)


def share_of(steps: Periods, context: np.ndarray, seconds: np.ndarray) -> dict[str, float]:
    """What the steps would take by other measurements at the same contexts, as a share of what they took: of the sums, and of
    the medians step by step."""
    least = np.polyval(line(context, seconds), steps.context)
    return {"mean": float(least.sum() / steps.seconds.sum()), "median": float(np.median(least / steps.seconds))}


def prompts_of(count: int, isl: int, vocabulary: int, seed: int) -> list[tuple[int, ...]]:
    """Random prompts, all different."""
    drawn = torch.randint(3, vocabulary, (count, isl), generator=torch.Generator().manual_seed(seed))
    return [tuple(row) for row in drawn.tolist()]


def new_engine(model: Decoder, tokenizer: Tokenizer | None, *, threads: int, max_context: int) -> Engine:
    """As `tandem serve` makes it."""
    config = EngineConfig(threads=threads, cache_bytes=CACHE_BYTES, max_context=max_context)
    return Engine(model, tokenizer=tokenizer, config=config)


class PairedSteps:
    """An engine that serves prompts all at once, and `model.decode` (argmax included) over as many sequences of the same
    context; from when all decode, the two take their steps in turns."""

    @torch.no_grad()
    def __init__(self, engine: Engine, prompts: Sequence[tuple[int, ...]], osl: int, notes: list[Note]) -> None:
        self._engine, self._notes, self._rows = engine, notes, len(prompts)
        sampling = SamplingParams(max_tokens=osl, ignore_eos=True)
        for i, prompt in enumerate(prompts):
            engine.add(EngineRequest(id=str(i), prompt_ids=prompt, sampling=sampling))
        while engine.stats.waiting:
            engine.step()
        logits, self._state = engine.model.prefill(torch.tensor(prompts))
        self._state.reserve(len(prompts[0]) + osl)
        self._ids = logits[:, -1].argmax(-1)
        for _ in range(round(engine.stats.context_tokens / len(prompts)) - len(prompts[0])):
            self._raw()
        self._table: list[tuple[float, float, float, float]] = []

    def take(self, count: int) -> None:
        """So many steps of each, or fewer where requests begin to end."""
        while count and self._engine.stats.running == self._rows:
            del self._notes[:]
            start_s = time.perf_counter()
            self._engine.step()
            step_s = time.perf_counter() - start_s
            (decode,) = (note for note in self._notes if note[0] == "decode")
            self._table.append((decode[4], self._raw(), step_s, decode[2] - decode[1]))
            count -= 1

    def finish(self) -> Pairs:
        """What was measured; the engine is empty afterwards."""
        for i in range(self._rows):
            self._engine.cancel(str(i))
        return Pairs(*np.array(self._table).T)

    @torch.no_grad()
    def _raw(self) -> float:
        start_s = time.perf_counter()
        logits, self._state = self._engine.model.decode(self._ids, self._state)
        self._ids = logits.argmax(-1)
        return time.perf_counter() - start_s


def first_token_s(engine: Engine, prompt: tuple[int, ...]) -> tuple[float, int]:
    """Seconds from adding a prompt to its first token, nothing else being served, and its tokens that were cached."""
    start_s = time.perf_counter()
    engine.add(EngineRequest(id="one", prompt_ids=prompt, sampling=SamplingParams(max_tokens=1)))
    while True:
        outputs = engine.step().outputs
        if outputs:
            return time.perf_counter() - start_s, outputs[0].cached_tokens or 0


def prefix_savings(engine: Engine, vocabulary: int, rounds: int) -> dict[str, Any]:
    """TTFT of prompts whose first part is new, and of ones whose first part was served before with another ending."""
    cold, warm, cached = [], [], 0
    for number in range(rounds):
        (shared,) = prompts_of(1, SHARED, vocabulary, 100 + number)
        ends = prompts_of(4, TAIL, vocabulary, 200 + number)
        cold.append(first_token_s(engine, shared + ends[0])[0])
        for end in ends[1:]:
            seconds, cached = first_token_s(engine, shared + end)
            warm.append(seconds)
    cold_s, warm_s = statistics.median(cold), statistics.median(warm)
    return {"cold_ttft_s": cold_s, "warm_ttft_s": warm_s, "cached_tokens": cached, "ratio": cold_s / warm_s}
