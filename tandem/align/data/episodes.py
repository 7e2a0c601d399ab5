"""Conversations between a model and the simulated workplace, many side by side, and what they were worth in the end.

An engine batches turns, so episodes go in lock-step: every round asks for the next turn of all that are not over.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Literal

from tandem.align.data.tools import assistant_message, left_calls, same_call, says_enough, well_formed
from tandem.align.data.workplace import WRITING, Response, State, apply, response_text
from tandem.align.sample import Answer, Ask, Call, Message, Tool
from tandem.spec.errors import SpecError
from tandem.spec.units import require_int

Ended = Literal["answered", "malformed", "cut", "turns"]
"""By last words; by a turn that could not be read; by one that ran into its limit; by the number of turns."""
MOST_TURNS = 6


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """A call that was made, its response, and whether it changed anything."""

    call: Call
    response: Response
    changed: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Episode:
    """One conversation, from the ask to its end."""

    ask: Ask
    answers: tuple[Answer, ...]
    """The model's turns."""
    prompts: tuple[tuple[Message, ...], ...]
    """What each of them was an answer to."""
    steps: tuple[Step, ...]
    state: State
    """That the calls left behind."""
    ended: Ended


@dataclass(slots=True)
class _Running:
    ask: Ask
    messages: list[Message]
    state: State
    answers: list[Answer] = field(default_factory=list)
    prompts: list[tuple[Message, ...]] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    ended: Ended | None = None

    @classmethod
    def of(cls, ask: Ask) -> _Running:
        return cls(ask=ask, messages=list(ask.messages), state=_replayed(ask))

    @property
    def next_ask(self) -> Ask:
        return replace(self.ask, messages=tuple(self.messages))

    def take(self, answer: Answer) -> None:
        self.prompts.append(tuple(self.messages))
        self.answers.append(answer)
        if answer.malformed is not None or not answer.finished:
            self.ended = "malformed" if answer.finished else "cut"  # what was cut off is malformed often, by the cut
            return
        self.messages.append(assistant_message(answer.content, answer.calls, answer.reasoning))
        for call in answer.calls:
            after, response = _respond(self.ask, call, self.state)
            self.steps.append(Step(call=call, response=response, changed=after != self.state))
            self.messages.append({"role": "tool", "content": response_text(response)})
            self.state = after
        if not answer.calls:
            self.ended = "answered"

    def finish(self) -> Episode:
        return Episode(
            ask=self.ask,
            answers=tuple(self.answers),
            prompts=tuple(self.prompts),
            steps=tuple(self.steps),
            state=self.state,
            ended=self.ended or "turns",
        )


def _replayed(ask: Ask) -> State:
    """The state that the calls which an ask's messages hold already have left behind."""
    state = State.from_data(ask.check["state"])
    for message in ask.messages:
        for call in message.get("tool_calls") or ():
            state, _ = _respond(ask, Call(**call["function"]), state)
    return state


def _respond(ask: Ask, call: Call, state: State) -> tuple[State, Response]:
    """`apply` with the tools that were offered: the others are unknown."""
    offered = any(tool["name"] == call.name for tool in ask.tools)
    return apply(call, state) if offered else (state, {"error": "unknown tool"})


def run_episode(
    ask: Ask, generate: Callable[[Sequence[Message], Sequence[Tool]], Answer], max_turns: int = MOST_TURNS
) -> Episode:
    """One episode; `generate` gives the turn that follows messages, with these tools."""
    return run_episodes([ask], lambda asks: [generate(asks[0].messages, asks[0].tools)], max_turns)[0]


def run_episodes(
    asks: Sequence[Ask], generate_many: Callable[[Sequence[Ask]], Sequence[Answer]], max_turns: int = MOST_TURNS
) -> list[Episode]:
    """An episode for each ask of the kind `tools`. `generate_many` gives the next turns of conversations: asks that have grown.

    Raises SpecError where it gives more or fewer answers than it was asked for.
    """
    require_int("max_turns", max_turns)
    running = [_Running.of(ask) for ask in asks]
    for _ in range(max_turns):
        going = [episode for episode in running if episode.ended is None]
        if not going:
            break
        answers = generate_many([episode.next_ask for episode in going])
        if len(answers) != len(going):
            raise SpecError(f"answers={len(answers)}: {len(going)} turns were asked for; give one answer for each")
        for episode, answer in zip(going, answers, strict=True):
            episode.take(answer)
    return [episode.finish() for episode in running]


def verify_episode(episode: Episode) -> float:
    """1 where the request was met, else 0.

    The end state must be the one that an expert leaves, by as many changes (nothing done and undone), and no call that writes
    was made twice; what had to be called must have been called in this order; every turn must have the form, and the last words
    must say enough. Other calls that only read, or that failed and were corrected, are no harm.
    """
    ask = episode.ask
    if episode.ended != "answered" or not all(well_formed(ask, answer) for answer in episode.answers):
        return 0.0
    due = [call for turn in left_calls(ask) for call in turn]
    state, changes = _replayed(ask), 0
    for call in due:
        after, _ = _respond(ask, call, state)
        changes += after != state
        state = after
    made = iter(step.call for step in episode.steps)
    in_order = all(any(same_call(wanted, call) for call in made) for wanted in due)
    same = episode.state == state and sum(step.changed for step in episode.steps) == changes
    writes = [step.call for step in episode.steps if step.call.name in WRITING]
    once = not any(same_call(one, other) for one, other in combinations(writes, 2))
    return float(in_order and same and once and says_enough(ask, episode.answers[-1].content))
