"""A request inside an engine, what a step brings, and which requests an engine refuses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tandem.engine.choose import Chooser
from tandem.engine.handoff import Handoff, StateSink
from tandem.engine.text import TextStream
from tandem.engine.types import EngineRequest, TokenOutput
from tandem.engine.vocabulary import Vocabulary
from tandem.model.state import SequenceState
from tandem.model.tokenizer import Tokenizer
from tandem.sched.request import Request
from tandem.spec.errors import SpecError


@dataclass(slots=True, eq=False)
class LiveSequence:
    """A request inside the engine."""

    request: EngineRequest
    life: Request
    tokens: list[int]
    """Prompt and output."""
    chooser: Chooser
    text: TextStream | None
    hand_off: bool
    sink: StateSink | None
    hashes: tuple[int, ...] = ()
    known_cells: int = 0
    """Of the prompt, in the prefix cache when the prefill began."""
    slot: int | None = None
    state: SequenceState | None = None
    """While it is prefilled, or has come and waits for room."""
    arrived: Handoff | None = None

    @classmethod
    def of(
        cls,
        request: EngineRequest,
        life: Request,
        vocabulary: Vocabulary,
        *,
        hand_off: bool = False,
        sink: StateSink | None = None,
    ) -> LiveSequence:
        """A request as it stands after its `output_ids`."""
        text = vocabulary.text_stream(request.sampling)
        if text is not None:
            for token in request.output_ids:
                text.push(token)
        return cls(
            request=request,
            life=life,
            tokens=[*request.prompt_ids, *request.output_ids],
            chooser=Chooser(request, vocabulary),
            text=text,
            hand_off=hand_off,
            sink=sink,
        )


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one step brought."""

    outputs: list[TokenOutput]
    handoffs: list[Handoff]
    finished: list[Request]
    """Lives of the requests whose last output is among these."""


def check_request(request: EngineRequest, *, vocabulary: Vocabulary, max_context: int) -> None:
    """Raise SpecError for a request that an engine can never serve."""
    prompt, sampling = request.prompt_ids, request.sampling
    if not prompt:
        raise SpecError("prompt: has no tokens; give some text")
    if len(prompt) >= max_context:
        raise SpecError(f"prompt: has {len(prompt):,} tokens; this server reads fewer than {max_context:,}")
    if len(prompt) + len(request.output_ids) >= max_context:  # it came from an engine with more room
        tokens = len(prompt) + len(request.output_ids)
        raise SpecError(
            f"prompt: with its output it has {tokens:,} tokens; this server goes on from fewer than {max_context:,}"
        )
    low, high = min(prompt), max(prompt)
    if low < 0 or high >= vocabulary.vocab_size:
        raise SpecError(f"prompt: holds token {low if low < 0 else high}; must be from 0 to {vocabulary.vocab_size - 1}")
    if len(request.output_ids) >= sampling.max_tokens:
        raise SpecError(f"output_ids: has {len(request.output_ids)} tokens; max_tokens={sampling.max_tokens} are done")
    if sampling.stop and vocabulary.tokenizer is None:
        raise SpecError(f"stop={list(sampling.stop)!r}: this engine has no tokenizer; use stop_token_ids")
    vocabulary.check(sampling)


def ids_of(prompt: str | Sequence[int], tokenizer: Tokenizer | None) -> tuple[int, ...]:
    """Token ids of a prompt that may be a text."""
    if not isinstance(prompt, str):
        return tuple(prompt)
    if tokenizer is None:
        raise SpecError("prompt is a text: this engine has no tokenizer; give token ids")
    return tuple(tokenizer.encode(prompt))
