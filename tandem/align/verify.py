"""What an answer is worth: 1 where it is finished, in form and right, else 0.

Only a whole answer counts: nothing is searched for in it, so neither a list of all possible answers nor one among other words
is right. `parts` says separately what is 0 and what is 1, for reports; nothing is rewarded for a part.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from tandem.align.data.constraints import peeled, rewritten
from tandem.align.data.instructions import COPY, constraints_of
from tandem.align.data.reasoning import problem_of
from tandem.align.sample import Answer, Ask
from tandem.spec.errors import SpecError
from tandem.train.data import procedural

_NUMBER = re.compile(r"[+-]?(?:\d+|\d{1,3}(?:,\d{3})+)(?:\.\d*)?", re.ASCII)
KINDS = ("reasoning", "instructions", "tools")
"""Kinds of asks whose answers are verified."""


def verify(ask: Ask, answer: Answer) -> float:
    """1.0 or 0.0. Raises SpecError for a kind of ask that has no verifier."""
    return float(all(part == 1.0 for part in parts(ask, answer).values()))


def parts(ask: Ask, answer: Answer) -> dict[str, float]:
    """What `verify` looks at, each from 0 to 1: finished, format, substance, and of instructions each constraint.

    The format of reasoning is one closing mark where the model was to think and none where it was not; that of instructions is
    besides the share of constraints that hold. Substance is whether the answer is right, whatever its form. Raises SpecError
    for a kind of ask that has no verifier.
    """
    match ask.kind:
        case "reasoning":
            return {
                "finished": float(answer.finished),
                "format": float(well_formed(ask, answer)),
                "substance": float(right_content(ask.check, answer.content)),
            }
        case "instructions":
            return _instruction_parts(ask, answer)
        case "tools":
            from tandem.align.data.tools import verify_tools

            return {"finished": float(answer.finished), "substance": verify_tools(ask, answer)}
        case _:
            raise SpecError(f"ask.kind={ask.kind!r}: has no verifier; {', '.join(KINDS)} have one")


def well_formed(ask: Ask, answer: Answer) -> bool:
    """Whether the thinking block is as it was asked for, nothing is malformed, and no tool is called where none is offered."""
    thought = answer.reasoning is not None
    return (
        answer.malformed is None and not answer.calls and thought == ask.thinking and answer.closing_marks == int(ask.thinking)
    )


def right_content(check: Mapping[str, Any], content: str) -> bool:
    """Whether a text is the answer and nothing else: the expected text, or of a number the same number in plain digits."""
    content, expected = content.strip(), str(check["answer"])
    if check["task"] == COPY:
        return content == expected
    if content != expected and not _NUMBER.fullmatch(content):
        return False
    return procedural.verify(check["task"], problem_of(check), f"{procedural.CLOSE}\n{content}")


def _instruction_parts(ask: Ask, answer: Answer) -> dict[str, float]:
    constraints = constraints_of(ask.check)
    text = answer.content.strip()
    holding = {f"constraint:{c.kind}": float(c.holds(text)) for c in constraints}
    core = peeled(constraints, text)
    right = right_content(ask.check, core) or core in rewritten(constraints, ask.check["answer"])
    formed = well_formed(ask, answer)
    return {
        "finished": float(answer.finished),
        "format": formed * sum(holding.values()) / len(holding),
        "substance": float(right),
        **holding,
    }
