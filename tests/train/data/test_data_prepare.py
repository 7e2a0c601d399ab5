"""From files to a prepared folder: nothing is lost unaccounted, and a folder is what its settings say or refused."""

from __future__ import annotations

import gzip
import json
import pickle
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.model.tokenizer import load_tokenizer
from tandem.spec.errors import SpecError
from tandem.train.data.bpe import CONTROL, MARKS, save_tokenizer, train_bpe
from tandem.train.data.document import Document
from tandem.train.data.prepare import TOKENIZER_FOLDER, prepare
from tandem.train.data.prepared import DataReport, SourceReport, fingerprint, read_report
from tandem.train.data.procedural import evaluation_problems, make_problems
from tandem.train.data.shards import PARTS, encode_documents, read_shard, write_shard
from tandem.train.data.stream import TokenStream, source_folder
from tandem.train.data.work_folder import remove_dead, work_folder
from tandem.train.recipe import (
    BatchPart,
    CleanPart,
    DataPart,
    EvaluatePart,
    ModelPart,
    PhasePart,
    Recipe,
    SourcePart,
    TokenizerPart,
)

PROSE = (
    "Paragraph {0} says that the {0} ships of the harbour went out to sea in the morning, and that those who had stayed "
    "behind were seen with {1} baskets of fish when it was evening of day {2}."
)
LEAKED = "A farmer has twelve sheep and sells five of them to his neighbour on Monday. How many are left?"


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    rows = [{"q": f"What is {i} plus {i * 7 % 13}?", "a": f"{i} + {i * 7 % 13} = {i + i * 7 % 13}"} for i in range(50)]
    rows += [rows[3], {"q": LEAKED, "a": "7"}, {"q": "No answer here"}, {"q": "\ufeffShort", "a": "\u200b"}]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\nnot json\n", encoding="utf-8")
    prose = "\n\n".join(PROSE.format(i, i * i, i * 31 % 17) for i in range(400))
    (folder / "prose.txt.gz").write_bytes(gzip.compress(prose.encode()))
    (folder / "test.jsonl").write_text(json.dumps({"question": LEAKED}), encoding="utf-8")
    return folder


@pytest.fixture
def recipe() -> Recipe:
    sources = {
        "rows": SourcePart(kind="jsonl", path="rows.jsonl", text="{q}\n<think>\n{a}", prompt="{q}\n<think>\n", licence="MIT"),
        "prose": SourcePart(kind="text", path="prose.txt.gz", licence="public domain"),
        "tasks": SourcePart(kind="procedural", tasks=("recall", "count_bits"), documents=600, licence="Apache-2.0"),
    }
    data = DataPart(
        tokenizer=TokenizerPart(vocab_size=400),
        sources=sources,
        clean=CleanPart(min_chars=10, decontaminate=("test.jsonl",)),
        phases=(PhasePart(until=1.0, weights={"rows": 1.0, "prose": 1.0, "tasks": 2.0}),),
        held_out=0.1,
        cut=("prose",),
    )
    batch = BatchPart(sequence_length=64, sequences=4, tokens=64 * 4 * 30)
    evaluate = EvaluatePart(tasks=("count_bits",), problems=200)
    return Recipe(name="test", model=ModelPart(pattern="M-"), data=data, batch=batch, evaluate=evaluate)


def _by_name(report: DataReport) -> dict[str, SourceReport]:
    return {source.name: source for source in report.sources}


def test_every_row_is_accounted_for(texts: Path, recipe: Recipe, tmp_path: Path) -> None:
    folder = tmp_path / "out" / "data"
    seen: list[tuple[str, str, int]] = []
    report = prepare(recipe, folder, recipe_folder=texts, progress=lambda *event: seen.append(event))
    sources = _by_name(report)
    rows = sources["rows"]
    assert (rows.read, rows.bad_rows) == (53, 2)
    assert [(row.file, row.line) for row in rows.first_bad_rows] == [("rows.jsonl", 53), ("rows.jsonl", 55)]
    assert rows.dropped == {"evaluation-set:test.jsonl": 1, "exact-duplicate": 1, "short": 1}
    assert rows.licence == "MIT"
    assert rows.prompt_tokens > 0
    for source in sources.values():
        assert source.read == source.documents + sum(source.dropped.values())
        assert source.held_out_documents == round(0.1 * source.documents)
        parts = [read_shard(source_folder(folder, source.name), part).documents for part in PARTS]
        assert [len(part) for part in parts] == [source.documents - source.held_out_documents, source.held_out_documents]
        assert [int(part[:, 1].sum()) for part in parts] == [source.tokens, source.held_out_tokens]
    assert sum(sources["prose"].quality.values()) == sources["prose"].documents
    assert sources["tasks"].quality == {}
    assert report.tokens == sum(source.tokens for source in report.sources)
    assert report.vocab_size == load_tokenizer(folder / TOKENIZER_FOLDER).backend.get_vocab_size() <= 400
    assert ("read", "rows", 53) in seen
    assert ("encode", "tasks", sources["tasks"].documents) in seen
    assert sorted(path.name for path in folder.iterdir()) == ["report.json", "sources", "tokenizer"]
    assert [path.name for path in folder.parent.iterdir()] == ["data"]


def test_documents_come_back_from_their_tokens(texts: Path, recipe: Recipe, tmp_path: Path) -> None:
    prepare(recipe, tmp_path / "data", recipe_folder=texts)
    tokenizer = load_tokenizer(tmp_path / "data" / TOKENIZER_FOLDER)
    questions = {problem.question for problem in evaluation_problems("count_bits", 200)}
    found = set()
    for part in PARTS:
        shard = read_shard(source_folder(tmp_path / "data", "tasks"), part)
        for start, length, prompt in shard.documents.tolist():
            ids = shard.tokens[start : start + length].tolist()
            assert (ids[0], ids[-1]) == (1, 2)
            whole = tokenizer.decode(ids)
            head = tokenizer.decode(ids[:prompt])
            assert head.endswith("\n<think>\n")
            assert whole.startswith(head)
            assert tokenizer.encode(head) == ids[:prompt]
            found.add(head.removesuffix("\n<think>\n"))
    assert any("binary" in question for question in found)
    assert not found & questions


def test_a_stream_learns_only_what_is_not_held_out(texts: Path, recipe: Recipe, tmp_path: Path) -> None:
    prepare(recipe, tmp_path / "data", recipe_folder=texts)
    stream = TokenStream(tmp_path / "data", recipe.data, recipe.batch, seed=0)
    tokenizer = load_tokenizer(tmp_path / "data" / TOKENIZER_FOLDER)
    held_out = {
        p for b in stream.held_out("rows", 9, 2) for row in b.input_ids for p in _prompts(tokenizer.decode(row.tolist()))
    }
    learned: set[str] = set()
    for _ in range(recipe.batch.steps):
        for row in stream.batch().input_ids:
            learned.update(_prompts(tokenizer.decode(row.tolist())))
    assert len(held_out) == 5
    assert len(learned) == 45
    assert not learned & held_out


def _prompts(text: str) -> list[str]:
    return [line for line in text.replace("What is", "\nWhat is").split("\n") if line.startswith("What is")]


def test_the_same_settings_take_the_folder_as_it_is(texts: Path, recipe: Recipe, tmp_path: Path) -> None:
    first = prepare(recipe, tmp_path / "data", recipe_folder=texts)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "data").rglob("*")}
    blend = replace(recipe.data, phases=(PhasePart(until=1.0, weights={"prose": 1.0}),), cut=())
    other = replace(recipe, name="other", seed=7, data=blend, batch=replace(recipe.batch, sequences=2))
    assert prepare(other, tmp_path / "data", recipe_folder=texts) == first == read_report(tmp_path / "data")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "data").rglob("*")} == before


def test_two_preparations_are_equal_byte_by_byte(texts: Path, recipe: Recipe, tmp_path: Path) -> None:
    contents = []
    for name in ("a", "b"):
        prepare(recipe, tmp_path / name, recipe_folder=texts)
        files = sorted((tmp_path / name).rglob("*.*"))
        contents.append([(path.relative_to(tmp_path / name), path.read_bytes()) for path in files])
    assert contents[0] == contents[1]
    assert len(contents[0]) == 3 + 4 * 3


def test_other_settings_or_files_are_refused(texts: Path, recipe: Recipe, tmp_path: Path) -> None:
    prepare(recipe, tmp_path / "data", recipe_folder=texts)
    data = recipe.data
    more = replace(data.sources["tasks"], documents=601)
    for other in (
        replace(data, tokenizer=TokenizerPart(vocab_size=401)),
        replace(data, held_out=0.2),
        replace(data, clean=replace(data.clean, min_chars=11)),
        replace(data, sources={**data.sources, "tasks": more}),
    ):
        with pytest.raises(SpecError, match="holds data of other settings or files"):
            prepare(replace(recipe, data=other), tmp_path / "data", recipe_folder=texts)
    changed = replace(recipe, evaluate=replace(recipe.evaluate, problems=201))
    with pytest.raises(SpecError, match="holds data of other settings"):
        prepare(changed, tmp_path / "data", recipe_folder=texts)
    (texts / "test.jsonl").write_text(json.dumps({"question": LEAKED + " "}), encoding="utf-8")
    with pytest.raises(SpecError, match="holds data of other settings or files"):
        prepare(recipe, tmp_path / "data", recipe_folder=texts)


def test_the_content_of_a_hub_source_in_a_folder_counts(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    rows = tmp_path / "set" / "train.jsonl"
    hub = SourcePart(kind="hub", path="set")
    phases = (PhasePart(until=1.0, weights={"hub": 1.0}),)
    clean = replace(recipe.data.clean, decontaminate=())
    other = replace(recipe, data=replace(recipe.data, sources={"hub": hub}, phases=phases, cut=(), clean=clean))
    rows.write_text('{"text": "one"}\n', encoding="utf-8")
    before = fingerprint(other, tmp_path)
    assert fingerprint(other, tmp_path) == before
    rows.write_text('{"text": "two"}\n', encoding="utf-8")
    assert fingerprint(other, tmp_path) != before


def test_a_failure_leaves_nothing_behind(texts: Path, recipe: Recipe, tmp_path: Path) -> None:
    strict = replace(recipe, data=replace(recipe.data, clean=replace(recipe.data.clean, max_bad_rows=1)))
    with pytest.raises(SpecError, match=r"max_bad_rows=1.*rows\.jsonl line 55: not JSON"):
        prepare(strict, tmp_path / "out" / "data", recipe_folder=texts)
    assert list((tmp_path / "out").iterdir()) == []
    (tmp_path / "out" / "data").mkdir()
    with pytest.raises(SpecError, match="holds no prepared data"):
        prepare(recipe, tmp_path / "out" / "data", recipe_folder=texts)


def test_another_process_was_first(texts: Path, recipe: Recipe, tmp_path: Path) -> None:
    """Two start on a folder that is not there; the second to finish takes what the first made."""
    folder = tmp_path / "data"
    inner: list[DataReport] = []

    def intrude(stage: str, source: str, documents: int) -> None:
        if not inner and stage == "encode":
            inner.append(prepare(recipe, folder, recipe_folder=texts))

    assert prepare(recipe, folder, recipe_folder=texts, progress=intrude) == inner[0]
    assert [path.name for path in tmp_path.iterdir() if path.name != "texts"] == ["data"]


_KILLED = """
import os, pickle, signal, sys
from pathlib import Path
from tandem.train.data.prepare import prepare
prepare(
    pickle.loads(Path(sys.argv[1]).read_bytes()), Path(sys.argv[2]), recipe_folder=Path(sys.argv[3]),
    progress=lambda *_: os.kill(os.getpid(), signal.SIGKILL),
)
"""


def test_what_a_killed_process_left_is_removed(texts: Path, recipe: Recipe, tmp_path: Path) -> None:
    folder = tmp_path / "out" / "data"
    (tmp_path / "recipe").write_bytes(pickle.dumps(recipe))
    command = [sys.executable, "-c", _KILLED, str(tmp_path / "recipe"), str(folder), str(texts)]
    assert subprocess.run(command, timeout=120).returncode == -signal.SIGKILL
    (left,) = folder.parent.iterdir()
    assert left.name.startswith(".data.")
    assert list(left.iterdir())
    others = [folder.parent / name for name in (".data.mine", ".data", left.name.replace("data", "other"))]
    for other in others:
        other.mkdir()
    prepare(recipe, folder, recipe_folder=texts)
    assert sorted(folder.parent.iterdir()) == sorted([folder, *others])
    left.mkdir()
    prepare(recipe, folder, recipe_folder=texts)
    assert sorted(folder.parent.iterdir()) == sorted([folder, *others])


def test_work_folders_in_use_stay(tmp_path: Path) -> None:
    with work_folder(tmp_path / "data") as one, work_folder(tmp_path / "data") as two:
        remove_dead(tmp_path / "data")
        assert sorted(tmp_path.iterdir()) == sorted([one, two])
        two.rename(tmp_path / "data")
        remove_dead(tmp_path / "data")
    assert list(tmp_path.iterdir()) == [tmp_path / "data"]
    (tmp_path / "file").touch()
    with pytest.raises(SpecError, match="cannot be written"), work_folder(tmp_path / "file" / "data"):
        pass


@pytest.mark.parametrize("name", ["../../../x", "a/b", "/x", ".", "..", ".x", "", "a\n", "a b", "a\\b", "\u00e9"])
def test_names_that_lead_out_of_the_folder(texts: Path, recipe: Recipe, tmp_path: Path, name: str) -> None:
    sources = {name: SourcePart(kind="text", path="prose.txt.gz")}
    part = DataPart(sources=sources, phases=(PhasePart(until=1.0, weights={name: 1.0}),))
    with pytest.raises(SpecError, match=r"data\.sources=.*must be letters"):
        prepare(replace(recipe, data=part), tmp_path / "out" / "data", recipe_folder=texts)
    assert not (tmp_path / "out").exists()
    with pytest.raises(SpecError, match=r"data\.sources="):
        TokenStream(tmp_path, part, recipe.batch, seed=0)


@given(name=st.text("aZ9-_.", min_size=1, max_size=9))
def test_names_that_are_plain(name: str) -> None:
    if name[0] != ".":
        assert source_folder(Path("data"), name) == Path("data/sources") / name


def test_quality_below_the_least_is_dropped(texts: Path, recipe: Recipe, tmp_path: Path) -> None:
    (texts / "rows.jsonl").write_text('{"q": "### @@@ %%% &&&", "a": "#"}\n{"q": "What is this?", "a": "the end of it."}\n')
    strict = replace(recipe, data=replace(recipe.data, clean=replace(recipe.data.clean, min_quality=0.8)))
    rows = _by_name(prepare(strict, tmp_path / "data", recipe_folder=texts))["rows"]
    assert rows.dropped == {"quality": 1}
    assert rows.documents == 1
    assert rows.held_out_documents == 0


def test_near_duplicates_across_sources(texts: Path, recipe: Recipe, tmp_path: Path) -> None:
    copied = replace(recipe.data.sources["prose"])
    twice = replace(recipe.data, sources={**recipe.data.sources, "again": copied})
    reports = _by_name(prepare(replace(recipe, data=twice), tmp_path / "data", recipe_folder=texts))
    assert reports["prose"].dropped == {}
    assert reports["again"].dropped == {"exact-duplicate": reports["again"].read}
    assert reports["again"].documents == 0
    loose = replace(twice, clean=replace(twice.clean, exact_duplicates=False))
    reports = _by_name(prepare(replace(recipe, data=loose), tmp_path / "loose", recipe_folder=texts))
    assert reports["again"].dropped == {"near-duplicate": reports["again"].read}


def test_a_tokenizer_that_exists_is_taken(texts: Path, recipe: Recipe, tmp_path: Path) -> None:
    prepare(recipe, tmp_path / "data", recipe_folder=texts)
    named = replace(recipe.data, tokenizer=TokenizerPart(name=str(tmp_path / "data" / "tokenizer")))
    recipe = replace(recipe, data=named)
    prepare(recipe, tmp_path / "named", recipe_folder=texts)
    for name in recipe.data.sources:
        first, second = (source_folder(tmp_path / folder, name) / "tokens.bin" for folder in ("data", "named"))
        assert np.array_equal(np.fromfile(first, "<u2"), np.fromfile(second, "<u2"))
    save_tokenizer(train_bpe(["other text"], 300), tmp_path / "data" / "tokenizer")
    with pytest.raises(SpecError, match="holds data of other settings"):
        prepare(recipe, tmp_path / "named", recipe_folder=texts)


TINY = train_bpe(PROSE.split(), 300)


@given(
    pieces=st.lists(
        st.sampled_from([*CONTROL, *MARKS, "ships", " ", "\n", "7"]) | st.text(st.characters(codec="utf-8"), max_size=5)
    ),
    border=st.integers(0, 60),
)
def test_special_tokens_in_a_text_are_its_letters(pieces: list[str], border: int) -> None:
    """No text begins, ends or pads a document; the marks that are learned stay one token each."""
    head, rest = "".join(pieces)[:border], "".join(pieces)[border:]
    ((ids, prompt),) = encode_documents(TINY, [Document(text=head + rest, prompt_chars=len(head), id="d")])
    assert (ids[0], ids[-1]) == (CONTROL.index("<s>"), CONTROL.index("</s>"))
    assert all(token >= len(CONTROL) for token in ids[1:-1])
    assert (TINY.decode(ids[1:prompt]), TINY.decode(ids[prompt:-1])) == (head, rest)
    marks = sum(head.count(mark) + rest.count(mark) for mark in MARKS)
    assert sum(len(CONTROL) <= token < len(CONTROL) + len(MARKS) for token in ids) == marks
    assert TINY.encode("</s>", add_special_tokens=False) == [CONTROL.index("</s>")]


@pytest.mark.parametrize(("added", "dtype"), [(65536 - 300, "<u2"), (65537 - 300, "<u4")])
def test_large_vocabularies_have_four_bytes(tmp_path: Path, added: int, dtype: str) -> None:
    tokenizer = train_bpe(PROSE.split(), 300)
    size = tokenizer.backend.get_vocab_size()
    tokenizer.backend.add_tokens([f"[{i}]" for i in range(added + 300 - size)])
    last = f"[{added + 299 - size}]"
    write_shard(tmp_path / "shard", [Document(text=f"a{last}", id="d")], tokenizer, np.array([False]))
    tokens = read_shard(tmp_path / "shard", "train").tokens
    assert tokens.dtype == np.dtype(dtype)
    assert tokens[-2] == added + 299


def test_long_documents_go_with_the_prose_that_they_are_made_of(texts: Path, recipe: Recipe, tmp_path: Path) -> None:
    long = SourcePart(kind="long-documents", path="prose.txt.gz", documents=8, length=400, tasks=("count",))
    recipe = replace(recipe, data=replace(recipe.data, sources={**recipe.data.sources, "long": long}))
    made = _by_name(prepare(recipe, tmp_path / "data", recipe_folder=texts))["long"]
    assert made.read == 8
    assert made.documents > 1
    (texts / "prose.txt.gz").write_bytes(gzip.compress(b"Something else altogether. " * 500))
    with pytest.raises(SpecError, match="holds data of other settings or files"):
        prepare(recipe, tmp_path / "data", recipe_folder=texts)


def test_generated_documents_share_nothing_with_evaluation_sets(texts: Path, recipe: Recipe, tmp_path: Path) -> None:
    (problem,) = make_problems("gsm_symbolic", 1, seed=0)
    passage = (
        "Nobody inhabiting those weatherbeaten harbourside neighbourhoods anticipated the dilapidated merchantman's arrival. "
        "Nevertheless several fishermen's grandchildren recognised its extraordinarily peculiar foremast immediately."
    )  # facts may stand between its sentences, which are shorter than a run
    prose = "\n\n".join(f"The clerk wrote line {i} of the long book that day. {passage * (i == 30)}" for i in range(60))
    (texts / "book.txt").write_text(prose, encoding="utf-8")
    (texts / "test.jsonl").write_text(json.dumps([{"q": problem.question}, {"context": [passage]}]), encoding="utf-8")
    sources = {
        "symbolic": SourcePart(kind="procedural", tasks=("gsm_symbolic",), documents=40, seed=0),
        "long": SourcePart(kind="long-documents", path="book.txt", documents=50, length=700, tasks=("multi-key",)),
    }
    phases = (PhasePart(until=1.0, weights={"long": 1.0}),)
    recipe = replace(recipe, data=replace(recipe.data, sources=sources, phases=phases, cut=()))
    reports = _by_name(prepare(recipe, tmp_path / "data", recipe_folder=texts))
    tokenizer = load_tokenizer(tmp_path / "data" / TOKENIZER_FOLDER)
    for name, leaked in (("symbolic", problem.question), ("long", passage)):
        assert 0 < reports[name].dropped["evaluation-set:test.jsonl"] < reports[name].read
        for part in PARTS:
            shard = read_shard(source_folder(tmp_path / "data", name), part)
            for start, length, _ in shard.documents.tolist():
                text = tokenizer.decode(shard.tokens[start : start + length].tolist())
                words = re.sub(r"Remember \w+=\d\d\.", "", text).split()
                runs = {tuple(words[i : i + 13]) for i in range(len(words))}
                assert not runs & {tuple(leaked.split()[i : i + 13]) for i in range(len(leaked.split()) - 12)}


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_held_out_shares_that_are_refused(texts: Path, recipe: Recipe, tmp_path: Path, share: float) -> None:
    with pytest.raises(SpecError, match=r"data\.held_out"):
        prepare(replace(recipe, data=replace(recipe.data, held_out=share)), tmp_path / "data", recipe_folder=texts)
