"""Rows to text: templates such as "{question}\\n<think>\\n{answer:steps}\\n</think>\\n{answer:result}"."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from string import Formatter

from tandem.spec.errors import SpecError

_CALCULATOR = re.compile(r"<<[^<>]*>>")
_RESULT = "####"


def _steps(text: str) -> str:
    return _CALCULATOR.sub("", text.rpartition(_RESULT)[0] if _RESULT in text else text).strip()


def _result(text: str) -> str:
    if _RESULT not in text:
        raise ValueError(f"holds no {_RESULT}")
    return text.rpartition(_RESULT)[2].strip()


_FILTERS: dict[str, Callable[[str], str]] = {"": str, "steps": _steps, "result": _result}


class Template:
    """Text with columns of a row in it.

    `{column}` is the column as it is. `{column:steps}` and `{column:result}` are the two parts of a worked answer as GSM8K
    writes it: the lines before `####` without its `<<calculator>>` marks, and what stands behind. Braces are doubled.
    Raises SpecError where the template itself is wrong.
    """

    def __init__(self, field: str, text: str) -> None:
        self.text = text
        self._parts: list[tuple[str, str | None, str]] = []
        try:
            parsed = list(Formatter().parse(text))
        except ValueError as wrong:
            raise SpecError(f"{field}={text!r}: {wrong}; write columns as {{name}}, braces themselves doubled") from None
        for before, name, spec, conversion in parsed:
            if name is not None and (not name.isidentifier() or conversion or (spec or "") not in _FILTERS):
                known = ", ".join(f for f in _FILTERS if f)
                raise SpecError(f"{field}={text!r}: {{{name}}} must be a column's name, with :{known} at most") from None
            self._parts.append((before, name, spec or ""))

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns that it reads, each once."""
        return tuple(dict.fromkeys(name for _, name, _ in self._parts if name is not None))

    def render(self, row: Mapping[str, object]) -> str:
        """The text of a row. Raises ValueError, which says why, where a column is missing or holds neither text nor number."""
        pieces = []
        for before, name, spec in self._parts:
            pieces.append(before)
            if name is None:
                continue
            if name not in row:
                raise ValueError(f"no column {name!r}")
            value = row[name]
            if isinstance(value, bool) or not isinstance(value, (str, int, float)):
                raise ValueError(f"column {name!r} is {type(value).__name__}, not text")
            try:
                pieces.append(_FILTERS[spec](str(value)))
            except ValueError as wrong:
                raise ValueError(f"column {name!r} {wrong}") from None
        return "".join(pieces)
