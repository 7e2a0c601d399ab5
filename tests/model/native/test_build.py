"""The compiled code: cached, replaced when something changes, and refused with a reason where it cannot be."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest

from tandem.model import native
from tandem.model.native import build
from tandem.spec.errors import Infeasible


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TANDEM_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "answer.c"
    file.write_text("int answer(void) { return 42; }\n")
    return file


def compiled(folder: Path) -> list[Path]:
    return sorted(folder.glob("*"))


@pytest.mark.skipif(not native.available(), reason="no C compiler")
def test_code_is_compiled_once_and_again_when_its_source_changes(source: Path) -> None:
    first = build.load([source])
    assert isinstance(first, ctypes.CDLL)
    assert first.answer() == 42
    (made,) = compiled(build.cache_folder())
    stamp = made.stat().st_mtime_ns
    build.load([source])
    assert made.stat().st_mtime_ns == stamp
    source.write_text("int answer(void) { return 43; }\n")
    second = build.load([source])
    assert isinstance(second, ctypes.CDLL)
    assert second.answer() == 43
    assert len(compiled(build.cache_folder())) == 2


@pytest.mark.skipif(not native.available(), reason="no C compiler")
def test_code_that_does_not_compile_is_a_reason_and_leaves_nothing(source: Path) -> None:
    source.write_text("int answer(void) { return nothing; }\n")
    refusal = build.load([source])
    assert isinstance(refusal, Infeasible)
    assert "error" in refusal.reason
    assert compiled(build.cache_folder()) == []


def test_without_a_compiler_the_reason_says_so(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    assert build.load([source]) == Infeasible("no C compiler: none of cc, gcc, clang is on PATH")


@pytest.mark.skipif(not native.available(), reason="no C compiler")
def test_a_cache_that_cannot_be_written_is_a_reason(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TANDEM_CACHE", str(source / "below_a_file"))
    refusal = build.load([source])
    assert isinstance(refusal, Infeasible)
    assert "below_a_file" in refusal.reason


def test_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TANDEM_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert build.cache_folder() == Path("/elsewhere/tandem")
    monkeypatch.setenv("TANDEM_CACHE", "/here")
    assert build.cache_folder() == Path("/here")
