"""Instructions whose form is verified, and requests to a simulated workplace that are met by calling tools."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tandem.align.answers import read_answer
from tandem.align.data.episodes import Episode, run_episodes, verify_episode
from tandem.align.data.instructions import constraints_of, instruction_asks
from tandem.align.data.tools import tool_asks, verify_tools
from tandem.align.sample import Answer, Ask
from tandem.align.verify import parts, verify
from tandem.evaluation.form import Prompt
from tandem.evaluation.reasoning import of_writing
from tandem.evaluation.score import Answered, Records
from tandem.evaluation.subject import Subject
from tandem.evaluation.writer import Written
from tandem.train.data.procedural import EVALUATION_SEED


def instructions(subject: Subject) -> Records:
    """Questions with one to three demands on the form: right is what is right, in the form, ended.

    A score's `parts` are the shares of answers that are finished, in form and right in substance, and those of each constraint.
    """
    settings = subject.settings
    found: Records = {}
    for mode in subject.form.wanted(settings.thinking):
        asks = list(
            instruction_asks(
                settings.reasoning_tasks, settings.problems, EVALUATION_SEED + settings.seed, thinking=mode == "on"
            )
        )
        prompts = [subject.form.conversation(ask.messages, ask.tools, mode) for ask in asks]
        written = subject.write(f"instructions, thinking {mode}", prompts, [ask.id for ask in asks])
        answered = [
            instructed(ask, prompt, answer, mode, k)
            for ask, prompt, answers in zip(asks, prompts, written, strict=True)
            for k, answer in enumerate(answers)
        ]
        found["instructions", f"thinking {mode}"] = sorted(answered, key=lambda answer: answer.task)
    return found


def instructed(ask: Ask, prompt: Prompt, written: Written, mode: str, sample: int = 0) -> Answered:
    """One answer to an instruction, judged; its task is how many constraints it had."""
    answer = read(written, prompt)
    demands = len(constraints_of(ask.check))
    return Answered(
        problem=ask.id,
        task=f"{demands} constraint{'s'[: demands != 1]}",
        question=_question(ask),
        expected=str(ask.check["answer"]),
        worth=verify(ask, answer) if written.fits else 0.0,
        parts=parts(ask, answer),
        sample=sample,
        **of_writing(written, mode),
    )


def tools(subject: Subject) -> Records:
    """Whole conversations with the workplace: right where the request was met and nothing else was changed or claimed.

    `parts` has the share of first turns that are exactly right, and of conversations that the model ended.
    """
    settings = subject.settings
    found: Records = {}
    for mode in subject.form.wanted(settings.thinking):
        asks = tool_asks(settings.problems, EVALUATION_SEED + settings.seed, thinking=mode == "on")
        answered: list[Answered] = []
        for k in range(settings.samples):
            turns = _Turns(subject, mode, k)
            episodes = run_episodes(asks, turns)
            answered += [told(episode, turns.written[episode.ask.id], mode, k) for episode in episodes]
        found["tools", f"thinking {mode}"] = sorted(answered, key=lambda answer: answer.task)
    return found


class _Turns:
    """The next turns of conversations, by the subject's engine; keeps what was written for each ask."""

    def __init__(self, subject: Subject, mode: str, sample: int) -> None:
        self._subject, self._mode, self._sample = subject, mode, sample
        self.written: dict[str, list[Written]] = {}

    def __call__(self, asks: Sequence[Ask]) -> list[Answer]:
        round_ = 1 + max((len(self.written.get(ask.id, ())) for ask in asks), default=0)
        prompts = [self._subject.form.conversation(ask.messages, ask.tools, self._mode) for ask in asks]
        names = [f"{ask.id}:turn {len(self.written.get(ask.id, ()))}:{self._sample}" for ask in asks]
        doing = f"tools, thinking {self._mode}, turn {round_}"
        written = [answers[0] for answers in self._subject.write(doing, prompts, names, samples=1)]
        for ask, answer in zip(asks, written, strict=True):
            self.written.setdefault(ask.id, []).append(answer)
        return [read(answer, prompt) for answer, prompt in zip(written, prompts, strict=True)]


def told(episode: Episode, written: Sequence[Written], mode: str, sample: int = 0) -> Answered:
    """One conversation, judged. Tokens are those of all its turns; every turn must have closed its block once."""
    ask = episode.ask
    marks = 1 if mode == "on" else 0
    first = verify_tools(ask, episode.answers[0])
    return Answered(
        problem=ask.id,
        task=ask.task,
        question=_question(ask),
        expected=_expected(ask),
        text=_transcript(episode),
        worth=verify_episode(episode),
        sample=sample,
        one_mark=all(turn.closing_marks == marks for turn in written),
        finished=episode.ended == "answered",
        forced=False,
        thinking_tokens=sum(turn.thinking_tokens for turn in written),
        answer_tokens=sum(turn.answer_tokens for turn in written),
        parts={"first turn": first, "answered": float(episode.ended == "answered")},
    )


def read(written: Written, prompt: Prompt) -> Answer:
    """What was written, as the server reads it; malformed where the text hides tokens."""
    answer = read_answer(written.text, thinking=prompt.thinking, finished=written.finished)
    return replace(answer, malformed="holds tokens that are no text", hidden=True) if written.hidden else answer


def _question(ask: Ask) -> str:
    return "\n".join(f"{message['role']}: {message['content']}" for message in ask.messages if message.get("content"))


def _expected(ask: Ask) -> str:
    """The expert's calls turn by turn, and what its last words have to say."""
    calls = "\n".join(
        "; ".join(f"{call['name']}({', '.join(f'{k}={v!r}' for k, v in call['arguments'].items())})" for call in turn)
        for turn in ask.check["turns"]
        if turn
    )
    says = "; ".join(str(needed) for needed in ask.check["says"])
    return "\n".join(part for part in (calls, f"says: {says}" if says else "") if part)


def _transcript(episode: Episode) -> str:
    """The model's turns, and between them what the tools said."""
    responses = iter(episode.steps)
    lines = []
    for answer in episode.answers:
        lines.append(answer.text)
        lines += [f"[tool: {step.response}]" for _, step in zip(answer.calls, responses, strict=False)]
    return "\n".join(lines)
