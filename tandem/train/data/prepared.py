"""What preparing data reports, and how a folder says which settings it was made with."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tandem.model.tokenizer import load_tokenizer
from tandem.spec.errors import SpecError
from tandem.train.data.document import BadRow
from tandem.train.data.rows import find_files
from tandem.train.recipe import Recipe

REPORT = "report.json"
_FORMAT = 2
_OF_FILES = ("jsonl", "parquet", "text")
_GENERATED = ("procedural", "long-documents")


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceReport:
    """What became of one source's rows."""

    name: str
    kind: str
    licence: str
    notice: str = ""
    read: int
    """Documents that were read or generated; bad rows are not among them."""
    bad_rows: int
    first_bad_rows: tuple[BadRow, ...] = ()
    dropped: dict[str, int] = field(default_factory=dict)
    """Documents by the rule that dropped them: short, quality, exact-duplicate, near-duplicate, evaluation-question, and
    evaluation-set:FILE."""
    documents: int
    """Kept for training and evaluation together."""
    held_out_documents: int
    chars: int
    tokens: int
    """To learn from; with begin and end of text, and the tokens of prompts, which are read but not learned."""
    prompt_tokens: int
    held_out_tokens: int
    quality: dict[str, int] = field(default_factory=dict)
    """Kept documents by bucket; empty for generated sources, which are not judged."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataReport:
    """What a prepared folder holds."""

    fingerprint: str
    vocab_size: int
    sources: tuple[SourceReport, ...]

    @property
    def tokens(self) -> int:
        """Tokens to learn from, of all sources."""
        return sum(source.tokens for source in self.sources)

    def to_json(self) -> dict[str, Any]:
        """As plain JSON data; `read_report` reads it."""
        data: dict[str, Any] = json.loads(json.dumps({"format": _FORMAT, **asdict(self)}))
        return data


def read_report(folder: Path) -> DataReport:
    """The report of a prepared folder. Raises SpecError where there is none that this version reads."""
    file = folder / REPORT
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        if data.pop("format") != _FORMAT:
            raise ValueError("made by another version")
        sources = tuple(
            SourceReport(**{**source, "first_bad_rows": tuple(BadRow(**row) for row in source["first_bad_rows"])})
            for source in data.pop("sources")
        )
        return DataReport(**data, sources=sources)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as wrong:
        reason = " ".join(str(wrong).split())
        raise SpecError(f"{folder}: holds no prepared data ({reason}); remove it and prepare again") from None


def fingerprint(recipe: Recipe, recipe_folder: Path) -> str:
    """A digest of everything that decides what a prepared folder holds.

    Sources, tokenizer, cleaning, held-out share, the evaluation questions that are kept out, and the content of every file that
    is read; of a data set that is not in a folder here its name only. The blend, the batch and the run's seed are not among
    them, so runs that differ only there share a folder.
    """
    data = recipe.data
    settings = {
        "format": _FORMAT,
        "tokenizer": asdict(data.tokenizer),
        "vocabulary": None if data.tokenizer.name is None else load_tokenizer(data.tokenizer.name).backend.to_str(),
        "sources": {name: asdict(source) for name, source in data.sources.items()},
        "clean": asdict(data.clean),
        "held_out": data.held_out,
        "evaluate": dict.fromkeys(evaluated_tasks(recipe), recipe.evaluate.problems),
        "files": [(file.name, _content(file)) for file in _files(recipe, recipe_folder)],
        "versions": {name: _version(name) for name in _libraries(recipe)},
    }
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def evaluated_tasks(recipe: Recipe) -> tuple[str, ...]:
    """Tasks whose evaluation questions are kept out of training data: those that are evaluated and those that are learned."""
    learned = (task for source in recipe.data.sources.values() if source.kind == "procedural" for task in source.tasks)
    return tuple(dict.fromkeys((*recipe.evaluate.tasks, *learned)))


def generated(kind: str) -> bool:
    """Whether a source's documents are made rather than read: they are neither cleaned nor judged."""
    return kind in _GENERATED


def _files(recipe: Recipe, folder: Path) -> list[Path]:
    found: list[Path] = []
    for name, source in recipe.data.sources.items():
        if source.kind in _OF_FILES:
            found += find_files(f"data.sources.{name}.path", source.path, folder)
        elif source.kind == "hub" and source.path and (folder / Path(source.path).expanduser()).is_dir():
            found += sorted(file for file in (folder / Path(source.path).expanduser()).rglob("*") if file.is_file())
        elif source.kind == "long-documents":
            with suppress(SpecError):  # Its prose may be a data set of the hub, or one that is not there: reading tells.
                found += find_files(f"data.sources.{name}.path", source.path, folder)
    for path in recipe.data.clean.decontaminate:
        found += find_files("data.clean.decontaminate", path, folder)
    return found


def _content(file: Path) -> str:
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as wrong:
        raise SpecError(f"{file}: cannot be read ({wrong.strerror})") from None


def _libraries(recipe: Recipe) -> tuple[str, ...]:
    return ("reasoning-gym",) if any(source.kind == "procedural" for source in recipe.data.sources.values()) else ()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
