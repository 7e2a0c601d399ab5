"""Sources as documents: every kind is read, every bad row is named, and too many of them end the run."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from tandem.spec.errors import SpecError
from tandem.train.data.document import BadRows
from tandem.train.data.rows import READERS, read_rows
from tandem.train.data.template import Template
from tandem.train.recipe import SourcePart

ROWS = [{"question": "How many?", "answer": "2 + 2 = <<2+2=4>>4\n#### 4"}, {"question": "Why?", "answer": "Because.\n#### 1"}]


def _jsonl(folder: Path, *lines: bytes, name: str = "rows.jsonl") -> str:
    content = b"".join(line + b"\n" for line in lines)
    (folder / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return name


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_jsonl_through_templates(tmp_path: Path, name: str) -> None:
    _jsonl(tmp_path, *(json.dumps(row).encode() for row in ROWS), name=name)
    text = "{question}\n<think>\n{answer:steps}\n</think>\n{answer:result}"
    source = SourcePart(kind="jsonl", path=name, text=text, prompt="{question}\n<think>\n")
    first, second = read_rows("s", source, tmp_path)
    assert first.text == "How many?\n<think>\n2 + 2 = 4\n</think>\n4"
    assert first.text[: first.prompt_chars] == "How many?\n<think>\n"
    assert first.id == f"{name}:1"
    assert second.text.endswith("</think>\n1")


def test_bad_rows_are_named_counted_and_skipped(tmp_path: Path) -> None:
    lines = [
        b'{"text": "good"}',
        b"{not json",
        b'{"words": "no such column"}',
        b'{"text": ["a", "list"]}',
        b'{"text": null}',
        b'{"text": true}',
        b'{"text": "\xff"}',
        b'{"text": "   "}',
        b"[1, 2]",
        b"",
        b'{"text": "half \\ud800"}',
        b'{"text": 12.5}',
    ]
    source = SourcePart(kind="jsonl", path=_jsonl(tmp_path, *lines))
    bad = BadRows(source="s", limit=10)
    assert [document.text for document in read_rows("s", source, tmp_path, bad)] == ["good", "12.5"]
    assert bad.count == 10
    assert [row.line for row in bad.first] == list(range(2, 12))
    assert {row.file for row in bad.first} == {"rows.jsonl"}
    whys = [row.why for row in bad.first]
    assert whys[0] == "not JSON"
    assert "'text'" in whys[1]
    assert "list" in whys[2]
    assert "NoneType" in whys[3]
    assert "bool" in whys[4]
    assert whys[5] == "not UTF-8"
    assert whys[6] == "empty text"
    assert "list, not an object" in whys[7]
    assert whys[8] == "an empty line"
    assert "surrogate" in whys[9]


def test_one_bad_row_more_than_the_limit_ends_it(tmp_path: Path) -> None:
    source = SourcePart(kind="jsonl", path=_jsonl(tmp_path, b"{", b'{"text": "a"}', b"}", b"]"))
    assert len(list(read_rows("s", source, tmp_path, BadRows(source="s", limit=3)))) == 1
    with pytest.raises(SpecError, match=r"max_bad_rows=2.*'s'.*rows\.jsonl line 4: not JSON"):
        list(read_rows("s", source, tmp_path, BadRows(source="s", limit=2)))
    with pytest.raises(SpecError, match="max_bad_rows=0"):
        list(read_rows("s", source, tmp_path))


def test_only_the_first_bad_rows_are_kept() -> None:
    bad = BadRows(source="s", limit=1000)
    for i in range(1000):
        bad.add("f", i, "why")
    assert bad.count == 1000
    assert len(bad.first) == 20


def test_globs_are_read_in_order_and_documents_limit_them(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl"):
        _jsonl(tmp_path, *(json.dumps({"text": f"{name}{i}"}).encode() for i in range(3)), name=name)
    source = SourcePart(kind="jsonl", path="*.jsonl", documents=4)
    assert [d.text for d in read_rows("s", source, tmp_path)] == ["a.jsonl0", "a.jsonl1", "a.jsonl2", "b.jsonl0"]
    whole = SourcePart(kind="jsonl", path=str(tmp_path / "a.jsonl"))
    assert len(list(read_rows("s", whole, tmp_path / "elsewhere"))) == 3


def test_parquet(tmp_path: Path) -> None:
    rows = {"text": ["one", None, "three", ""], "n": [1, 2, 3, 4]}
    parquet.write_table(pa.table(rows), tmp_path / "t.parquet", row_group_size=2)
    bad = BadRows(source="s", limit=5)
    source = SourcePart(kind="parquet", path="t.parquet", text="{text}")
    assert [d.text for d in read_rows("s", source, tmp_path, bad)] == ["one", "three"]
    assert [(row.line, row.why) for row in bad.first] == [(2, "column 'text' is NoneType, not text"), (4, "empty text")]
    with pytest.raises(SpecError, match=r"no column 'body'; text, n"):
        list(read_rows("s", SourcePart(kind="parquet", path="t.parquet", text="{body}"), tmp_path))
    with pytest.raises(SpecError, match="max_bad_rows=1"):
        list(read_rows("s", source, tmp_path, BadRows(source="s", limit=1)))
    (tmp_path / "t.parquet").write_bytes(b"PAR1 but not really")
    with pytest.raises(SpecError, match="cannot be read"):
        list(read_rows("s", source, tmp_path))


@given(blocks=st.lists(st.integers(1, 9000), max_size=8))
def test_text_blocks_lose_nothing_and_are_bounded(tmp_path_factory: pytest.TempPathFactory, blocks: list[int]) -> None:
    folder = tmp_path_factory.mktemp("text")
    words = [" ".join(f"w{i}x{j}" for j in range(size // 6 + 1)) for i, size in enumerate(blocks)]
    (folder / "t.txt").write_text("\n\n\n".join(words), encoding="utf-8")
    documents = list(read_rows("s", SourcePart(kind="text", path="t.txt"), folder))
    assert " ".join(d.text for d in documents).split() == " ".join(words).split()
    assert all(0 < len(d.text) <= 4096 for d in documents)
    assert len({d.id for d in documents}) == len(documents)


def test_text_lines_that_are_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_bytes(b"good\nb\xffd\nalso good\n\n\nnext\n")
    bad = BadRows(source="s", limit=1)
    (document,) = read_rows("s", SourcePart(kind="text", path="t.txt"), tmp_path, bad)
    assert document.text == "good\nalso good\n\nnext"
    assert [(row.line, row.why) for row in bad.first] == [(2, "not UTF-8")]


def test_a_broken_archive_names_the_file(tmp_path: Path) -> None:
    whole = gzip.compress(b'{"text": "a"}\n' * 1000)
    (tmp_path / "rows.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SpecError, match=r"rows\.jsonl\.gz: cannot be read"):
        list(read_rows("s", SourcePart(kind="jsonl", path="rows.jsonl.gz"), tmp_path))


@pytest.mark.filterwarnings("ignore")
def test_hub_source_from_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "set").mkdir()
    _jsonl(tmp_path / "set", b'{"text": "one"}', b'{"text": null}', b'{"text": "three"}', name="train.jsonl")
    bad = BadRows(source="s", limit=1)
    documents = list(read_rows("s", SourcePart(kind="hub", path="set"), tmp_path, bad))
    assert [d.text for d in documents] == ["one", "three"]
    assert [row.line for row in bad.first] == [2]
    with pytest.raises(SpecError, match=r"data\.sources\.s\.path='set': cannot be read") as refused:
        list(read_rows("s", SourcePart(kind="hub", path="set", split="no-such"), tmp_path))
    assert "\n" not in str(refused.value)


def test_procedural_takes_tasks_in_turn() -> None:
    source = SourcePart(kind="procedural", tasks=("chain_sum", "recall"), documents=6)
    documents = list(read_rows("s", source, Path()))
    assert [d.id for d in documents] == ["chain_sum:0", "recall:0", "chain_sum:1", "recall:1", "chain_sum:2", "recall:2"]
    assert all(d.text[: d.prompt_chars].endswith("<think>\n") and "</think>" in d.text[d.prompt_chars :] for d in documents)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (SourcePart(kind="jsonl"), "path: is missing"),
        (SourcePart(kind="hub"), "path: is missing"),
        (SourcePart(kind="text", path="no*.txt"), "no such file"),
        (SourcePart(kind="procedural", documents=3), "tasks: is missing"),
        (SourcePart(kind="procedural", tasks=("chain_sum",)), "documents: is missing"),
        (SourcePart(kind="procedural", tasks=("chain_sun",), documents=3), "'chain_sun': not known; chain_sum"),
        (SourcePart(kind="novel"), "must be one of jsonl"),  # type: ignore[arg-type]
    ],
)
def test_refused_sources(tmp_path: Path, source: SourcePart, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        list(read_rows("s", source, tmp_path))


@pytest.mark.parametrize("text", ["{", "{0}", "{a.b}", "{a!r}", "{a:>10}", "{}"])
def test_templates_that_are_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(SpecError, match=r"data\.sources\.s\.text="):
        list(read_rows("s", SourcePart(kind="jsonl", path=_jsonl(tmp_path, b"{}"), text=text), tmp_path))


def test_a_prompt_must_begin_the_text(tmp_path: Path) -> None:
    source = SourcePart(kind="jsonl", path=_jsonl(tmp_path, b"{}"), text="{a}", prompt="{b}")
    with pytest.raises(SpecError, match="must be the beginning of text"):
        list(read_rows("s", source, tmp_path))


def test_template_braces_and_columns() -> None:
    template = Template("t", "{{{a}}} {b} {a}")
    assert template.columns == ("a", "b")
    assert template.render({"a": "x{y}", "b": 3}) == "{x{y}} 3 x{y}"
    with pytest.raises(ValueError, match="holds no ####"):
        Template("t", "{a:result}").render({"a": "no result"})


def test_every_kind_of_the_recipe_has_a_reader() -> None:
    assert set(READERS) == {"jsonl", "parquet", "text", "hub", "procedural", "long-documents"}
