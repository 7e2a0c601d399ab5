"""`tandem study paper-b` as a person and as a program use it, on a reduced space."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tandem.cli import studying
from tandem.report.study_html import claims_table, figure_of, study_page
from tandem.spec.errors import SpecError
from tandem.study import paper_b
from tandem.study.result import StudyResult


@pytest.fixture(scope="module")
def small() -> StudyResult:
    """Instances of at most 8 GPUs, kernels only."""
    return paper_b.study_paper_b(engine=False, max_instance_gpus=8)


@pytest.fixture(autouse=True)
def _small_space(monkeypatch: pytest.MonkeyPatch, small: StudyResult) -> None:
    monkeypatch.setattr(paper_b, "study_paper_b", lambda **_: small)


def test_json_is_one_object_and_files_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    studying.run_paper_b(tmp_path / "new", json_out=True)
    out = capsys.readouterr().out
    data = json.loads(out)
    assert out.count("\n") == 1
    assert len(data["claims"]) == 21
    assert any(not c["holds"] for c in data["claims"])  # and yet it returned
    written = json.loads((tmp_path / "new" / "claims.json").read_text(encoding="utf-8"))
    assert [c["ours"] for c in written["claims"]] == [c["ours"] for c in data["claims"]]
    page = (tmp_path / "new" / "study-paper-b.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>")
    assert page.count("class='chart'") == len(data["figures"])
    assert all(f"id='{c['id']}'" in page for c in data["claims"])
    assert '<script src="http' not in page


def test_text_names_every_claim_and_why_it_fails(capsys: pytest.CaptureFixture[str]) -> None:
    studying.run_paper_b(None, json_out=False)
    out = capsys.readouterr().out
    for number in range(1, 13):
        assert f"F{number} " in out
    assert "why not:" in out
    assert "design points priced" in out


def test_a_file_where_a_folder_should_be_is_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = tmp_path / "file"
    taken.write_text("x", encoding="utf-8")

    def never() -> None:
        raise AssertionError("priced before the folder was checked")

    monkeypatch.setattr(paper_b, "study_paper_b", lambda **_: never())
    with pytest.raises(SpecError, match="give a folder"):
        studying.run_paper_b(taken, json_out=False)


def test_a_figure_draws_each_name_in_the_legend_once_and_text_is_escaped() -> None:
    series = {"name": "a", "x": [1.0, 2.0], "y": [2.0, 1.0], "text": (), "role": None, "style": "dash"}
    figure = {"title": "t", "note": "<n>", "x_title": "x", "y_title": "y", "x_log": False, "y_log": True, "x_labels": ("one",),
              "panels": [{"title": "p", "series": [series]},
                         {"title": "q", "series": [series, {**series, "name": "b"}]}]}  # fmt: skip
    drawn = figure_of(figure)
    assert drawn.layout.xaxis.ticktext == ("one",)
    assert [t.showlegend for t in drawn.data] == [True, False, True]
    assert drawn.data[0].line.color == drawn.data[1].line.color != drawn.data[2].line.color
    claim = {"id": "X", "title": "<b>", "printed": "p", "ours": "o", "ours_by": {"tandem": "o < p"}, "holds": False,
             "holds_engine": None, "why": "w", "source": "s"}  # fmt: skip
    assert "&lt;b&gt;" in claims_table([claim], ["tandem"])
    data = {"claims": [claim], "backends": {"tandem": "k"}, "points_evaluated": 1, "points_considered": 2, "seconds": 1.0,
            "errata": ["e"], "figures": {"1": figure}, "assumptions": ["a"]}  # fmt: skip
    assert "&lt;n&gt;" in study_page("t", "l", data)
