"""The journal of a run: one line a step that counts, whatever was interrupted, and TensorBoard's files."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tandem.spec.errors import SpecError
from tandem.train.journal import Journal, read_journal


def step(number: int) -> dict[str, object]:
    return {"kind": "step", "step": number, "loss": 1.0 / number}


def written(folder: Path, last: int) -> Journal:
    journal = Journal(folder, from_step=0, tensorboard=False)
    for number in range(1, last + 1):
        journal.write(step(number))
    return journal


def test_steps_that_are_made_again_stand_once(tmp_path: Path) -> None:
    written(tmp_path, 7).close()
    again = Journal(tmp_path, from_step=4, tensorboard=False)
    again.write(step(5))
    again.rewind(3)
    again.write({"kind": "rollback", "step": 3, "why": "a spike"})
    again.write(step(4))
    again.close()
    assert [line["step"] for line in read_journal(tmp_path)] == [1, 2, 3, 3, 4]


def test_a_line_that_a_crash_cut_off_is_left_out(tmp_path: Path) -> None:
    written(tmp_path, 3).close()
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"kind": "step", "st')
    assert [line["step"] for line in read_journal(tmp_path)] == [1, 2, 3]
    assert read_journal(tmp_path / "nowhere") == []


def test_a_line_that_is_no_event_is_named(tmp_path: Path) -> None:
    written(tmp_path, 1).close()
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write("5\n")
    with pytest.raises(SpecError, match=r"metrics.jsonl: line 2 is no event of a run; remove it"):
        read_journal(tmp_path)


def test_tensorboard_has_what_the_journal_has(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    journal = Journal(tmp_path, from_step=0, tensorboard=True)
    journal.write(step(2))
    journal.write({"kind": "held_out", "step": 2, "loss": {"plays": 3.5}})
    journal.close()
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert board.Scalars("step/loss")[0].value == pytest.approx(0.5)
    assert board.Scalars("held_out/loss/plays")[0].value == pytest.approx(3.5)


def test_without_tensorboard_one_line_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(SpecError, match=r"^tensorboard=True: the package is not installed"):
        Journal(tmp_path, from_step=0, tensorboard=True)
