"""`tandem study ... --out`: a place that cannot be written into is refused before any work, and nothing of the trial stays."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tandem.cli import studying
from tandem.spec.errors import SpecError
from tandem.study.joint_space import Setting

STUDIES: dict[str, tuple[str, Callable[[Path], None]]] = {
    "paper_a": ("paper_a", lambda out: studying.run_paper_a([], out, False)),
    "paper_b": ("paper_b", lambda out: studying.run_paper_b(out, False)),
    "joint": ("joint", lambda out: studying.run_joint(Setting(), out, False)),
    "hybrids": ("hybrids", lambda out: studying.run_hybrids(out, False)),
    "elastic": ("elastic", lambda out: studying.run_elastic(out, False, False)),
    "pretraining": ("pretraining", lambda out: studying.run_pretraining(Path("runs"), out, False)),
    "alignment": ("alignment", lambda out: studying.run_alignment(Path("runs"), out, False)),
    "compression": ("compression", lambda out: studying.run_compression(Path("runs"), out, False)),
}


@pytest.mark.parametrize("name", STUDIES)
def test_a_place_that_cannot_be_written_into_is_refused_before_any_work(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("the study ran before the folder was tried")

    module, run = STUDIES[name]
    monkeypatch.setattr(importlib.import_module(f"tandem.study.{module}"), f"study_{name}", never)
    (tmp_path / "file").write_text("x", encoding="utf-8")
    for out in (tmp_path / "file" / "below", tmp_path / "new" / ("x" * 300)):
        with pytest.raises(SpecError, match=r"^--out .*: cannot be written into \(.*\); give a folder") as wrong:
            run(out)
        assert "\n" not in str(wrong.value)
    (tmp_path / "taken" / "claims.json").mkdir(parents=True)
    with pytest.raises(SpecError, match=r"claims\.json in it is a folder"):
        run(tmp_path / "taken")
    with pytest.raises(AssertionError, match="before the folder was tried"):
        run(tmp_path / "fresh" / "deep")
    assert {path.name for path in tmp_path.iterdir()} == {"file", "taken"}  # nothing of the trials stays
