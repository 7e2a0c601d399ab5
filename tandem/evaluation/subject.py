"""A model under evaluation: its decoder, tokenizer, how it is asked, and the engine that lets it answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

from tandem.engine.types import SamplingParams
from tandem.evaluation.form import Form, Prompt
from tandem.evaluation.settings import EvaluationSettings
from tandem.evaluation.writer import Writer, Written, draw_seed
from tandem.model.hybrid import Decoder
from tandem.model.tokenizer import Tokenizer

Listen = Callable[[dict[str, Any]], None]


class Subject:
    """One model, and the settings it is asked with."""

    def __init__(
        self, name: str, decoder: Decoder, tokenizer: Tokenizer, settings: EvaluationSettings, listen: Listen = lambda _: None
    ) -> None:
        self.name, self.decoder, self.tokenizer, self.settings = name, decoder, tokenizer, settings
        self.form = Form(name, tokenizer)
        self.notes: list[str] = []
        """What a reader has to know of this model's numbers, one sentence each."""
        self._listen = listen

    @cached_property
    def writer(self) -> Writer:
        """The model in an engine."""
        return Writer(self.decoder, self.tokenizer, batch=self.settings.batch)

    def tell(self, doing: str, done: int, total: int) -> None:
        """Report progress: how many of how many, of what."""
        self._listen({"kind": "progress", "model": self.name, "doing": doing, "done": done, "total": total})

    def write(
        self,
        doing: str,
        prompts: Sequence[Prompt],
        problems: Sequence[str],
        *,
        budget: int | None = None,
        samples: int | None = None,
    ) -> list[list[Written]]:
        """`samples` answers to each prompt, by default the settings'. Draws follow from the names in `problems`."""
        settings = self.settings
        sampling = SamplingParams(
            max_tokens=settings.max_tokens, temperature=settings.temperature, thinking_budget=budget, seed=settings.seed
        )
        many = settings.samples if samples is None else samples
        seeds = [draw_seed(settings.seed, problem, k) for problem in problems for k in range(many)]
        asked = [prompt for prompt in prompts for _ in range(many)]
        flat = self.writer.write(asked, sampling, seeds=seeds, tick=lambda done, total: self.tell(doing, done, total))
        lost = sum(not written.fits for written in flat)
        if lost:
            self.notes.append(f"{doing}: {lost} prompts do not fit {self.writer.max_context:,} tokens and count as wrong")
        return [flat[i : i + many] for i in range(0, len(flat), many)]
