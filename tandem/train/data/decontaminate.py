"""Keeping evaluation sets out of training data: a document that shares a run of words with one is dropped."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from tandem.spec.errors import SpecError
from tandem.train.data.rows import find_files, read_lines
from tandem.train.data.words import ngrams, plain_words

_SHORTEST = 8
"""Words below which an evaluation text is too common to be looked for."""


class EvaluationSets:
    """Runs of words of evaluation sets, in memory.

    Of each text of a set all runs of `n` words count; a text that is shorter, but has at least eight words, counts as a whole.
    """

    def __init__(self, n: int) -> None:
        if n < 1:
            raise SpecError(f"data.clean.decontaminate_ngram={n}: must be at least 1")
        self._n = n
        self._runs: dict[int, dict[str, str]] = {n: {}}

    def add(self, name: str, text: str) -> bool:
        """Look for a text of the set `name` from now on. False: it is too short for that."""
        words = plain_words(text)
        if len(words) < min(_SHORTEST, self._n):
            return False
        runs = self._runs.setdefault(min(len(words), self._n), {})
        for run in ngrams(words, self._n):
            runs.setdefault(run, name)
        return True

    def add_file(self, path: str, folder: Path) -> None:
        """Every text of a JSONL file, or of several that a glob names, however deep in its rows it stands.

        Raises SpecError where a file cannot be read or holds no text that can be looked for.
        """
        for file in find_files("data.clean.decontaminate", path, folder):
            any_added = False
            for line, content in read_lines(file):
                try:
                    row = json.loads(content)
                except (ValueError, RecursionError):
                    raise SpecError(f"data.clean.decontaminate: {file} line {line}: not JSON") from None
                for text in _texts(row):
                    any_added |= self.add(file.name, text)
            if not any_added:
                raise SpecError(
                    f"data.clean.decontaminate={path!r}: {file.name} holds no text of {min(_SHORTEST, self._n)} words or more; "
                    "name a file with the questions of an evaluation"
                )

    def found(self, text: str) -> str | None:
        """The set that shares a run with a text, or None."""
        words = plain_words(text)
        for length, runs in self._runs.items():
            if runs and len(words) >= length:
                for i in range(len(words) - length + 1):
                    name = runs.get(" ".join(words[i : i + length]))
                    if name is not None:
                        return name
        return None


def _texts(row: object) -> Iterator[str]:
    """All texts of a row, in lists and objects too; the names of an object's fields are none."""
    if isinstance(row, str):
        yield row
    elif isinstance(row, dict | list):
        for value in row.values() if isinstance(row, dict) else row:
            yield from _texts(value)
