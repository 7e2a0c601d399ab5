"""Options of a serving engine as ordered pairs, and their forms in shell, YAML and Python."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable
from typing import Any

Flag = tuple[str, str | None]
"""An option and its value; None for a switch."""


def words(flags: Iterable[Flag]) -> list[str]:
    """Separate words, for an argument vector."""
    return [w for name, value in flags for w in ((name,) if value is None else (name, value))]


class Shell(str):
    """Text for the shell to expand: it is written between double quotes as it is, where any other text is quoted whole."""


def inside(text: str) -> str:
    """Any text as a part of a `Shell`: nothing in it is expanded."""
    return re.sub(r'([\\"$`])', r"\\\1", text)


def shell(flags: Iterable[Flag], indent: str = "    ") -> str:
    """One option a line, joined by backslashes."""
    lines = [_word(name) if value is None else f"{_word(name)} {_word(value)}" for name, value in flags]
    return " \\\n".join(indent + line for line in lines)


def _word(text: str) -> str:
    return f'"{text}"' if isinstance(text, Shell) else shlex.quote(text)


def fields(flags: Iterable[Flag]) -> dict[str, Any]:
    """Options as fields of the engine's configuration: underscores, numbers, booleans, objects."""
    found: dict[str, Any] = {}
    for name, value in flags:
        key = name.removeprefix("--").replace("-", "_")
        if value is None:
            negated = key.startswith("no_")
            found[key.removeprefix("no_")] = not negated
        else:
            found[key] = _value(value)
    return found


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
