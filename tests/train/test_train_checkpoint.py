"""Checkpoints: what is published is whole, whatever happens in the middle of a save."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from tandem.spec.errors import SpecError
from tandem.train.checkpoint import Checkpoints, published
from tandem.train.ranks import Ranks


def trained(seed: int, steps: int = 3) -> tuple[nn.Module, torch.optim.AdamW]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4))
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.1 * (seed + 1), fused=True)
    for _ in range(steps):
        model(torch.randn(5, 8)).square().sum().backward()
        optimiser.step()
        optimiser.zero_grad()
    return model, optimiser


def same(one: tuple[nn.Module, torch.optim.AdamW], other: tuple[nn.Module, torch.optim.AdamW]) -> bool:
    values = [[*model.state_dict().values(), *(t for s in o.state.values() for t in s.values())] for model, o in (one, other)]
    return len(values[0]) == len(values[1]) and all(torch.equal(a, b) for a, b in zip(*values, strict=True))


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_checkpoint_brings_back_weights_moments_and_run(tmp_path: Path, asynchronous: bool) -> None:
    checkpoints = Checkpoints(tmp_path, Ranks(), keep=2, asynchronous=asynchronous)
    first = trained(1)
    checkpoints.save(7, *first, {"losses": [1.5]})
    other = trained(2)
    assert not same(first, other)
    assert checkpoints.load(*other) == {"step": 7, "losses": [1.5]}
    assert same(first, other)
    assert other[1].param_groups[0]["lr"] == pytest.approx(0.2)


def test_the_last_are_kept_in_the_order_of_steps(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, Ranks(), keep=2, asynchronous=True)
    model = trained(1)
    for step in (5, 50, 500):
        checkpoints.save(step, *model, {})
    checkpoints.finish()
    assert [path.name for path in published(tmp_path)] == ["step-00000050", "step-00000500"]
    assert not list(tmp_path.glob(".step-*"))


def test_an_empty_folder_holds_nothing_and_keep_must_keep(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path, Ranks(), keep=1, asynchronous=False).load(*trained(1)) is None
    with pytest.raises(SpecError, match=r"checkpoint.keep=0: must be at least 1"):
        Checkpoints(tmp_path, Ranks(), keep=0, asynchronous=False)


def test_a_first_save_does_not_count_as_a_step(tmp_path: Path) -> None:
    model = nn.Linear(3, 3)
    plain, saved = (torch.optim.AdamW(model.parameters(), lr=0.1) for _ in range(2))
    before = [p.detach().clone() for p in model.parameters()]
    Checkpoints(tmp_path, Ranks(), keep=1, asynchronous=False).save(0, model, saved, {})
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    moved = []
    for optimiser in (plain, saved):
        for p, value in zip(model.parameters(), before, strict=True):
            p.data.copy_(value)
            p.grad = torch.ones_like(p)
        for _ in range(3):
            optimiser.step()
        moved.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*moved, strict=True))


def test_the_last_checkpoint_is_dropped_only_where_an_older_one_is(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, Ranks(), keep=2, asynchronous=False)
    for step in (1, 2):
        checkpoints.save(step, *trained(1), {})
    for _ in range(2):
        checkpoints.drop_last()
        assert [path.name for path in published(tmp_path)] == ["step-00000001"]


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from torch import nn
from torch.distributed.checkpoint import filesystem
from tandem.train import checkpoint
from tandem.train.ranks import Ranks

model = nn.Linear(64, 64)
torch.nn.init.constant_(model.weight, 1.0)
optimiser = torch.optim.AdamW(model.parameters())
kept = checkpoint.Checkpoints(Path(sys.argv[1]), Ranks(), keep=3, asynchronous=sys.argv[3] == "True")
kept.save(1, model, optimiser, {})
kept.finish()
torch.nn.init.constant_(model.weight, 2.0)
die = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[2] == "data":          # weights are written, the index is not
    filesystem.FileSystemWriter.finish = die
elif sys.argv[2] == "name":        # all is written, the name is not given
    checkpoint.publish = die
elif sys.argv[2] == "start":       # the folder is there and nothing in it
    checkpoint.saver.save = checkpoint.saver.async_save = die
kept.save(2, model, optimiser, {})
kept.finish()
"""


@pytest.mark.slow
@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("moment", ["start", "data", "name"])
def test_kill_9_in_the_middle_of_a_save_leaves_the_last_checkpoint(tmp_path: Path, moment: str, asynchronous: bool) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path), moment, str(asynchronous)]
    died = subprocess.run(command, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=120)
    assert died.returncode == -signal.SIGKILL, died.stderr
    assert list(tmp_path.glob(".step-00000002"))
    assert [path.name for path in published(tmp_path)] == ["step-00000001"]
    model = nn.Linear(64, 64)
    checkpoints = Checkpoints(tmp_path, Ranks(), keep=3, asynchronous=False)
    run = checkpoints.load(model, torch.optim.AdamW(model.parameters()))
    assert run == {"step": 1}
    assert model.weight.eq(1.0).all()
    assert not list(tmp_path.glob(".step-*"))  # what the crash left is gone


def test_a_folder_without_its_last_file_is_no_checkpoint(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, Ranks(), keep=2, asynchronous=False)
    checkpoints.save(1, *trained(1), {})
    shutil.copytree(tmp_path / "step-00000001", tmp_path / "step-00000002")
    (tmp_path / "step-00000002" / "run.json").unlink()
    assert [path.name for path in published(tmp_path)] == ["step-00000001"]
