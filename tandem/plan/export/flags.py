"""Options of a serving engine as ordered pairs, and their forms in shell, YAML and Python."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable
from typing import Any

Flag = tuple[str, str | None]
"""An option and its value; None for a switch."""


def words(flags: Iterable[Flag]) -> list[str]:
    """Separate words, for an argument vector."""
    return [w for name, value in flags for w in ((name,) if value is None else (name, value))]


def shell(flags: Iterable[Flag], indent: str = "    ") -> str:
    """One option a line, joined by backslashes; values that start with `$` or `"$` stay for the shell to fill in."""
    lines = [name if value is None else f"{name} {_quoted(value)}" for name, value in flags]
    return " \\\n".join(indent + line for line in lines)


def _quoted(value: str) -> str:
    return f'"{value}"' if value.startswith("$") else shlex.quote(value)


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
