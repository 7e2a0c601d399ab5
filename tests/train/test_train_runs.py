"""Whole runs of the command: resumed, sharded, spiked, exported."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from train_runs import events, losses, run, write_recipe

import tandem
from tandem.model.hybrid import Decoder
from tandem.model.tokenizer import load_tokenizer

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipe"))


@pytest.fixture(scope="module")
def whole(recipe: Path) -> Path:
    out = recipe.parent / "whole"
    printed = run(recipe, out).stdout
    assert json.loads(printed)["checkpoint"] == str(out / "model")
    return out


@pytest.fixture(scope="module")
def half(recipe: Path) -> Path:
    """A run that was killed at its twelfth step, with a checkpoint at the tenth."""
    out = recipe.parent / "half"
    _kill_after(recipe, out, 12)
    return out


def _kill_after(recipe: Path, out: Path, step: int, ranks: int = 1) -> None:
    """Start a run and kill -9 it once its journal has that step."""
    stop = (
        f"import os, signal\nfrom tandem.train import journal\nwrite = journal.Journal.write\n"
        "def then_die(self, event):\n"
        "    write(self, event)\n"
        f"    if event['step'] == {step}: os.kill(os.getpid(), signal.SIGKILL)\n"
        "journal.Journal.write = then_die\n"
        "from tandem.cli.app import main\nmain()\n"
    )
    command = [sys.executable, "-c", stop, "train", str(recipe), "--out", str(out), "--data", str(recipe.parent / "data")]
    command += ["checkpoint.asynchronous=false", "--json"]
    died = subprocess.run(command, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=240)
    assert died.returncode == -signal.SIGKILL, died.stderr[-2000:]


def test_a_killed_run_goes_on_bit_for_bit(recipe: Path, whole: Path, half: Path, tmp_path: Path) -> None:
    assert max(losses(half)) == 12
    again = _copy(half, tmp_path / "again")
    run(recipe, again)
    assert losses(again) == losses(whole)  # equal as floats, from the first step to the last
    ours, theirs = (tandem.load_model(out / "model").state_dict() for out in (again, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_two_ranks_learn_what_one_does_and_go_on_from_it(recipe: Path, whole: Path, half: Path, tmp_path: Path) -> None:
    two = tmp_path / "two"
    run(recipe, two, ranks=2)
    assert losses(two) == pytest.approx(losses(whole), abs=1e-3)
    resumed = _copy(half, tmp_path / "resumed")
    run(recipe, resumed, ranks=2)
    assert losses(resumed) == pytest.approx(losses(whole), abs=1e-3)
    assert events(resumed, "held_out")[-1]["loss"] == pytest.approx(events(whole, "held_out")[-1]["loss"], abs=1e-3)
    back = _copy(two, tmp_path / "back")
    (back / "checkpoints" / "step-00000020").rename(tmp_path / "last")
    run(recipe, back)
    assert losses(back) == pytest.approx(losses(whole), abs=1e-3)


@pytest.mark.parametrize("change", ["batch.micro=1", "parallel.recompute=full", "parallel.recompute=selective", "compile=true"])
def test_micro_batches_recompute_and_compiling_change_nothing(recipe: Path, whole: Path, tmp_path: Path, change: str) -> None:
    if change == "compile=true" and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("torch.compile needs a C++ compiler")
    run(recipe, tmp_path / "other", change)
    assert losses(tmp_path / "other") == pytest.approx(losses(whole), abs=1e-4)


def test_the_trained_model_is_a_checkpoint_with_its_tokenizer(recipe: Path, whole: Path) -> None:
    found = losses(whole)
    assert found[20] < found[1] - 1.0
    model, tokenizer = tandem.load_model(whole / "model"), load_tokenizer(whole / "model")
    assert model.spec.vocab_size == tokenizer.backend.get_vocab_size() == 300
    ids = torch.tensor([tokenizer.encode("3 + 4 =")])
    assert model(ids).shape == (1, ids.shape[1], 300)
    from transformers import AutoTokenizer

    assert AutoTokenizer.from_pretrained(whole / "model").encode("3 + 4 = 7") == tokenizer.encode("3 + 4 = 7")


def test_the_journal_says_what_a_step_was(whole: Path) -> None:
    steps = events(whole, "step")
    assert [line["step"] for line in steps] == list(range(1, 21))
    assert [line["phase"] for line in steps] == [0] * 12 + [1] * 6 + [2] * 2
    assert all(line["mfu"] > 0 and line["data_share"] < 1 and line["tokens_per_s"] > 0 for line in steps)
    assert steps[-1]["lr"] == pytest.approx(3e-5)
    assert [line["step"] for line in events(whole, "held_out")] == [10, 20]


def test_another_recipe_is_refused_where_a_run_lies(recipe: Path, whole: Path) -> None:
    refused = run(recipe, whole, "optimiser.lr=1e-3", check=False)
    assert refused.returncode == 2
    assert "holds a run of another recipe (optimiser.lr differs); name another folder" in refused.stderr
    assert json.loads(run(recipe, whole).stdout)["metrics"]["step"] == 20  # the same one has nothing left to do


def test_losses_are_those_of_a_plain_loop(recipe: Path, whole: Path) -> None:
    """AdamW by torch, the gradient of the mean over learned tokens, the rate of the schedule: nothing else happens."""
    from tandem.train.build import model_spec
    from tandem.train.data.stream import TokenStream
    from tandem.train.recipe_files import load_recipe
    from tandem.train.schedule import learning_rate

    settings, _ = load_recipe(recipe)
    part = settings.optimiser
    model = Decoder(model_spec(settings), seed=settings.seed)
    groups = [
        {"params": [p for p in model.parameters() if p.dim() == 2], "weight_decay": part.weight_decay},
        {"params": [p for p in model.parameters() if p.dim() != 2], "weight_decay": 0.0},
    ]
    optimiser = torch.optim.AdamW(groups, betas=(part.beta1, part.beta2))
    stream = TokenStream(recipe.parent / "data", settings.data, settings.batch, seed=settings.seed)
    plain = {}
    for step in range(settings.batch.steps):
        batch = stream.batch()
        ids, labels, documents = (torch.from_numpy(v) for v in (batch.input_ids, batch.labels, batch.documents))
        logits = model(ids, documents=documents)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), part.clip)
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, settings.batch.steps, part)
        optimiser.step()
        plain[step + 1] = float(loss.detach())
    assert losses(whole) == pytest.approx(plain, abs=1e-5)


def test_a_run_is_one_process_with_its_recipe_and_its_data(recipe: Path, half: Path, tmp_path: Path) -> None:
    again = _copy(half, tmp_path / "again")
    (again / "recipe.json").unlink()
    assert "holds a run without its recipe.json" in run(recipe, again, check=False).stderr
    again = _copy(half, tmp_path / "locked")
    with (again / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another process trains here" in run(recipe, again, check=False).stderr
    other = write_recipe(tmp_path)
    (tmp_path / "words.txt").write_text((tmp_path / "words.txt").read_text() + "\n\nOne more harbour.\n")
    refused = run(other, again, check=False)
    assert "this run was begun with other data" in refused.stderr
    damaged = _copy(half, tmp_path / "damaged")
    (next(iter((damaged / "checkpoints").glob("step-*10"))) / ".metadata").write_bytes(b"")
    last = run(recipe, damaged, check=False).stderr.splitlines()[-1]  # torch logs what it met before
    assert last.startswith("error: ")
    assert "step-00000010: cannot be read" in last
    assert "remove it to go on from step-00000005" in last


def test_the_card_says_how_to_make_the_model_again(whole: Path, recipe: Path) -> None:
    card = (whole / "model" / "README.md").read_text()
    assert f"tandem train {recipe}" in card
    assert "words" in (whole / "model" / "DATA.md").read_text()


def test_a_spike_goes_back_and_leaves_the_batches_out(recipe: Path, whole: Path, tmp_path: Path) -> None:
    """A poisoned batch: the run returns to its checkpoint, skips what came since, and reaches its last step."""
    poison = (
        "import sys\nfrom tandem.train import loop\nmake = loop._Run._gradients\n"
        "def once(self, batch, learned, seen=[]):\n"
        "    value = make(self, batch, learned)\n"
        "    if self.step == 12 and not seen:\n"
        "        seen.append(1)\n        return float('nan')\n"
        "    return value\n"
        "loop._Run._gradients = once\nfrom tandem.cli.app import main\nmain()\n"
    )
    out = tmp_path / "spiked"
    command = [
        sys.executable,
        "-c",
        poison,
        "train",
        str(recipe),
        "--out",
        str(out),
        "--data",
        str(recipe.parent / "data"),
        "--json",
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    (back,) = events(out, "rollback")
    assert (back["step"], back["at"], back["retry"]) == (10, 13, 1)
    assert "is not a number" in back["why"]
    found, usual = losses(out), losses(whole)
    assert sorted(found) == list(range(1, 21))
    assert all(found[step] == usual[step] for step in range(1, 11))
    assert found[11] != usual[11]  # another batch


def test_a_loss_that_stays_wrong_ends_the_run_with_one_line(recipe: Path, tmp_path: Path) -> None:
    ended = run(recipe, tmp_path / "hot", "optimiser.lr=1e30", "guard.retries=1", check=False)
    assert ended.returncode == 2
    assert ended.stderr.strip().splitlines()[-1].startswith("error: step ")


def _copy(source: Path, target: Path) -> Path:
    import shutil

    shutil.copytree(source, target)
    return target
