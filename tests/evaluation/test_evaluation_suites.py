from __future__ import annotations

import json
from pathlib import Path

import pytest
from evaluated import ScriptedWriter, save_base, save_chat, subject_of, written

from tandem.align.chat import answer_text, render
from tandem.align.data.constraints import stages
from tandem.align.data.draws import HELD_OUT
from tandem.align.data.instructions import constraints_of, instruction_asks
from tandem.align.data.tools import tool_samples
from tandem.evaluation import asks
from tandem.evaluation.needles import check_lengths, default_lengths, needles
from tandem.evaluation.reasoning import judged, problem_id, reasoning
from tandem.evaluation.score import score
from tandem.evaluation.settings import EvaluationSettings
from tandem.evaluation.writer import NOT_ASKED, Written
from tandem.spec.errors import SpecError
from tandem.train.data.procedural import EVALUATION_SEED, TASKS, evaluation_problems
from tandem.train.evaluate import task_accuracy
from tandem.train.needles import KINDS


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def chat(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chat(tmp_path_factory.mktemp("models") / "chat", base)


# --- reasoning ---

PROBLEM = evaluation_problems("chain_sum", 1)[0]
RIGHT = f"{PROBLEM.derivation}\n</think>\n{PROBLEM.answer}"


@pytest.mark.parametrize(
    ("text", "mode", "right"),
    [
        (RIGHT, "on", True),
        (PROBLEM.answer, "off", True),
        (PROBLEM.answer, "on", False),
        (RIGHT, "off", False),
        (f"{RIGHT}</think>", "on", False),
        (f"</think>{PROBLEM.answer}", "off", False),
        (f"{PROBLEM.derivation} {PROBLEM.answer}\n</think>\n", "on", False),
        (f"{RIGHT}1", "on", False),
        (f"{RIGHT} or 7", "on", False),
        ("", "on", False),
        ("", "off", False),
    ],
)
def test_right_is_the_answer_after_a_block_closed_as_it_should_be(text: str, mode: str, right: bool) -> None:
    assert judged(PROBLEM, "p", written(text), mode).right is right


@pytest.mark.parametrize("mode", ["on", "off"])
def test_what_was_not_ended_or_hides_tokens_is_wrong(mode: str) -> None:
    text = RIGHT if mode == "on" else PROBLEM.answer
    assert judged(PROBLEM, "p", written(text), mode).right
    assert not judged(PROBLEM, "p", written(text, finished=False), mode).right
    assert not judged(PROBLEM, "p", written(text, hidden=True), mode).right


def test_what_was_not_asked_is_wrong() -> None:
    assert not judged(PROBLEM, "p", NOT_ASKED, "on").right


FIRST = [problem for task in TASKS for problem in evaluation_problems(task, 3)]


def solver(prompt: str) -> Written:
    """Solves whatever problem's question stands in the prompt."""
    problem = next(p for p in FIRST if p.question in prompt)
    closed = prompt.rstrip().endswith("</think>")
    return written(problem.answer if closed else f"{problem.derivation}\n</think>\n{problem.answer}")


@pytest.mark.parametrize("kind", ["base", "chat"])
def test_a_model_that_solves_everything_is_right_in_every_task_and_mode(kind: str, base: Path, chat: Path) -> None:
    subject = subject_of(base if kind == "base" else chat, problems=3, budgets=(4,))
    ScriptedWriter(subject, solver)
    found = reasoning(subject)
    modes = ["thinking on"] if kind == "base" else ["thinking on", "thinking off"]
    assert list(found) == [*(("reasoning", mode) for mode in modes), ("budgets", "4")]
    for answers in found.values():
        assert score(answers)["accuracy"] == 1.0
        assert score(answers)["one_closing_mark"] == 1.0
        assert [answer.task for answer in answers] == [task for task in TASKS for _ in range(3)]
        assert len({answer.problem for answer in answers}) == len(answers)


def test_a_model_that_answers_the_problem_before_is_never_right(base: Path) -> None:
    subject = subject_of(base, tasks=("gcd",), problems=20)
    answers = [problem.answer for problem in evaluation_problems("gcd", 20)]
    given = iter([answers[-1], *answers[:-1]])
    ScriptedWriter(subject, lambda _: written(f"steps\n</think>\n{next(given)}"))
    (found,) = reasoning(subject).values()
    same = sum(a == b for a, b in zip(answers, [answers[-1], *answers[:-1]], strict=True))
    assert score(found)["correct"] == same < 20


def test_accuracy_of_a_base_model_is_that_of_training(base: Path) -> None:
    subject = subject_of(base, tasks=("recall",), problems=4, max_tokens=20)
    (found,) = reasoning(subject).values()
    trained = task_accuracy(subject.decoder, subject.tokenizer, "recall", evaluation_problems("recall", 4), max_tokens=20)
    assert score(found)["correct"] == trained.correct
    assert all(answer.text for answer in found)


def test_every_sample_has_a_draw_of_its_own(base: Path) -> None:
    subject = subject_of(base, tasks=("gcd",), problems=3, samples=4, temperature=1.0)
    writer = ScriptedWriter(subject, solver)
    (found,) = reasoning(subject).values()
    assert len(set(writer.seeds)) == 12
    assert [answer.sample for answer in found] == [0, 1, 2, 3] * 3
    assert score(found)["count"] == 3


def test_problems_have_the_same_name_wherever_they_are_asked() -> None:
    names = [problem_id(p) for p in evaluation_problems("gcd", 5)]
    assert names == [problem_id(p) for p in evaluation_problems("gcd", 6)][:5]
    assert len(set(names)) == 5


# --- needles ---


def test_needles_are_asked_at_every_length_and_kind(base: Path) -> None:
    subject = subject_of(base, problems=6, lengths=(440, 480))
    found = needles(subject)
    assert list(found) == [("needles", "440 tokens"), ("needles", "480 tokens")]
    for answers in found.values():
        assert [a.task for a in answers] == [kind for kind in KINDS for _ in range(2)]
        assert len({a.problem for a in answers}) == len(answers)


def test_lengths_fit_the_context() -> None:
    for context in (200, 512, 2048, 10**6):
        assert default_lengths(context)[-1] <= min(context, 4096)
    check_lengths((100,), "m", 124)
    with pytest.raises(SpecError, match="lengths=101: m has room for 100 tokens"):
        check_lengths((101,), "m", 124)


# --- instructions and tools ---


def instruction_expert(prompt: str) -> Written:
    ask = next(a for a in instruction_asks(tuple(TASKS), 12, EVALUATION_SEED) if a.messages[-1]["content"] in prompt)
    text = stages(constraints_of(ask.check), ask.check["answer"])[-1]
    return written(text if prompt.rstrip().endswith("</think>") else f"thoughts\n</think>\n\n{text}")


def test_an_expert_follows_every_instruction(chat: Path) -> None:
    subject = subject_of(chat, problems=12)
    ScriptedWriter(subject, instruction_expert)
    for answers in asks.instructions(subject).values():
        assert score(answers)["accuracy"] == 1.0
        assert {"format", "substance", "finished"} <= score(answers)["parts"].keys()
    ScriptedWriter(subject, lambda prompt: written(instruction_expert(prompt).text + " and more"))
    for answers in asks.instructions(subject).values():
        assert score(answers)["accuracy"] < 1.0


def test_an_instruction_that_is_not_ended_is_not_followed(chat: Path) -> None:
    subject = subject_of(chat, problems=12)
    ScriptedWriter(subject, lambda prompt: written(instruction_expert(prompt).text, finished=False))
    for answers in asks.instructions(subject).values():
        assert score(answers)["accuracy"] == 0.0
        assert score(answers)["parts"]["substance"] > 0.9


def test_an_instruction_whose_text_hides_tokens_is_not_followed(chat: Path) -> None:
    subject = subject_of(chat, problems=3)
    ScriptedWriter(subject, lambda prompt: written(instruction_expert(prompt).text, hidden=True))
    for answers in asks.instructions(subject).values():
        assert score(answers)["accuracy"] == score(answers)["parts"]["format"] == 0.0


class ToolExpert:
    """Takes the expert's next turn in every conversation, and keeps to it."""

    def __init__(self, count: int, thinking: bool) -> None:
        self.turns: dict[str, str] = {}
        for sample in tool_samples(count, EVALUATION_SEED, off=0.0 if thinking else 1.0):
            for at, message in enumerate(sample.messages):
                if message["role"] == "assistant":
                    prompt = render(sample.messages[:at], tools=sample.tools, enable_thinking=thinking)
                    self.turns[prompt] = answer_text(message, thinking=thinking)

    def __call__(self, prompt: str) -> Written:
        return written(self.turns[prompt])


@pytest.mark.parametrize("mode", ["on", "off"])
def test_an_expert_meets_every_request_over_several_turns(chat: Path, mode: str) -> None:
    subject = subject_of(chat, problems=12, thinking=mode)
    ScriptedWriter(subject, ToolExpert(12, mode == "on"))
    ((key, answers),) = asks.tools(subject).items()
    assert key == ("tools", f"thinking {mode}")
    assert score(answers)["accuracy"] == 1.0
    assert score(answers)["parts"] == {"first turn": 1.0, "answered": 1.0}
    assert score(answers)["one_closing_mark"] == 1.0
    json.dumps([answer.text for answer in answers])


def test_a_right_beginning_meets_no_request_of_several_turns(chat: Path) -> None:
    subject = subject_of(chat, problems=12, thinking="on")
    expert = ToolExpert(12, True)
    late = "done\n</think>\n\nSorry, I could not do it."
    ScriptedWriter(subject, lambda prompt: written(late) if "[{" in prompt.rpartition("User\n")[2] else expert(prompt))
    ((_, answers),) = asks.tools(subject).items()
    begun = [answer for answer in answers if "[tool: " in answer.text]
    assert begun
    assert all(answer.parts["first turn"] == 1.0 and not answer.right for answer in begun)


def test_words_instead_of_calls_meet_no_request(chat: Path) -> None:
    subject = subject_of(chat, problems=12, thinking="off")
    ScriptedWriter(subject, lambda _: written("I have done it."))
    ((_, answers),) = asks.tools(subject).items()
    assert score(answers)["accuracy"] == 0.0


def test_a_random_model_goes_through_every_suite_of_asks(chat: Path) -> None:
    subject = subject_of(chat, problems=2, max_tokens=8)
    found = asks.instructions(subject) | asks.tools(subject)
    assert len(found) == 4
    assert any("do not fit" in note for note in subject.notes)  # a byte a token: the tools' descriptions are too long


# --- settings ---


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"suites": ("frob",)}, "suite='frob': must be one of reasoning, instructions"),
        ({"tasks": ("chain_sums",)}, "tasks='chain_sums': not known; did you mean chain_sum"),
        ({"problems": 0}, "problems=0"),
        ({"problems": HELD_OUT + 1}, f"problems={HELD_OUT + 1}: {HELD_OUT} of each task"),
        ({"budgets": (-1,)}, "budgets=-1"),
        ({"budgets": (8, 8)}, "budgets=8,8: names one twice"),
        ({"budgets": (8,), "thinking": "off"}, "budgets: change nothing with thinking=off"),
        ({"budgets": (8,), "suites": ("needles",)}, "budgets: are for the suite reasoning"),
        ({"thinking": "maybe"}, "thinking='maybe': must be one of on, off, both"),
        ({"samples": 4}, "samples=4: at temperature 0 all would be the same"),
        ({"temperature": -1.0}, "temperature=-1"),
        ({"lengths": (0,)}, "lengths=0"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_settings_that_mean_nothing_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(SpecError) as refused:
        EvaluationSettings(**fields)
    assert message in str(refused.value)


def test_instructions_have_as_many_problems_as_their_tasks() -> None:
    fields = {"suites": ("instructions",), "problems": 2 * HELD_OUT}
    assert EvaluationSettings(tasks=("gcd", "recall"), **fields).problems == 2 * HELD_OUT
    asked = list(instruction_asks(("gcd", "recall"), 2 * HELD_OUT, EVALUATION_SEED))
    assert len(asked) == 2 * HELD_OUT
    with pytest.raises(SpecError, match=f"problems={2 * HELD_OUT}: instructions are made of {HELD_OUT} held-out .* of 1 tasks"):
        EvaluationSettings(tasks=("gcd",), **fields)
