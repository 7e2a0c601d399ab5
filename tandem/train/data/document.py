"""A document on its way to tokens, and the rows that could not become one."""

from __future__ import annotations

from dataclasses import dataclass, field

from tandem.spec.errors import SpecError

_NAMED = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """Text that a model learns from."""

    text: str
    prompt_chars: int = 0
    """Characters at the beginning that are read but not learned; 0: all of it is learned."""
    id: str
    """Where it comes from: file and line, or task and number."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BadRow:
    """A row that was skipped."""

    file: str
    line: int
    """From 1; of parquet and hub sources the row's number."""
    why: str


@dataclass(kw_only=True, slots=True)
class BadRows:
    """Counts the bad rows of one source, names the first of them and ends the run above a limit."""

    source: str
    limit: int
    count: int = 0
    first: list[BadRow] = field(default_factory=list)

    def add(self, file: str, line: int, why: str) -> None:
        """Note a row that is skipped. Raises SpecError, which names it, where it is one more than the limit."""
        self.count += 1
        if len(self.first) < _NAMED:
            self.first.append(BadRow(file=file, line=line, why=why))
        if self.count > self.limit:
            raise SpecError(
                f"data.clean.max_bad_rows={self.limit}: source {self.source!r} has more, the last in {file} line {line}: {why}"
            )
