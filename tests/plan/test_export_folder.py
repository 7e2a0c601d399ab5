"""The folder of an export: written whole or not at all, and never over anybody's own files."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from export_cases import plan_of

from tandem.plan.export.folder import export_plan
from tandem.spec.errors import SpecError


def test_an_untouched_export_is_replaced_and_anything_else_is_kept(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    export_plan(plan_of("dense split"), folder)
    export_plan(plan_of("dense"), folder)
    assert json.loads((folder / "plan.json").read_text())["mode"] == "colocated"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    (folder / "mine.txt").write_text("precious")
    with pytest.raises(SpecError, match=r"holds 'mine.txt', which no export wrote"):
        export_plan(plan_of("dense"), folder)
    (folder / "mine.txt").unlink()
    (folder / "nodes.env").write_text("NODES=(10.0.0.1)\n")
    with pytest.raises(SpecError, match=r"'nodes.env' was changed since it was exported"):
        export_plan(plan_of("dense"), folder)
    assert (folder / "nodes.env").read_text() == "NODES=(10.0.0.1)\n"


def test_a_failed_export_leaves_nothing_and_keeps_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "out"
    export_plan(plan_of("dense"), folder)
    before = (folder / "plan.json").read_text()
    written = Path.write_text
    count = Counter[str]()

    def full(self: Path, *args: Any, **kwargs: Any) -> int:
        count["files"] += 1
        if count["files"] > 3:
            raise OSError(28, "No space left on device")
        return written(self, *args, **kwargs)

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space"):
        export_plan(plan_of("dense split"), folder)
    monkeypatch.undo()
    assert (folder / "plan.json").read_text() == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
