"""From a recipe's sources to a folder of tokens: read, clean, drop, hold out, train the tokenizer, encode.

folder/tokenizer/             tokenizer.json, tokenizer_config.json
folder/sources/<name>/        shards
folder/report.json            what became of every row
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tandem.model.tokenizer import Tokenizer, copy_tokenizer, load_tokenizer
from tandem.spec.catalog import find_weights
from tandem.spec.errors import SpecError
from tandem.train.data.bpe import save_tokenizer, train_bpe
from tandem.train.data.clean import clean_document
from tandem.train.data.decontaminate import EvaluationSets
from tandem.train.data.dedup import ExactDuplicates, NearDuplicates
from tandem.train.data.document import BadRows, Document
from tandem.train.data.prepared import REPORT, DataReport, SourceReport, evaluated_tasks, fingerprint, generated, read_report
from tandem.train.data.procedural import OPEN, evaluation_problems
from tandem.train.data.quality import BUCKETS, quality_bucket, quality_score
from tandem.train.data.rows import read_rows
from tandem.train.data.shards import PARTS, read_shard, write_shard
from tandem.train.data.stream import source_folder
from tandem.train.data.work_folder import remove_dead, work_folder
from tandem.train.recipe import CleanPart, Recipe, SourceKind, SourcePart

TOKENIZER_FOLDER = "tokenizer"
Progress = Callable[[str, str, int], None]
"""Called with stage ("read" or "encode"), source and documents so far."""
_EVERY = 1000


def prepare(recipe: Recipe, folder: Path, *, recipe_folder: Path, progress: Progress | None = None) -> DataReport:
    """Make `folder` hold the recipe's data, or find that it does.

    The folder appears whole or not at all; what killed processes left beside it is removed. One that was made with the same
    settings and files is taken as it is; with others it is refused. Paths of the recipe start from `recipe_folder`. Raises
    SpecError for anything that cannot be.
    """
    for name in recipe.data.sources:
        source_folder(folder, name)
    mark = fingerprint(recipe, recipe_folder)
    remove_dead(folder)
    if folder.exists():
        return _existing(folder, mark)
    with work_folder(folder) as work:
        report = _make(recipe, work, recipe_folder, mark, progress or _silent)
        try:
            work.rename(folder)
        except OSError:  # Another process was first.
            return _existing(folder, mark)
        return report


def _existing(folder: Path, mark: str) -> DataReport:
    report = read_report(folder)
    if report.fingerprint != mark:
        raise SpecError(
            f"data={str(folder)!r}: holds data of other settings or files ({report.fingerprint[:12]}, not {mark[:12]}); "
            "remove it or name another folder"
        )
    return report


def _silent(stage: str, source: str, documents: int) -> None:
    pass


@dataclass(frozen=True, slots=True)
class _Kept:
    """A source after cleaning; its documents lie in `file`, a line each."""

    report: SourceReport
    file: Path
    held_out: NDArray[np.bool_]


def _make(recipe: Recipe, work: Path, recipe_folder: Path, mark: str, progress: Progress) -> DataReport:
    data = recipe.data
    rules = _Rules(recipe, recipe_folder)
    kept: dict[str, _Kept] = {}
    for name, source in data.sources.items():
        kept[name] = _keep(name, source, data.clean, rules, recipe_folder, work, data.held_out, progress)
    tokenizer = _tokenizer(recipe, kept, work / TOKENIZER_FOLDER)
    reports = []
    for name, one in kept.items():
        shard = source_folder(work, name)
        write_shard(shard, _noted(_stored(one.file), progress, "encode", name), tokenizer, one.held_out)
        one.file.unlink()
        train, held_out = (read_shard(shard, part).documents for part in PARTS)
        tokens, prompt = int(train[:, 1].sum()), int(train[:, 2].sum())
        reports.append(replace(one.report, tokens=tokens, prompt_tokens=prompt, held_out_tokens=int(held_out[:, 1].sum())))
    report = DataReport(fingerprint=mark, vocab_size=tokenizer.backend.get_vocab_size(), sources=tuple(reports))
    (work / REPORT).write_text(json.dumps(report.to_json(), indent=2) + "\n", encoding="utf-8")
    return report


class _Rules:
    """Why a document is dropped. Duplicates are looked for across all sources, in their order."""

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        clean = recipe.data.clean
        self._clean = clean
        self._exact = ExactDuplicates() if clean.exact_duplicates else None
        self._near = None if clean.near_duplicates is None else NearDuplicates(clean.near_duplicates)
        self._sets = EvaluationSets(clean.decontaminate_ngram)
        for path in clean.decontaminate:
            self._sets.add_file(path, folder)
        problems = recipe.evaluate.problems
        self._questions = {p.question for task in evaluated_tasks(recipe) for p in evaluation_problems(task, problems)}

    def broken(self, document: Document, kind: SourceKind) -> str | None:
        """The name of the first rule that a document breaks, or None."""
        text, made = document.text, generated(kind)
        if len(text) < self._clean.min_chars or len(text) <= document.prompt_chars:
            return "short"
        if not made and self._clean.min_quality > 0 and quality_score(text) < self._clean.min_quality:
            return "quality"
        if made and text.partition(f"\n{OPEN}\n")[0] in self._questions:
            return "evaluation-question"
        if self._exact is not None and self._exact.seen(text):
            return "exact-duplicate"
        found = self._sets.found(_prose(document) if kind == "long-documents" else text)
        if found is not None:
            return f"evaluation-set:{found}"
        if not made and self._near is not None and self._near.seen(text):
            return "near-duplicate"
        return None


def _prose(document: Document) -> str:
    from tandem.train.long import prose_of  # imports torch

    return prose_of(document)


def _keep(
    name: str,
    source: SourcePart,
    clean: CleanPart,
    rules: _Rules,
    recipe_folder: Path,
    work: Path,
    share: float,
    progress: Progress,
) -> _Kept:
    bad = BadRows(source=name, limit=clean.max_bad_rows)
    made = generated(source.kind)
    read = documents = chars = 0
    dropped: Counter[str] = Counter()
    buckets: Counter[str] = Counter()
    file = work / f"{len(list(work.iterdir()))}.jsonl"
    with file.open("w", encoding="utf-8") as stream:
        for document in _noted(read_rows(name, source, recipe_folder, bad), progress, "read", name):
            read += 1
            document = document if made else clean_document(document)
            broken = rules.broken(document, source.kind)
            if broken is not None:
                dropped[broken] += 1
                continue
            if not made:
                buckets[quality_bucket(quality_score(document.text))] += 1
            stream.write(json.dumps([document.text, document.prompt_chars, document.id]) + "\n")
            documents, chars = documents + 1, chars + len(document.text)
    held_out = _held_out(name, documents, share)
    report = SourceReport(
        name=name,
        kind=source.kind,
        licence=source.licence,
        notice=source.notice,
        read=read,
        bad_rows=bad.count,
        first_bad_rows=tuple(bad.first),
        dropped=dict(sorted(dropped.items())),
        documents=documents,
        held_out_documents=int(held_out.sum()),
        chars=chars,
        tokens=0,
        prompt_tokens=0,
        held_out_tokens=0,
        quality={} if made else {bucket: buckets[bucket] for bucket in BUCKETS},
    )
    return _Kept(report=report, file=file, held_out=held_out)


def _held_out(name: str, documents: int, share: float) -> NDArray[np.bool_]:
    """Which documents are held out: the share of them, at least one of several, drawn by the source's name."""
    if not 0 <= share < 1:
        raise SpecError(f"data.held_out={share}: must be at least 0 and below 1")
    count = round(documents * share)
    if share and documents > 1:
        count = min(max(count, 1), documents - 1)
    chosen = np.zeros(documents, dtype=np.bool_)
    chosen[_draws(name).permutation(documents)[:count]] = True
    return chosen


def _draws(name: str) -> np.random.Generator:
    return np.random.default_rng(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big"))


def _tokenizer(recipe: Recipe, kept: dict[str, _Kept], folder: Path) -> Tokenizer:
    settings = recipe.data.tokenizer
    if settings.name is not None:
        folder.mkdir()
        copy_tokenizer(find_weights(settings.name), folder)
    else:
        save_tokenizer(train_bpe(_sample(kept, settings.sample_bytes), settings.vocab_size), folder)
    return load_tokenizer(folder)


def _sample(kept: dict[str, _Kept], sample_bytes: int) -> Iterator[str]:
    """Training documents of all sources, each with the same chance, about `sample_bytes` in all."""
    share = min(1.0, sample_bytes / max(1, sum(source.file.stat().st_size for source in kept.values())))
    for name, source in kept.items():
        chances = _draws(f"tokenizer:{name}").random(len(source.held_out))
        for document, chance, held_out in zip(_stored(source.file), chances, source.held_out, strict=True):
            if chance < share and not held_out:
                yield document.text


def _stored(file: Path) -> Iterator[Document]:
    with file.open(encoding="utf-8") as stream:
        for line in stream:
            text, prompt_chars, name = json.loads(line)
            yield Document(text=text, prompt_chars=prompt_chars, id=name)


def _noted(documents: Iterable[Document], progress: Progress, stage: str, source: str) -> Iterator[Document]:
    count = 0
    for count, document in enumerate(documents, start=1):
        yield document
        if count % _EVERY == 0:
            progress(stage, source, count)
    progress(stage, source, count)
