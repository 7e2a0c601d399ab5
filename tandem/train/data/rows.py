"""Sources as streams of documents: JSONL, parquet, plain text, data sets of the Hugging Face hub, generated tasks.

Whatever the kind, a row that cannot be read is counted and named in `BadRows` and skipped; it is never silent. A file that
cannot be read at all is a SpecError.
"""

from __future__ import annotations

import gzip
import importlib
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from tandem.spec.errors import SpecError
from tandem.train.data.document import BadRows, Document
from tandem.train.data.procedural import read_problems
from tandem.train.data.template import Template
from tandem.train.recipe import SourcePart

_BLOCK = 4096

Reader = Callable[[str, SourcePart, Path, BadRows], Iterator[Document]]


def read_rows(name: str, source: SourcePart, folder: Path, bad: BadRows | None = None) -> Iterator[Document]:
    """The documents of a source, one at a time and in a fixed order.

    Relative paths start from `folder`. `bad` takes the rows that cannot be read; without it the first one ends the reading.
    Raises SpecError for a source that is not there or more bad rows than `bad` allows.
    """
    reader = READERS.get(source.kind)
    if reader is None:
        raise SpecError(f"data.sources.{name}.kind={source.kind!r}: must be one of {', '.join(READERS)}")
    bad = BadRows(source=name, limit=0) if bad is None else bad
    return islice(reader(name, source, folder, bad), source.documents)


def find_files(field: str, path: str | None, folder: Path) -> list[Path]:
    """Files that a path or glob of a recipe names, sorted. Raises SpecError where there is none."""
    if not path:
        raise SpecError(f"{field}: is missing; give a file or a glob such as data/*.jsonl.gz")
    whole = Path(path).expanduser()
    whole = whole if whole.is_absolute() else folder / whole
    if whole.is_file():
        return [whole]
    anchor = Path(whole.anchor)
    found = sorted(file for file in anchor.glob(str(whole.relative_to(anchor))) if file.is_file())
    if not found:
        raise SpecError(f"{field}={path!r}: no such file; paths start from the recipe's folder, {str(folder)!r}")
    return found


def read_lines(file: Path) -> Iterator[tuple[int, bytes]]:
    """Lines of a plain or gzipped file with their numbers from 1, as bytes. Raises SpecError where it cannot be read."""
    try:
        with gzip.open(file, "rb") if file.suffix == ".gz" else file.open("rb") as stream:
            yield from enumerate(stream, start=1)
    except (OSError, EOFError, zlib.error) as wrong:
        raise SpecError(f"{file}: cannot be read ({' '.join(str(wrong).split())})") from None


def _read_jsonl(name: str, source: SourcePart, folder: Path, bad: BadRows) -> Iterator[Document]:
    for file in find_files(f"data.sources.{name}.path", source.path, folder):
        yield from _documents(name, source, file.name, _json_rows(file, bad), bad)


def _json_rows(file: Path, bad: BadRows) -> Iterator[tuple[int, Mapping[str, object]]]:
    for line, content in read_lines(file):
        try:
            row = json.loads(content)
        except UnicodeDecodeError:
            bad.add(file.name, line, "not UTF-8")
        except (ValueError, RecursionError):
            bad.add(file.name, line, "not JSON" if content.strip() else "an empty line")
        else:
            if isinstance(row, dict):
                yield line, row
            else:
                bad.add(file.name, line, f"{type(row).__name__}, not an object")


def _read_parquet(name: str, source: SourcePart, folder: Path, bad: BadRows) -> Iterator[Document]:
    parquet = _library("pyarrow.parquet", f"data.sources.{name}.kind")
    columns = [*dict.fromkeys(column for template in _templates(name, source) for column in template.columns)]
    for file in find_files(f"data.sources.{name}.path", source.path, folder):
        try:
            with parquet.ParquetFile(file) as table:
                there = table.schema_arrow.names
                missing = [column for column in columns if column not in there]
                if missing:
                    raise SpecError(f"data.sources.{name}.text: {file.name} has no column {missing[0]!r}; {', '.join(there)}")
                batches = table.iter_batches(columns=columns, batch_size=1024)
                rows = (row for batch in batches for row in batch.to_pylist())
                yield from _documents(name, source, file.name, enumerate(rows, start=1), bad)
        except OSError as wrong:  # pyarrow's own errors are OSError or ValueError; a bad row's ValueError never comes here.
            raise SpecError(f"{file}: cannot be read ({' '.join(str(wrong).split())})") from None
        except ValueError as wrong:
            if isinstance(wrong, SpecError):
                raise
            raise SpecError(f"{file}: cannot be read ({' '.join(str(wrong).split())})") from None


def _read_text(name: str, source: SourcePart, folder: Path, bad: BadRows) -> Iterator[Document]:
    """Blocks between blank lines, joined up to 4,096 characters a document; longer ones are cut at a line or a word."""
    for file in find_files(f"data.sources.{name}.path", source.path, folder):
        held: list[str] = []
        size = start = 0
        for line, block in _blocks(file, bad):
            if held and size + len(block) + 2 > _BLOCK:
                yield from _pieces(file.name, start, "\n\n".join(held))
                held, size = [], 0
            start = start if held else line
            held.append(block)
            size += len(block) + 2
        if held:
            yield from _pieces(file.name, start, "\n\n".join(held))


def _blocks(file: Path, bad: BadRows) -> Iterator[tuple[int, str]]:
    lines: list[str] = []
    start = 0
    for number, content in read_lines(file):
        try:
            line = content.decode("utf-8").rstrip()
        except UnicodeDecodeError:
            bad.add(file.name, number, "not UTF-8")
            continue
        if line:
            start = start if lines else number
            lines.append(line)
        elif lines:
            yield start, "\n".join(lines)
            lines = []
    if lines:
        yield start, "\n".join(lines)


def _pieces(file: str, line: int, text: str) -> Iterator[Document]:
    part = 0
    while text:
        end = len(text)
        if end > _BLOCK:
            end = next((at + 1 for at in (text.rfind(mark, _BLOCK // 2, _BLOCK) for mark in ("\n", " ")) if at >= 0), _BLOCK)
        yield Document(text=text[:end].strip(), id=f"{file}:{line}" + (f"+{part}" if part else ""))
        text, part = text[end:].lstrip(), part + 1


def _read_hub(name: str, source: SourcePart, folder: Path, bad: BadRows) -> Iterator[Document]:
    if not source.path:
        raise SpecError(f"data.sources.{name}.path: is missing; give the data set's name or a folder")
    datasets = _library("datasets", f"data.sources.{name}.kind")
    local = folder / Path(source.path).expanduser()
    target = str(local) if local.is_dir() else source.path
    try:
        rows: Iterable[Any] = datasets.load_dataset(target, source.config, split=source.split, streaming=True)
        yield from _documents(name, source, source.path, _counted(rows), bad)
    except SpecError:
        raise
    except Exception as wrong:  # Networks, names, formats: the library and what it builds on raise whatever they like.
        reason = " ".join(str(wrong).split())[:200]
        raise SpecError(
            f"data.sources.{name}.path={source.path!r}: cannot be read ({reason}); name a data set or a folder"
        ) from None


def _counted(rows: Iterable[Any]) -> Iterator[tuple[int, Mapping[str, object]]]:
    yield from enumerate(rows, start=1)


def _read_procedural(name: str, source: SourcePart, folder: Path, bad: BadRows) -> Iterator[Document]:
    if not source.tasks:
        raise SpecError(f"data.sources.{name}.tasks: is missing; name one at least")
    if source.documents is None:
        raise SpecError(f"data.sources.{name}.documents: is missing; say how many are generated")
    return read_problems(source.tasks, source.seed)


def _read_long(name: str, source: SourcePart, folder: Path, bad: BadRows) -> Iterator[Document]:
    module = _library("tandem.train.long", f"data.sources.{name}.kind")
    documents: Iterator[Document] = module.read_long_documents(name, source, folder, bad)
    return documents


READERS: dict[str, Reader] = {
    "jsonl": _read_jsonl,
    "parquet": _read_parquet,
    "text": _read_text,
    "hub": _read_hub,
    "procedural": _read_procedural,
    "long-documents": _read_long,
}
"""What reads a source, by its kind."""


def _templates(name: str, source: SourcePart) -> tuple[Template, ...]:
    text = Template(f"data.sources.{name}.text", source.text)
    if source.prompt is None:
        return (text,)
    prompt = Template(f"data.sources.{name}.prompt", source.prompt)
    if not source.text.startswith(source.prompt):
        raise SpecError(f"data.sources.{name}.prompt={source.prompt!r}: must be the beginning of text, {source.text!r}")
    return text, prompt


def _documents(
    name: str, source: SourcePart, file: str, rows: Iterable[tuple[int, Mapping[str, object]]], bad: BadRows
) -> Iterator[Document]:
    templates = _templates(name, source)
    for line, row in rows:
        try:
            text, *prompt = (template.render(row) for template in templates)
            text.encode()
        except UnicodeEncodeError:
            bad.add(file, line, "half of a surrogate pair")
        except ValueError as wrong:
            bad.add(file, line, str(wrong))
        else:
            if text.strip():
                yield Document(text=text, prompt_chars=len(prompt[0]) if prompt else 0, id=f"{file}:{line}")
            else:
                bad.add(file, line, "empty text")


def _library(module: str, field: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise SpecError(f"{field}: needs the module {module}; pip install 'tandem-lm[train]'") from None
