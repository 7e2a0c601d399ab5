"""Shared memory between processes: the same bits arrive, memory is used again, nothing is left behind."""

from __future__ import annotations

import gc
import itertools
import os
import pickle
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import wait
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from test_transfer import SMALL, put_all, random_state

from tandem.engine.shared_memory import SharedMemoryPool, SharedMemoryReceipt, sweep
from tandem.engine.transfer import StateLayout
from tandem.model.state import SequenceState
from tandem.spec.errors import Infeasible, SpecError
from tandem.spec.mixers import Attention, Mamba2
from tandem.spec.model import ModelSpec

MIB = 1 << 20
LARGE = ModelSpec(
    name="large",
    vocab_size=9,
    hidden_size=8,
    layers=(
        Mamba2(num_heads=32, head_dim=64, state_dim=128, groups=8, conv_kernel=4, conv_bias=True, proj_bias=False),
        Attention(num_heads=4, num_kv_heads=4, head_dim=64),
    )
    * 4,
    max_context=1 << 16,
)
TOKENS = 7656
"""Of the large model: 64 MiB."""


def send(pool: SharedMemoryPool, spec: ModelSpec, state: SequenceState, cuts: list[int] | None = None) -> SharedMemoryReceipt:
    layer = next(layer for layer in state.layers if layer is not None)
    tokens = int(state.lengths[0])
    sink = pool.sink(StateLayout(spec=spec, tokens=tokens, dtype=layer.tensors[0].dtype))
    assert not isinstance(sink, Infeasible), sink.reason
    put_all(sink, state, cuts or [0, tokens])  # type: ignore[arg-type]
    return sink.close()


@pytest.fixture(params=["nameless", "file"])
def pool(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[SharedMemoryPool]:
    pool = SharedMemoryPool("tandem-test", 8 * MIB, directory=tmp_path if request.param == "file" else None)
    yield pool
    pool.close()
    assert list(tmp_path.iterdir()) == []


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_what_others_open_is_what_was_sent_whatever_the_order_of_releases(seed: int, dtype: torch.dtype) -> None:
    dice = random.Random(seed)
    sender, reader = (SharedMemoryPool("tandem-test", 4 * MIB, clock=itertools.count().__next__) for _ in range(2))
    held: list[tuple[bytes, SharedMemoryReceipt]] = []
    for number in range(12):
        tokens = dice.choice([1, 5, 60, 8000])
        state = random_state(SMALL, tokens, dtype, seed=number)
        cuts = [0, *sorted(dice.sample(range(1, tokens), min(2, tokens - 1))), tokens]
        held.append((state.to_bytes(), send(sender, SMALL, state, cuts)))
        while held and dice.random() < 0.4:
            wanted, receipt = held.pop(dice.randrange(len(held)))
            opened = reader.open(pickle.loads(pickle.dumps(receipt)), SMALL)
            assert opened.state.to_bytes() == wanted
            assert opened.nbytes == receipt.nbytes == opened.state.nbytes
            dice.choice([opened.release, lambda gone=receipt: sender.release(gone)])()
        assert sender.pending == len(held)
    for wanted, receipt in held:
        assert reader.open(receipt, SMALL).state.to_bytes() == wanted
        sender.release(receipt)
        sender.release(receipt)
    assert sender.pending == sender.used_bytes == 0
    sender.close()
    reader.close()


def test_memory_is_used_again_and_full_memory_is_refused_until_a_release(pool: SharedMemoryPool) -> None:
    state = random_state(SMALL, 40_000)
    layout = StateLayout(spec=SMALL, tokens=40_000)
    assert 2 * layout.nbytes < 8 * MIB < 4 * layout.nbytes
    receipts = [send(pool, SMALL, state) for _ in range(3)]
    for _ in range(5):
        refused = pool.sink(layout)
        assert isinstance(refused, Infeasible)
        assert "3 states wait to be fetched" in refused.reason
        middle = pool.open(receipts[1], SMALL)
        offset = receipts[1].offset
        middle.release()
        receipts[1] = send(pool, SMALL, state)
        assert receipts[1].offset == offset
        middle.release()  # late and twice: the memory is another state's now
        assert pool.pending == 3
    with pytest.raises(SpecError, match="one state of 400000 tokens takes"):
        pool.sink(StateLayout(spec=SMALL, tokens=400_000))


def test_an_old_receipt_neither_opens_nor_frees(pool: SharedMemoryPool) -> None:
    state = random_state(SMALL, 9)
    old = send(pool, SMALL, state)
    pool.open(old, SMALL).release()
    new = send(pool, SMALL, state)
    assert old.offset == new.offset
    with pytest.raises(SpecError, match="was given to another state"):
        pool.open(old, SMALL)
    pool.release(old)
    assert pool.pending == 1
    assert pool.open(new, SMALL).state.to_bytes() == state.to_bytes()


def test_a_late_release_writes_nothing_into_a_larger_state_in_its_place(pool: SharedMemoryPool) -> None:
    first, second = (send(pool, SMALL, random_state(SMALL, 9)) for _ in range(2))
    late = pool.open(second, SMALL)
    pool.release(first)
    pool.release(second)
    large = send(pool, SMALL, random_state(SMALL, 500))
    late.release()
    pool.open(large, SMALL)  # its checksums hold


def test_damage_is_one_line_and_frees_the_memory(pool: SharedMemoryPool) -> None:
    receipt = send(pool, SMALL, random_state(SMALL, 9))
    with open(receipt.path, "r+b") as memory:
        memory.seek(receipt.offset + 64 + receipt.nbytes - 1)
        byte = memory.read(1)
        memory.seek(-1, os.SEEK_CUR)
        memory.write(bytes([byte[0] ^ 4]))
    with pytest.raises(SpecError, match=r"^state of layer 3, tokens 0\.\.9: damaged; send the state again$"):
        pool.open(receipt, SMALL)
    assert pool.pending == 0


def test_another_model_is_refused_and_frees_the_memory(pool: SharedMemoryPool) -> None:
    receipt = send(pool, SMALL, random_state(SMALL, 9))
    with pytest.raises(SpecError, match="is of another model than large"):
        pool.open(receipt, LARGE)
    assert pool.pending == 0


def test_aborted_and_incomplete_states_leave_no_trace(pool: SharedMemoryPool) -> None:
    state = random_state(SMALL, 40_000)
    for end in (20_000, 40_000):
        sink = pool.sink(StateLayout(spec=SMALL, tokens=40_000))
        assert not isinstance(sink, Infeasible)
        sink.put(2, state.layers[2], 0, end, final=end == 40_000)
        assert pool.pending == 1
        if end == 20_000:
            sink.abort()
        else:
            with pytest.raises(SpecError, match="layer 0 ends at token 0"):
                sink.close()
        assert pool.pending == 0


def test_an_owner_that_closed_is_named(pool: SharedMemoryPool) -> None:
    owner = SharedMemoryPool("tandem-test", 4 * MIB)
    receipt = send(owner, SMALL, random_state(SMALL, 9))
    owner.close()
    with pytest.raises(SpecError, match="its owner is gone"):
        pool.open(receipt, SMALL)


def test_memory_that_the_system_has_not_is_refused(pool: SharedMemoryPool, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*of: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    refused = pool.sink(StateLayout(spec=SMALL, tokens=9))
    assert isinstance(refused, Infeasible)
    assert "No space left" in refused.reason
    with pytest.raises(SpecError, match="warm_bytes=4,096: no shared memory"):
        pool.warm(4096)
    assert pool.pending == 0


def test_views_outlive_the_pools() -> None:
    sender, reader = SharedMemoryPool("tandem-test", 4 * MIB), SharedMemoryPool("tandem-test", 4 * MIB)
    state = random_state(SMALL, 9)
    opened = reader.open(send(sender, SMALL, state), SMALL)
    sender.close()
    reader.close()
    del sender, reader
    gc.collect()
    assert opened.state.to_bytes() == state.to_bytes()
    opened.release()


@pytest.mark.parametrize(("fields", "text"), [({"max_bytes": 0}, "max_bytes=0"), ({"prefix": "a/b"}, "prefix='a/b'")])
def test_a_pool_that_cannot_be_is_refused(fields: dict[str, object], text: str) -> None:
    with pytest.raises(SpecError, match=text):
        SharedMemoryPool(**{"prefix": "a", "max_bytes": 4 * MIB, **fields})  # type: ignore[arg-type]


def digest(state: SequenceState) -> int:
    numbers = xxhash.xxh3_64()
    for layer in state.layers:
        for tensor in layer.tensors if layer is not None else ():
            numbers.update(tensor.contiguous().view(torch.int32).numpy().data)
    return numbers.intdigest()


def reading(pipe: Connection) -> None:
    """Another process: opens what comes, answers with its digest, releases when told."""
    torch.set_num_threads(1)
    pool = SharedMemoryPool("tandem-reader", 4 * MIB)
    while (receipt := pipe.recv()) is not None:
        opened = pool.open(receipt, LARGE)
        pipe.send(digest(opened.state))
        if pipe.recv() == "release":
            opened.release()
            pipe.send("released")


def test_two_processes_exchange_64_mib_and_use_the_memory_again() -> None:
    context = get_context("spawn")
    here, there = context.Pipe()
    child = context.Process(target=reading, args=(there,))
    child.start()
    try:
        pool = SharedMemoryPool("tandem-test", 68 * MIB)
        state = random_state(LARGE, TOKENS)
        assert 63.9 * MIB < state.nbytes < 64.1 * MIB
        wanted = digest(state)
        offsets = set()
        for _ in range(3):
            receipt = send(pool, LARGE, state, [*range(0, TOKENS, 1024), TOKENS])
            assert 0 <= receipt.hidden_s <= receipt.seconds
            offsets.add(receipt.offset)
            here.send(receipt)
            assert here.poll(60)
            assert here.recv() == wanted
            assert pool.pending == 1
            here.send("release")
            assert here.poll(60)
            assert here.recv() == "released"
            assert pool.pending == 0
        assert offsets == {0}
        assert len(pickle.dumps(receipt)) < 4096
        pool.release(send(pool, LARGE, state))
        receipt = send(pool, LARGE, random_state(LARGE, 50))
        here.send(receipt)
        assert here.poll(60)
        here.recv()
        child.kill()  # while it reads
        child.join(60)
        assert pool.pending == 1
        pool.release(receipt)
        assert pool.pending == 0
        pool.close()
    finally:
        child.kill()
        child.join(60)


OWNER = """
import sys
from pathlib import Path
from tandem.engine.shared_memory import SharedMemoryPool
pool = SharedMemoryPool("tandem-test", 4 << 20, directory=Path(sys.argv[1]) if sys.argv[1] else None)
pool.warm(1 << 20)
print("warm", flush=True)
sys.stdin.readline()
"""


@pytest.mark.parametrize("kind", ["file", "nameless"])
def test_a_killed_owner_leaves_nothing(tmp_path: Path, kind: str) -> None:
    shared = Path("/dev/shm")
    before = set(shared.iterdir()) if shared.exists() else set()
    argument = str(tmp_path) if kind == "file" else ""
    owners = [
        subprocess.Popen([sys.executable, "-c", OWNER, argument], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for owner in owners:
        assert owner.stdout is not None
        assert owner.stdout.readline() == "warm\n"
    files = list(tmp_path.iterdir())
    assert len(files) == (2 if kind == "file" else 0)
    assert sweep("tandem-test", tmp_path) == []
    owners[0].send_signal(signal.SIGKILL)
    owners[0].wait(60)
    removed = sweep("tandem-test", tmp_path)
    assert [path.name.split("-")[2] for path in removed] == ([str(owners[0].pid)] if kind == "file" else [])
    owners[1].communicate("\n", timeout=60)  # ends by itself, and removes its own
    assert owners[1].returncode == 0
    for owner in owners:
        assert owner.stdin is not None
        assert owner.stdout is not None
        owner.stdin.close()
        owner.stdout.close()
    assert list(tmp_path.iterdir()) == []
    left = {path for path in (set(shared.iterdir()) if shared.exists() else set()) - before if "tandem-test" in path.name}
    assert left == set()


def test_sweeping_leaves_other_files(tmp_path: Path) -> None:
    for name in ("tandem-test-notes.txt", "tandem-test-12x-00000000", "other-1-00000000"):
        (tmp_path / name).touch()
    assert sweep("tandem-test", tmp_path) == []
    assert len(list(tmp_path.iterdir())) == 3


def test_what_is_copied_before_the_end_counts_as_hidden() -> None:
    for background in (True, False):
        pool = SharedMemoryPool("tandem-test", 8 * MIB, background=background, clock=itertools.count().__next__)
        state = random_state(SMALL, 40_000)
        sink = pool.sink(StateLayout(spec=SMALL, tokens=40_000))
        assert not isinstance(sink, Infeasible)
        put_all(sink, state, [0, 10_000, 40_000])  # type: ignore[arg-type]
        wait(sink._writer._copies, timeout=60)
        receipt = sink.close()
        assert receipt.seconds >= 4  # two passes of the attention layer, two Mamba layers, by a clock that counts its readers
        assert (0 < receipt.hidden_s < receipt.seconds) if background else receipt.hidden_s == 0
        pool.close()
